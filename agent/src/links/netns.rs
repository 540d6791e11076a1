//! Tests against the real kernel. Each makes network namespaces of its own, without names, and leaves nothing behind.

mod drift;
mod traffic;

use super::{
    desired::{Desired, PodPort},
    firewall::Family,
    observe,
    observed::Observed,
    plan::{Change, plan, sysctls},
    reconcile::remove,
    task::{Handle, spawn},
};
use crate::{
    linux::{
        netlink::{AddressFlags, Conntrack, Netlink, Route, VethPair},
        nft::Nft,
        sysctl,
    },
    types::{AttachmentKey, Mac, PodRef, Prefix, VethAlias},
};
use std::{
    collections::BTreeSet,
    fs::File,
    future::Future,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    sync::mpsc,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A network namespace and the thread that lives in it.
struct Namespace {
    file: File,
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, file) = mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            ready.send(File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        Self { file: file.recv().expect("these tests make network namespaces: run them as root"), jobs }
    }

    /// Runs there, and waits for the result without holding up the caller's runtime.
    async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, done) = tokio::sync::oneshot::channel();
        self.jobs.send(Box::new(move || drop(result.send(job())))).unwrap();
        done.await.expect("the job in another namespace failed")
    }

    /// Runs a future there, on a runtime of its own.
    async fn asynchronously<T, F>(&self, job: impl FnOnce(Netlink) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T>,
    {
        self.run(|| runtime().block_on(async { job(Netlink::open().unwrap()).await })).await
    }
}

/// A node in a namespace of its own, with its TUN; the calling thread enters it.
struct Node {
    netlink: Netlink,
    tun: tokio_tun::Tun,
    state: TempDir,
}

impl Node {
    async fn new() -> Self {
        let netlink = Netlink::open().unwrap();
        let lo = netlink.link_by_name("lo").await.unwrap().index;
        netlink.set_up(lo, true).await.unwrap();
        let mut tuns = tokio_tun::Tun::builder().name("weft0").build().unwrap();
        Self { netlink, tun: tuns.pop().unwrap(), state: tempfile::tempdir().unwrap() }
    }

    async fn spawn(&self, desired: Desired) -> Handle {
        spawn(self.state.path().into(), desired).await.unwrap()
    }

    /// A veth into `pod`, whose other end is configured as the shim does it.
    async fn plug(&self, pod: &Namespace, last: u8) -> PodPort {
        let key = AttachmentKey::new(&format!("container-{last}"), "eth0").unwrap();
        let (host_interface, mac) = (key.host_interface(), Mac([2, 0, 0, 0, 1, last]));
        let pair = VethPair {
            name: &host_interface,
            mac: None,
            peer_name: "eth0",
            peer_mac: Some(mac),
            peer_netns: Some(pod.file.as_fd()),
            mtu: 1400,
            peer_max_segments: None,
        };
        self.netlink.create_veth(&pair).await.unwrap();
        let address = pod_ip(last);
        let alias = VethAlias { attachment: key, addresses: vec![address], pod: PodRef::default() };
        let link = self.netlink.link_by_name(&host_interface).await.unwrap();
        assert!(link.peer.is_some() && link.peer_netns.is_some(), "{link:?}");
        self.netlink.set_alias(link.index, &alias.to_string()).await.unwrap();
        pod.asynchronously(move |netlink| async move {
            let eth0 = netlink.link_by_name("eth0").await.unwrap();
            assert_eq!((eth0.mac, eth0.mtu), (Some(mac), 1400));
            netlink.add_address(eth0.index, Prefix::from(address), AddressFlags::default()).await.unwrap();
            netlink.set_up(eth0.index, true).await.unwrap();
            let to_gateway = Route::on_link(Prefix::from(gateway()), eth0.index);
            netlink.add_route(&to_gateway).await.unwrap();
            let default = Route::via("0.0.0.0/0".parse().unwrap(), gateway(), eth0.index);
            netlink.add_route(&default).await.unwrap();
        })
        .await;
        PodPort { host_interface, addresses: BTreeSet::from([address]), mac }
    }

    /// What a fresh agent would find to do.
    async fn to_do(&self, desired: &Desired) -> Vec<Change> {
        plan(desired, &self.look(desired).await)
    }

    async fn look(&self, desired: &Desired) -> Observed {
        let mut observed = observe::routing(&self.netlink).await.unwrap();
        let keys = sysctls::wanted(desired, &observed);
        observe::sysctls(&mut observed, keys.keys()).unwrap();
        observed.firewall = observe::firewall(&Nft::find().unwrap()).await.unwrap();
        observed
    }

