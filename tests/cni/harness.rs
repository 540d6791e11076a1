//! A node with an agent, and pods on it, all gone when they are dropped: namespaces without a name, files in a
//! directory of their own.

use crate::{
    agent::{Agent, BRIDGE, State, bridge_mac, gateway},
    call::{Answer, Call},
};
use serde_json::{Value, json};
use std::{
    future::Future,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use weft::{
    cni::{Node, Readiness},
    linux::{
        netlink::{AddressFlags, BridgeOptions, Link, Netlink, VethPair},
        netns::Netns,
    },
    types::{AttachmentKey, Prefix},
};

pub struct Harness {
    node: Netns,
    directory: TempDir,
    state: Arc<Mutex<State>>,
    agent: Option<Agent>,
}

/// A pod's namespace, which a runtime would have made.
pub struct Pod {
    pub netns: Netns,
    pub id: String,
}

impl Harness {
    /// A node with a running agent.
    pub fn start() -> Self {
        let mut harness = Self::without_agent();
        harness.start_agent();
        harness
    }

    /// A node whose agent is down.
    pub fn without_agent() -> Self {
        let node = Netns::create().expect("these tests make network namespaces: run them as root");
        inside(&node, async |netlink: Netlink| {
            netlink.create_bridge(BRIDGE, bridge_mac(), MTU.into(), BridgeOptions::default()).await.unwrap();
            let bridge = netlink.link_by_name(BRIDGE).await.unwrap().index;
            netlink.add_address(bridge, Prefix::from(gateway()), AddressFlags::default()).await.unwrap();
            netlink.set_up(bridge, true).await.unwrap();
        });
        let directory = tempfile::Builder::new().prefix("weft-cni-test-").tempdir().unwrap();
        Self { node, directory, state: Arc::default(), agent: None }
    }

    pub fn start_agent(&mut self) {
        let facts =
            Node { bridge: BRIDGE.into(), bridge_mac: bridge_mac(), gateways: vec![gateway()], mtu: MTU };
        self.start_agent_with(Some(facts), Readiness::default(), None);
    }

    pub fn start_agent_with(&mut self, facts: Option<Node>, ready: Readiness, conf_dir: Option<&Path>) {
        let (run_dir, socket) = (self.directory.path().to_path_buf(), self.socket());
        self.agent = Some(Agent::start(&self.node, &run_dir, &socket, conf_dir, &self.state, facts, ready));
    }

    pub fn kill_agent(&mut self) {
        self.agent.take().expect("an agent runs").kill(&self.socket());
    }

    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("an agent runs")
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn node(&self) -> &Netns {
        &self.node
    }

    pub fn run_dir(&self) -> &Path {
        self.directory.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("weft.sock")
    }

    pub fn tombstones(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.directory.path().join("tombstones")) else {
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
            "socket": self.socket(), "runDir": self.directory.path()})
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
        self.call_for("ADD", pod, conf).without("CNI_ARGS").run(&self.node)
    }

    pub fn del(&self, pod: &Pod, conf: &Value) -> Answer {
        self.call_for("DEL", pod, conf).run(&self.node)
    }

    /// CHECK with what ADD answered.
    pub fn check(&self, pod: &Pod, conf: &Value, added: &Value) -> Answer {
        let mut conf = conf.clone();
        conf["prevResult"] = added.clone();
        self.call_for("CHECK", pod, &conf).run(&self.node)
    }

    pub fn status(&self) -> Answer {
        self.call("STATUS", &self.conf_of("1.1.0")).run(&self.node)
    }

    /// GC with more keys on stdin.
    pub fn gc(&self, keys: Value) -> Answer {
        let mut conf = self.conf_of("1.1.0");
        for (key, value) in keys.as_object().unwrap() {
            conf[key] = value.clone();
        }
        self.call("GC", &conf).run(&self.node)
    }

    /// The host's links whose names are ours.
    pub fn veths(&self) -> Vec<Link> {
        let links = inside(&self.node, async |netlink: Netlink| netlink.links().await.unwrap());
        links.into_iter().filter(|link| link.name.starts_with("wf")).collect()
    }

    /// Neither addresses nor links are left.
    #[track_caller]
    pub fn is_clean(&self) {
        assert_eq!(self.veths(), []);
        assert!(self.state().allocations.is_empty(), "{:?}", self.state().allocations);
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        if self.agent.is_some() {
            self.kill_agent();
        }
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
        self.netns.enter(|| weft::linux::sysctl::read(key).unwrap()).unwrap()
    }
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
    VethPair { name, mac: None, peer_name: "other", peer_mac: None, peer_netns: None, mtu: MTU.into() }
}

/// Waits until something holds, five seconds at most.
#[track_caller]
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < until, "not within 5 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The shim, built in release once.
pub fn shim() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(directory) = std::env::var_os("WEFT_BIN_DIR") {
            return Path::new(&directory).join("weft-cni");
        }
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--release",
            "--package",
            "weft-cni",
            "--message-format=json-render-diagnostics",
        ]);
        let output = cargo.stderr(std::process::Stdio::inherit()).output().expect("run cargo");
        assert!(output.status.success(), "build weft-cni");
        let messages = String::from_utf8(output.stdout).unwrap();
        let executable = messages.lines().rev().find_map(|line| {
            serde_json::from_str::<Value>(line).ok()?["executable"].as_str().map(PathBuf::from)
        });
        executable.expect("cargo names the executable")
    })
}

/// The pods', in bytes.
pub const MTU: u16 = 1400;
