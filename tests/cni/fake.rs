//! An agent whose allocator and links are made up, for the errors that a real one can't be brought to.
//!
//! The service is the real one, and its ports are made with real netlink calls, so that the real shim can attach pods.

use crate::harness::{BRIDGE, MTU, Place, gateway, inside};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};
use tempfile::TempDir;
use tokio::{net::UnixListener, runtime::Runtime, sync::watch};
use tokio_stream::wrappers::UnixListenerStream;
use weft::{
    cni::{
        AddressError, Addresses, Allocation, Config, Node, Port, PortError, Ports, Readiness, Service, Veth,
        Wish,
    },
    linux::{
        netlink::{AddressFlags, BridgeOptions, Family, Link, Netlink, NetlinkError, Route},
        netns::Netns,
    },
    types::{AttachmentKey, Mac, Prefix},
};
use weft_proto::local::cni_server::CniServer;

/// What a test has to say about the agent, and what it may know of it.
#[derive(Debug, Default)]
pub struct State {
    pub allocations: BTreeMap<AttachmentKey, Allocation>,
    pub policy_is_late: bool,
    /// Detaching these fails.
    pub stuck: BTreeSet<AttachmentKey>,
    /// The metadata of the last call; empty before it.
    pub metadata: BTreeMap<String, String>,
}

/// A node with such an agent.
pub struct Fake {
    place: Place,
    state: Arc<Mutex<State>>,
    pub node: watch::Sender<Option<Node>>,
    pub readiness: watch::Sender<Readiness>,
    runtime: Option<Runtime>,
    _directory: TempDir,
}

#[derive(Clone)]
struct Book(Arc<Mutex<State>>);

#[derive(Clone)]
struct Wires {
    state: Arc<Mutex<State>>,
    netlink: Netlink,
    bridge: u32,
}

impl Fake {
    pub fn start() -> Self {
        let netns = Netns::create().expect("these tests make network namespaces: run them as root");
        let bridge_mac = Mac::derived(b"bridge");
        inside(&netns, async |netlink: Netlink| {
            netlink.create_bridge(BRIDGE, bridge_mac, MTU.into(), BridgeOptions::default()).await.unwrap();
            let bridge = netlink.link_by_name(BRIDGE).await.unwrap().index;
            netlink.add_address(bridge, Prefix::from(gateway()), AddressFlags::default()).await.unwrap();
            netlink.set_up(bridge, true).await.unwrap();
        });
        let directory = tempfile::Builder::new().prefix("weft-cni-test-").tempdir().unwrap();
        let place = Place::new(netns, directory.path().into());
        let state = Arc::<Mutex<State>>::default();
        let facts = Node { bridge: BRIDGE.into(), bridge_mac, gateways: vec![gateway()], mtu: MTU };
        let (node, watched_node) = watch::channel(Some(facts));
        let (readiness, watched_readiness) = watch::channel(Readiness::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let netlink = place.node().enter(|| {
            let _inside = handle.enter();
            Netlink::open().unwrap()
        });
        let netlink = netlink.unwrap();
        runtime.block_on(async {
            let bridge = netlink.link_by_name(BRIDGE).await.unwrap().index;
            let wires = Wires { state: state.clone(), netlink, bridge };
            let config = Config { run_dir: directory.path().into(), socket: place.socket(), conf_dir: None };
            let service =
                Service::new(config, Book(state.clone()), wires, watched_node, watched_readiness).unwrap();
            tokio::spawn(service.clone().run());
            let listener = UnixListener::bind(place.socket()).unwrap();
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
        });
        Self { place, state, node, readiness, runtime: Some(runtime), _directory: directory }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Neither addresses nor links are left.
    #[track_caller]
    pub fn is_clean(&self) {
        assert_eq!(self.veths(), []);
        assert!(self.state().allocations.is_empty(), "{:?}", self.state().allocations);
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // Its blocking threads watch directories for ever.
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Deref for Fake {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

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
        let taken: BTreeSet<IpAddr> = state.allocations.values().flat_map(|a| a.addresses.clone()).collect();
        let mut all = (2..=60).map(|last| IpAddr::from([10, 32, 0, last]));
        let free = all.find(|address| !taken.contains(address));
        let address = free.ok_or_else(|| AddressError::Full("all 59 addresses are taken".into()))?;
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
        if self.state.lock().unwrap().policy_is_late {
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
        let veth = |link: Link| {
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
