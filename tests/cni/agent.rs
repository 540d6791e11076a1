//! The agent's side for these tests: the real service; its addresses from a book in memory, its ports made with
//! real netlink calls in the node's namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};
use tokio::{net::UnixListener, runtime::Runtime, sync::watch};
use tokio_stream::wrappers::UnixListenerStream;
use weft::{
    cni::{
        AddressError, Addresses, Allocation, Config, Node, Port, PortError, Ports, Readiness, Service, Veth,
        Wish,
    },
    linux::{
        netlink::{Family, Netlink, NetlinkError, Route},
        netns::Netns,
    },
    types::{AttachmentKey, Mac, Prefix},
};
use weft_proto::local::cni_server::CniServer;

/// What outlives an agent: its store, and what a test has to say about it.
#[derive(Debug, Default)]
pub struct State {
    pub allocations: BTreeMap<AttachmentKey, Allocation>,
    /// Attaching fails.
    pub kernel_refuses: bool,
    pub policy_is_late: bool,
    /// Detaching these fails.
    pub stuck: BTreeSet<AttachmentKey>,
    /// The metadata of the last call.
    pub metadata: BTreeMap<String, String>,
}

/// A running agent.
pub struct Agent {
    runtime: Runtime,
    pub node: watch::Sender<Option<Node>>,
    pub readiness: watch::Sender<Readiness>,
    pub warnings: watch::Receiver<Vec<String>>,
}

#[derive(Clone)]
struct Book(Arc<Mutex<State>>);

#[derive(Clone)]
struct Wires {
    state: Arc<Mutex<State>>,
    netlink: Netlink,
    bridge: u32,
}

impl Agent {
    /// Serves on `socket` until it is dropped.
    pub fn start(
        netns: &Netns,
        run_dir: &Path,
        socket: &Path,
        conf_dir: Option<&Path>,
        state: &Arc<Mutex<State>>,
        facts: Option<Node>,
        ready: Readiness,
    ) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (node, watched_node) = watch::channel(facts);
        let (readiness, watched_readiness) = watch::channel(ready);
        let handle = runtime.handle().clone();
        let netlink = netns
            .enter(|| {
                let _inside = handle.enter();
                Netlink::open().unwrap()
            })
            .unwrap();
        let warnings = runtime.block_on(async {
            let bridge = netlink.link_by_name(BRIDGE).await.unwrap().index;
            let wires = Wires { state: state.clone(), netlink, bridge };
            let config =
                Config { run_dir: run_dir.into(), socket: socket.into(), conf_dir: conf_dir.map(Into::into) };
            let service =
                Service::new(config, Book(state.clone()), wires, watched_node, watched_readiness).unwrap();
            let warnings = service.warnings();
            tokio::spawn(service.clone().run());
            let listener = UnixListener::bind(socket).unwrap();
            let state = state.clone();
            let recorded = CniServer::with_interceptor(service, move |request: tonic::Request<()>| {
                let ascii = request.metadata().iter().filter_map(|pair| match pair {
                    tonic::metadata::KeyAndValueRef::Ascii(key, value) => {
                        Some((key.to_string(), value.to_str().ok()?.to_string()))
                    }
                    tonic::metadata::KeyAndValueRef::Binary(..) => None,
                });
                state.lock().unwrap().metadata = ascii.collect();
                Ok(request)
            });
            let server = tonic::transport::Server::builder().add_service(recorded);
            tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
            warnings
        });
        Self { runtime, node, readiness, warnings }
    }

    /// As a process that is killed: nothing is said to anybody.
    pub fn kill(self, socket: &Path) {
        self.runtime.shutdown_background();
        std::fs::remove_file(socket).unwrap();
    }
}

pub const BRIDGE: &str = "weft";

pub fn bridge_mac() -> Mac {
    Mac::derived(b"bridge")
}

pub fn gateway() -> IpAddr {
    IpAddr::from([10, 32, 0, 1])
}

/// Last bytes of what can be handed out.
const POOL: std::ops::RangeInclusive<u8> = 2..=60;

