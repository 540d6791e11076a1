//! A node with a real agent, and pods on it.
//!
//! ```text
//!   one lab for all tests ──▶ a node for each ──▶ `weft agent`: a network of its own, 10.32.0.0/12
//!                                  └── Place: what a runtime knows of it ──▶ Call ──▶ `weft-cni` in the node's namespace
//! ```
//! The lab is built with the first test that runs and taken down, and checked for leaks, with the last.

use crate::call::{Answer, Call};
use serde_json::{Value, json};
use std::{
    future::Future,
    net::IpAddr,
    ops::Deref,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use weft::{
    ipam::{Allocation, Change, Owner, record, span::Layout},
    linux::{
        netlink::{Family, Link, Netlink, Route, VethPair},
        netns::Netns,
        store::Store,
        sysctl,
    },
    types::{AttachmentKey, Mac, Prefix, Universe},
};
use weft_lab::{Lab, agent::Settings, binaries::Binaries, fault, node};

/// A node as a container runtime knows it.
pub struct Place {
    netns: Netns,
    run_dir: PathBuf,
}

/// A place with a real agent.
pub struct Harness {
    place: Place,
    pub node: Arc<node::Node>,
    lab: Arc<Lab>,
}

/// A pod's namespace, which a runtime would have made.
pub struct Pod {
    pub netns: Netns,
    pub id: String,
}

impl Harness {
    /// A node with a running agent that is ready.
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// The same, with other flags.
    pub fn start_with(change: impl FnOnce(&mut Settings)) -> Self {
        let harness = Self::without_agent();
        harness.node.configure(change);
        harness.start_agent();
        harness
    }

    /// A node whose agent is down.
    pub fn without_agent() -> Self {
        let lab = lab();
        let node = lab.add_node().unwrap();
        node.configure(|settings| {
            settings.peers.clear();
            settings.seed = Some(settings.name.clone());
            settings.more = ["--mtu", &MTU.to_string()].map(String::from).into();
        });
        let file = node.netns().try_clone().unwrap();
        let netns = Netns::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).unwrap();
        let place = Place::new(netns, node.run_dir());
        Self { place, node, lab }
    }

    /// A node that knows no addresses, and nobody who could give it any but a peer that has not been started.
    pub fn waiting(change: impl FnOnce(&mut Settings)) -> (Self, Self) {
        let (giver, joiner) = (Self::without_agent(), Self::without_agent());
        let address = giver.node.address().to_string();
        joiner.node.configure(|settings| {
            settings.seed = None;
            settings.peers = vec![address];
            change(settings);
        });
        joiner.node.start_agent().unwrap();
        eventually("the agent answers", || joiner.node.http("/livez").is_ok());
        (joiner, giver)
    }

    pub fn start_agent(&self) {
        self.node.start_agent().unwrap();
        self.node.wait_ready(READY_WITHIN).unwrap();
    }

    pub fn kill_agent(&self) {
        self.node.kill_agent().unwrap();
    }

    /// `weft pods --json`.
    pub fn pods(&self) -> Vec<Value> {
        self.node.weft_json("pods").unwrap()["pods"].as_array().unwrap().clone()
    }

    /// Rewrites what the agent has stored of its pods' allocations, while it is down.
    pub fn rewrite(&self, change: impl Fn(&AttachmentKey, &mut Allocation)) {
        self.node.stop_agent().unwrap();
        let universe: Universe = UNIVERSE.parse().unwrap();
        let layout = Layout::new(universe);
        let name = self.node.name().parse().unwrap();
        let (store, _) = Store::open(&self.node.state_dir(), &name, &universe).unwrap();
        let mut writes = Vec::new();
        for mut allocation in record::load(&store, &layout).unwrap().allocations {
            let Owner::Pod(key) = allocation.owner.clone() else { continue };
            change(&key, &mut allocation);
            let change = Change::Allocation(allocation.address, Some(Arc::new(allocation)));
            writes.push(record::write(&change, &layout));
        }
        store.commit(&writes).unwrap();
        drop(store);
        self.start_agent();
    }

    /// Has the agent believe that the attachments of these containers are older than a minute.
    pub fn age(&self, containers: &[&str]) {
        let then = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_secs(61);
        self.rewrite(|key, allocation| {
            if containers.contains(&key.container_id()) {
                allocation.reserved_at = then.as_millis() as u64;
            }
        });
    }

    pub fn bridge_mac(&self) -> Mac {
        inside(self.node(), async |netlink| netlink.link_by_name(BRIDGE).await.unwrap().mac.unwrap())
    }

    /// Routes to single addresses on the bridge: one for each pod.
    pub fn pod_routes(&self) -> Vec<Route> {
        inside(self.node(), async |netlink| {
            let bridge = netlink.link_by_name(BRIDGE).await.unwrap().index;
            let mut routes = netlink.routes(Family::V4).await.unwrap();
            routes.retain(|route| route.link == Some(bridge) && route.destination.prefix_len() == 32);
            routes
        })
    }

    /// Loads nftables rules on the node, as another program of the host would.
    pub fn nft(&self, rules: &str) {
        fault::nft(self.node.netns(), rules).unwrap();
    }

    /// No allocation, no link and no route of a pod is left.
    #[track_caller]
    pub fn is_clean(&self) {
        assert_eq!(self.veths(), []);
        assert_eq!(self.pod_routes(), []);
        assert_eq!(self.pods(), [Value::Null; 0]);
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("last words of {}:\n{}", self.node.name(), self.node.log_tail());
        }
        match self.lab.remove_node(&self.node) {
            Err(error) if thread::panicking() => eprintln!("{error:#}"),
            ended => ended.unwrap(),
        }
    }
}