    async fn index(&self, name: &str) -> u32 {
        self.netlink.link_by_name(name).await.unwrap().index
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs a test's body in a node's namespace.
fn in_a_node<F: Future<Output = ()>>(body: impl FnOnce() -> F + Send + 'static) {
    let node = Namespace::new();
    runtime().block_on(node.run(|| runtime().block_on(body())));
}

fn desired() -> Desired {
    let mut desired = Desired::new("10.32.0.0/12".parse().unwrap(), Mac([2, 9, 9, 9, 9, 9]), 1440);
    desired.gateways.insert(gateway());
    desired.own_ranges.insert("10.32.0.0/24".parse().unwrap());
    desired.narrow_ranges.insert("10.33.0.0/24".parse().unwrap(), 1300);
    desired
}

fn gateway() -> IpAddr {
    pod_ip(1)
}

fn pod_ip(last: u8) -> IpAddr {
    IpAddr::from([10, 32, 0, last])
}

#[test]
fn set_up_is_complete_and_the_second_time_there_is_nothing_to_do() {
    in_a_node(|| async {
        let node = Node::new().await;
        let handle = node.spawn(desired()).await;
        assert_eq!(handle.watch().borrow().error, None);
        assert_eq!(node.to_do(&desired()).await, []);
        let observed = node.look(&desired()).await;
        let routes: Vec<_> = observed.own_routes().map(Route::to_string).collect();
        assert_eq!(
            routes,
            [
                "10.32.0.0/12 dev weft0 src 10.32.0.1 proto 99",
                "unreachable 10.32.0.0/24 proto 99",
                "10.33.0.0/24 dev weft0 src 10.32.0.1 mtu 1300 proto 99",
            ]
        );
        let bridge = &observed.links["weft"];
        assert!(bridge.up && bridge.mac == Some(Mac([2, 9, 9, 9, 9, 9])) && bridge.mtu == 1440, "{bridge:?}");
        assert_eq!(observed.firewall.tables.len(), 2);
        assert_eq!(sysctl::read("net/ipv4/conf/weft/forwarding").unwrap().as_deref(), Some("1"));
        handle.update(|desired| desired.own_ranges.clear()).await.unwrap();
        assert_eq!(node.look(&desired()).await.own_routes().count(), 2);
        assert_eq!(handle.watch().borrow().repairs, 0, "own changes are no drift");
    });
}

#[test]
fn tear_down_leaves_nothing_of_ours_and_all_of_others() {
    in_a_node(|| async {
        let node = Node::new().await;
        let nft = Nft::find().unwrap();
        let pair = VethPair {
            name: "eth0",
            mac: None,
            peer_name: "far",
            peer_mac: None,
            peer_netns: None,
            mtu: 1500,
            peer_max_segments: None,
        };
        node.netlink.create_veth(&pair).await.unwrap();
        let eth0 = node.index("eth0").await;
        node.netlink.set_up(eth0, true).await.unwrap();
        let address: Prefix = "192.0.2.1/24".parse().unwrap();
        node.netlink.add_address(eth0, address, AddressFlags::default()).await.unwrap();
        let theirs = Route { protocol: 4, ..Route::on_link("10.34.0.0/24".parse().unwrap(), eth0) };
        node.netlink.add_route(&theirs).await.unwrap();
        let table =
            "table inet theirs { chain forward { type filter hook forward priority 0; policy drop; }; }";
        nft.run(table, |_| {}).await.unwrap();
        sysctl::write("net/ipv4/conf/all/send_redirects", "1").unwrap();
        let mut full = desired();
        full.underlay.insert(address.addr());
        let before = node.look(&full).await;

        let pod = Namespace::new();
        let handle = node.spawn(full.clone()).await;
        handle.attach(node.plug(&pod, 2).await).await.unwrap();
        assert_eq!(sysctl::read("net/ipv4/conf/eth0/forwarding").unwrap().as_deref(), Some("1"));
        assert_eq!(sysctl::read("net/ipv4/conf/all/send_redirects").unwrap().as_deref(), Some("0"));
        let troubles = handle.watch().borrow().troubles.clone();
        assert!(troubles.iter().any(|text| text.contains("inet theirs forward")), "{troubles:?}");
        let mut watch = handle.watch();
        drop(handle);
        while watch.changed().await.is_ok() {}
        drop(node.tun);
        remove(node.state.path(), "weft", "weft0").await.unwrap();
        let mut after = observe::routing(&node.netlink).await.unwrap();
        observe::sysctls(&mut after, before.sysctls.keys()).unwrap();
        after.firewall = observe::firewall(&nft).await.unwrap();
        let links: Vec<_> = after.links.keys().map(String::as_str).collect();
        assert_eq!(links, ["eth0", "far", "lo"]);
        assert_eq!(after.routes, before.routes);
        assert_eq!(after.firewall, before.firewall);
        assert!(!after.firewall.tables.contains_key(&Family::Inet));
        let outliving = |(key, _): &(&String, &String)| !key.contains("weft");
        let kept: Vec<_> = before.sysctls.iter().filter(outliving).collect();
        assert_eq!(after.sysctls.iter().filter(outliving).collect::<Vec<_>>(), kept);
        assert!(std::fs::read_dir(node.state.path()).unwrap().next().is_none());
    });
}

#[test]
fn a_universe_of_ipv6_is_set_up_too() {
    in_a_node(|| async {
        let node = Node::new().await;
        let mut desired = Desired::new("fd00:77::/64".parse().unwrap(), Mac([2, 9, 9, 9, 9, 9]), 1440);
        desired.gateways.insert("fd00:77::1".parse().unwrap());
        desired.own_ranges.insert("fd00:77::/120".parse().unwrap());
        desired.narrow_ranges.insert("fd00:77::100/120".parse().unwrap(), 1300);
        let pod = Namespace::new();
        let mut port = node.plug(&pod, 2).await;
        port.addresses = BTreeSet::from(["fd00:77::2".parse().unwrap()]);
        let handle = node.spawn(desired.clone()).await;
        handle.attach(port.clone()).await.unwrap();
        desired.pods.insert(port.host_interface.clone(), port);
        assert_eq!(handle.watch().borrow().error, None);
        assert_eq!(node.to_do(&desired).await, []);
        let routes: Vec<_> = node.look(&desired).await.own_routes().map(Route::to_string).collect();
        assert_eq!(
            routes,
            [
                "fd00:77::/64 dev weft0 src fd00:77::1 proto 99",
                "unreachable fd00:77::/120 proto 99",
                "fd00:77::2/128 dev weft proto 99",
                "fd00:77::100/120 dev weft0 src fd00:77::1 mtu 1300 proto 99",
            ]
        );
    });
}