impl Book {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Addresses for Book {
    async fn reserve(&self, wish: Wish) -> Result<Allocation, AddressError> {
        let mut state = self.state();
        if let Some(known) = state.allocations.get(&wish.attachment) {
            return Ok(known.clone());
        }
        let universe: Prefix = "10.32.0.0/26".parse().unwrap();
        if let Some(outside) = wish.addresses.iter().find(|ip| !universe.contains(*ip)) {
            return Err(AddressError::Refused(format!("ips {outside} is outside the universe {universe}")));
        }
        let taken: BTreeSet<IpAddr> = state.allocations.values().flat_map(|a| a.addresses.clone()).collect();
        let mut free = POOL.map(|last| IpAddr::from([10, 32, 0, last])).filter(|ip| !taken.contains(ip));
        let address = match wish.addresses.first() {
            Some(ip) if taken.contains(ip) => {
                return Err(AddressError::Taken(format!("address {ip} is taken")));
            }
            Some(ip) => *ip,
            None if wish.ranges.is_empty() => free
                .next()
                .ok_or_else(|| AddressError::Full(format!("{universe} is full: node-1 has 59 of 59")))?,
            None => free
                .find(|ip| wish.ranges.iter().any(|range| range.contains(ip)))
                .ok_or_else(|| AddressError::Taken(format!("nothing is free in {:?}", wish.ranges)))?,
        };
        let allocation = Allocation {
            attachment: wish.attachment.clone(),
            pod: wish.pod,
            addresses: vec![address],
            mac: wish.mac,
            reserved: SystemTime::now(),
        };
        state.allocations.insert(wish.attachment, allocation.clone());
        Ok(allocation)
    }

    async fn activated(&self, key: &AttachmentKey) -> Result<bool, AddressError> {
        Ok(self.state().allocations.contains_key(key))
    }

    async fn release(&self, key: &AttachmentKey) -> Result<(), AddressError> {
        self.state().allocations.remove(key);
        Ok(())
    }

    async fn allocations(&self) -> Result<Vec<Allocation>, AddressError> {
        Ok(self.state().allocations.values().cloned().collect())
    }
}

impl Ports for Wires {
    async fn attach(&self, port: Port) -> Result<(), PortError> {
        let (refused, late) = {
            let state = self.state.lock().unwrap();
            (state.kernel_refuses, state.policy_is_late)
        };
        if refused {
            return Err(PortError::Kernel(format!("make {} a port: EBUSY", port.host_interface)));
        }
        if late {
            return Err(PortError::Policy("policy was not in force after 10 s".into()));
        }
        let attach = async {
            let link = self.netlink.link_by_name(&port.host_interface).await?.index;
            self.netlink.set_master(link, Some(self.bridge)).await?;
            self.netlink.set_up(link, true).await?;
            for address in &port.addresses {
                self.netlink.replace_route(&Route::on_link(Prefix::from(*address), self.bridge)).await?;
            }
            Ok(())
        };
        attach.await.map_err(|error: NetlinkError| PortError::Kernel(error.to_string()))
    }

    async fn detach(&self, key: &AttachmentKey) -> Result<(), PortError> {
        let addresses = {
            let state = self.state.lock().unwrap();
            if state.stuck.contains(key) {
                return Err(PortError::Kernel(format!("delete {}: EBUSY", key.host_interface())));
            }
            state.allocations.get(key).map(|a| a.addresses.clone()).unwrap_or_default()
        };
        let gone = |done: Result<(), NetlinkError>| match done {
            Err(error) if !error.is_gone() => Err(PortError::Kernel(error.to_string())),
            _ => Ok(()),
        };
        for address in addresses {
            gone(self.netlink.delete_route(&Route::on_link(Prefix::from(address), self.bridge)).await)?;
        }
        match self.netlink.link_by_name(&key.host_interface()).await {
            Ok(link) => gone(self.netlink.delete_link(link.index).await),
            Err(error) => gone(Err(error)),
        }
    }

    async fn veths(&self) -> Result<Vec<Veth>, PortError> {
        let kernel = |error: NetlinkError| PortError::Kernel(error.to_string());
        let routes = self.netlink.routes(Family::V4).await.map_err(kernel)?;
        let on_bridge = routes.into_iter().filter(|route| route.link == Some(self.bridge));
        let routes: Vec<_> = on_bridge.map(|route| route.destination).collect();
        let links = self.netlink.links().await.map_err(kernel)?;
        let veth = |link: weft::linux::netlink::Link| {
            Some(Veth {
                alias: link.alias?.parse().ok()?,
                host_interface: link.name,
                up: link.up,
                on_bridge: link.master == Some(self.bridge),
                routes: routes.clone(),
            })
        };
        Ok(links.into_iter().filter_map(veth).collect())
    }
}