impl Deref for Harness {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

impl Place {
    pub fn new(netns: Netns, run_dir: PathBuf) -> Self {
        Self { netns, run_dir }
    }

    pub fn node(&self) -> &Netns {
        &self.netns
    }

    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("weft.sock")
    }

    pub fn tombstones(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.run_dir.join("tombstones")) else {
            return Vec::new();
        };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// What a runtime of CNI 1.0.0 has on stdin.
    pub fn conf(&self) -> Value {
        self.conf_of("1.0.0")
    }

    pub fn conf_of(&self, version: &str) -> Value {
        json!({"cniVersion": version, "name": "weft", "type": "weft-cni",
            "socket": self.socket(), "runDir": self.run_dir})
    }

    pub fn call(&self, command: &str, conf: &Value) -> Call {
        Call::new(shim(), command, conf)
    }

    pub fn call_for(&self, command: &str, pod: &Pod, conf: &Value) -> Call {
        self.call(command, conf)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=u-1")
    }

    pub fn add(&self, pod: &Pod, conf: &Value) -> Answer {
        self.call_for("ADD", pod, conf).without("CNI_ARGS").run(&self.netns)
    }

    pub fn del(&self, pod: &Pod, conf: &Value) -> Answer {
        self.call_for("DEL", pod, conf).run(&self.netns)
    }

    /// CHECK with what ADD answered.
    pub fn check(&self, pod: &Pod, conf: &Value, added: &Value) -> Answer {
        let mut conf = conf.clone();
        conf["prevResult"] = added.clone();
        self.call_for("CHECK", pod, &conf).run(&self.netns)
    }

    pub fn status(&self) -> Answer {
        self.call("STATUS", &self.conf_of("1.1.0")).run(&self.netns)
    }

    /// GC with more keys on stdin.
    pub fn gc(&self, keys: Value) -> Answer {
        let mut conf = self.conf_of("1.1.0");
        for (key, value) in keys.as_object().unwrap() {
            conf[key] = value.clone();
        }
        self.call("GC", &conf).run(&self.netns)
    }

    /// The host's links whose names are those of pods' veths.
    pub fn veths(&self) -> Vec<Link> {
        let links = inside(&self.netns, async |netlink: Netlink| netlink.links().await.unwrap());
        links.into_iter().filter(|link| link.name.starts_with("wf")).collect()
    }
}

impl Pod {
    pub fn new(id: &str) -> Self {
        Self { netns: Netns::create().expect("make a network namespace"), id: id.into() }
    }

    /// Names the namespace as long as this process has it open.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_fd().as_raw_fd())
    }

    pub fn key(&self) -> AttachmentKey {
        AttachmentKey::new(&self.id, "eth0").unwrap()
    }

    /// Makes an interface that is not ours.
    pub fn occupy(&self, name: &str) {
        cable(&self.netns, name);
    }

    pub fn link(&self, name: &str) -> Option<Link> {
        let links = inside(&self.netns, async |netlink: Netlink| netlink.links().await.unwrap());
        links.into_iter().find(|link| link.name == name)
    }

    pub fn sysctl(&self, key: &str) -> Option<String> {
        self.netns.enter(|| sysctl::read(key).unwrap()).unwrap()
    }
}

/// The lab that all tests share, as long as any of them uses it.
fn lab() -> Arc<Lab> {
    static SHARED: Mutex<Weak<Lab>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let lab = Arc::new(Lab::builder().nodes(0).universe(UNIVERSE).start().unwrap());
        *shared = Arc::downgrade(&lab);
        lab
    })
}

/// Runs netlink calls inside a namespace.
pub fn inside<T: Send, F: Future<Output = T>>(netns: &Netns, work: impl FnOnce(Netlink) -> F + Send) -> T {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { work(Netlink::open().unwrap()).await })
    };
    netns.enter(run).expect("enter a namespace")
}

/// Makes a link of that name that is nobody's.
pub fn cable(netns: &Netns, name: &str) {
    inside(netns, async |netlink| netlink.create_veth(&local(name)).await.unwrap());
}

/// A veth with both ends in one namespace.
pub fn local(name: &str) -> VethPair<'_> {
    VethPair {
        name,
        mac: None,
        peer_name: "other",
        peer_mac: None,
        peer_netns: None,
        mtu: MTU.into(),
        peer_max_segments: None,
    }
}

/// A route that another program would have made to a pod's address: ours can't be there beside it.
pub fn foreign_route(address: &str, link: u32) -> Route {
    let address: Prefix = address.parse().unwrap();
    Route { protocol: 4, ..Route::on_link(address, link) }
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < until, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn shim() -> &'static Path {
    &Binaries::get().unwrap().weft_cni
}

/// The first address of the universe that can be handed out.
pub fn gateway() -> IpAddr {
    IpAddr::from([10, 32, 0, 1])
}

/// The pods', in bytes.
pub const MTU: u16 = 1400;
pub const BRIDGE: &str = "weft";
const UNIVERSE: &str = "10.32.0.0/12";
/// With a wide margin for a machine that compiles beside it.
const READY_WITHIN: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(10);
