//! Keeps forwarding table, links, own record and readiness in step with peers and ring.

use super::{
    alive::alive,
    beginning::bridge_mac,
    forwarding::{Forwarding, Node, Reach},
};
use crate::{
    admin::{Heartbeat, Pending, Readiness},
    cni,
    config::Config,
    datapath::{
        handshake,
        path::{self, Views},
        table::{Peer, Table},
    },
    ipam::{KnownPeer, View, WaitingFor, task::Handle as Ipam},
    links::{self, Desired},
    mesh::{
        dial::Target,
        peers::{Neighbour, PeerRecord, PeerSet},
        task::{Handle as Mesh, Status as MeshStatus},
    },
    types::{BRIDGE, DataId, Incarnation, PeerName, Prefix},
};
use anyhow::Context;
use arc_swap::ArcSwap;
use std::{
    collections::{BTreeMap, BTreeSet},
    future,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, time};
use tracing::warn;

/// What is in force now.
#[derive(Clone, Debug, Default)]
pub struct Steered {
    /// Addresses for which the data path takes packets.
    pub local: BTreeSet<IpAddr>,
    pub mesh: Option<MeshStatus>,
}

pub struct State {
    node: Node,
    mesh: Mesh,
    ipam: Ipam,
    links: links::Handle,
    readiness: Readiness,
    tables: Arc<ArcSwap<Table>>,
    sealing: watch::Sender<Vec<handshake::Peer>>,
    probed: watch::Sender<path::Inputs>,
    views: watch::Receiver<Arc<Views>>,
    /// When round-trip times were published last only because they had changed.
    timed: Option<Instant>,
    /// As they were when the table was made last.
    peers: Arc<[Peer]>,
    known: Vec<KnownPeer>,
    followed: Option<Followed>,
    guards: BTreeMap<String, Pending>,
    /// Until it has been judged for the first time whether ADD would work.
    starting: Option<Pending>,
    steered: watch::Sender<Arc<Steered>>,
    cni_node: watch::Sender<Option<cni::Node>>,
    cni_readiness: watch::Sender<cni::Readiness>,
    bridge: cni::Node,
}

/// What follows the peers, and what is known of the ways to them.
pub struct Ways {
    pub tables: Arc<ArcSwap<Table>>,
    pub sealing: watch::Sender<Vec<handshake::Peer>>,
    pub probed: watch::Sender<path::Inputs>,
    pub views: watch::Receiver<Arc<Views>>,
}

/// Bridge address, own ranges, and narrow ranges with their MTU.
type Followed = (Option<IpAddr>, Vec<Prefix>, BTreeMap<Prefix, u32>);

/// Makes what is desired follow the ring.
pub fn follow(desired: &mut Desired, view: &View, narrow: &BTreeMap<Prefix, u32>) {
    desired.gateways = view.bridge.into_iter().collect();
    desired.own_ranges = view.own.iter().copied().collect();
    desired.narrow_ranges.clone_from(narrow);
}

impl State {
    pub fn new(
        config: &Config,
        mesh: &Mesh,
        ipam: &Ipam,
        links: &links::Handle,
        (readiness, starting): (&Readiness, Pending),
        ways: Ways,
    ) -> Self {
        let Ways { tables, sealing, probed, views } = ways;
        let listen = config.listen.ip();
        Self {
            node: Node {
                universe: config.universe,
                mtu: config.mtu,
                ipv6: listen.is_ipv6(),
                ipv4: listen.is_ipv4() || listen.is_unspecified(),
            },
            mesh: mesh.clone(),
            ipam: ipam.clone(),
            links: links.clone(),
            readiness: readiness.clone(),
            tables,
            sealing,
            probed,
            views,
            timed: None,
            peers: Arc::default(),
            known: Vec::new(),
            followed: None,
            guards: BTreeMap::new(),
            starting: Some(starting),
            steered: watch::Sender::default(),
            cni_node: watch::Sender::new(None),
            cni_readiness: watch::Sender::new(cni::Readiness {
                reasons: vec!["the agent is starting".into()],
                impaired: false,
            }),
            bridge: cni::Node {
                bridge: BRIDGE.into(),
                bridge_mac: bridge_mac(config),
                gateways: Vec::new(),
                mtu: config.mtu,
            },
        }
    }

    pub fn steered(&self) -> watch::Receiver<Arc<Steered>> {
        self.steered.subscribe()
    }

    /// What pods are told; none until the bridge has its address.
    pub fn node(&self) -> watch::Receiver<Option<cni::Node>> {
        self.cni_node.subscribe()
    }

    pub fn cni_readiness(&self) -> watch::Receiver<cni::Readiness> {
        self.cni_readiness.subscribe()
    }

    /// Runs until one of the subjects has stopped.
    pub async fn run(mut self, heartbeat: Heartbeat, now: fn() -> Instant) -> anyhow::Result<()> {
        let (mut peers, mut view, mut links) = (self.mesh.peers(), self.ipam.view(), self.links.watch());
        let mut readiness = self.readiness.subscribe();
        let mut tick = time::interval(TICK);
        loop {
            heartbeat.tick(now());
            let (set, ring) = (peers.borrow_and_update().clone(), view.borrow_and_update().clone());
            self.steer(&set, &ring, now()).await?;
            // Before it is judged, or what changes meanwhile is not seen until the next tick.
            readiness.mark_unchanged();
            self.judge(&ring, &links.borrow_and_update().clone());
            self.starting = None;
            tokio::select! {
                Ok(()) = peers.changed() => {}
                Ok(()) = self.views.changed() => {}
                changed = view.changed() => changed.context("the allocator has stopped")?,
                changed = links.changed() => changed.context("links are no longer kept up")?,
                changed = readiness.changed() => changed.context("nobody asks for readiness")?,
                _ = tick.tick() => {}
            }
        }
    }

    async fn steer(&mut self, set: &PeerSet, view: &View, now: Instant) -> anyhow::Result<()> {
        // Why the mesh has stopped (we left, or must not run) the switchboard knows and says: nothing may say less first.
        let Ok(status) = self.mesh.status().await else { return future::pending().await };
        let linked: BTreeSet<PeerName> =
            status.links.iter().filter_map(|link| Some(link.peer.as_ref()?.0.clone())).collect();
        let reachable = alive(set, Some(&status));
        let troubled = status.troubles.iter().filter_map(|trouble| match &trouble.target {
            Target::Peer(name) => Some(name.clone()),
            Target::Bootstrap(_) | Target::Twin => None,
        });
        let neighbours = linked.iter().cloned().chain(troubled).collect();
        let views = self.views.borrow_and_update().clone();
        let reach = Reach { by_gossip: &reachable, neighbours: &neighbours, views: &views };
        let Forwarding { mut table, narrow, known, sealing, paths } =
            Forwarding::new(self.node, set, reach, view);
        // The workers count by place in this list.
        match table.peers == self.peers {
            true => table.peers = self.peers.clone(),
            false => self.peers = table.peers.clone(),
        }
        replace(&self.sealing, sealing);
        let local = table.pods.iter().chain(&table.bridge).copied().collect();
        self.tables.store(Arc::new(Table::new(table)));
        // After the table: a relay's probes are not to come before it knows them.
        replace(&self.probed, paths);
        self.steered.send_replace(Arc::new(Steered { local, mesh: Some(status) }));
        self.publish(set, view, &views, now).await;
        if known != self.known {
            self.ipam.peers(known.clone()).await?;
            self.known = known;
        }
        let follows = Some((view.bridge, view.own.clone(), narrow.clone()));
        if follows != self.followed {
            self.followed = follows;
            let view = view.clone();
            if let Err(error) = self.links.update(move |desired| follow(desired, &view, &narrow)).await {
                warn!(%error, "links do not follow the ring yet; they try again");
            }
        }
        Ok(())
    }

    /// Keeps the own record's share of the ring true, and who answers us; and its data id different from everybody else's.
    async fn publish(&mut self, set: &PeerSet, view: &View, views: &Views, now: Instant) {
        let (own, held, digest) = (set.own(), view.held.clone(), ranges_digest(&view.own));
        let conceded: Vec<_> = view.conceded.iter().copied().collect();
        let elder = |incarnation: Incarnation| incarnation < own.incarnation;
        let clash = set.others().any(|record| record.data_id == own.data_id && elder(record.incarnation));
        let neighbours = measured(own, views);
        let differs = |far: bool| {
            let pairs = neighbours.iter().zip(&own.neighbours);
            pairs.into_iter().any(|(now, told)| match (now.rtt, told.rtt) {
                (Some(now), Some(told)) => far && is_far(now, told),
                (now, told) => now.is_some() != told.is_some(),
            })
        };
        let rested = self.timed.is_none_or(|last| now.duration_since(last) >= TIMED);
        let retime = differs(rested);
        let (deaths, absent) = (view.deaths_digest, view.absent.clone());
        let news =
            own.deaths_digest != deaths || own.absent != absent || own.ranges_digest != digest || retime;
        let bridge = view.bridge;
        if clash || own.held != held || own.conceded != conceded || own.bridge != bridge || news {
            if retime {
                self.timed = Some(now);
            }
            let update = move |record: &mut PeerRecord| {
                record.held = held;
                record.conceded = conceded;
                record.bridge = bridge;
                record.ranges_digest = digest;
                record.deaths_digest = deaths;
                record.absent = absent;
                if retime {
                    record.neighbours = neighbours;
                }
                if clash {
                    record.data_id = DataId(rand::random());
                }
            };
            let _ = self.mesh.update_record(update).await;
        }
    }

    /// Whether ADD would work, and what pods are told.
    fn judge(&mut self, view: &View, links: &links::Status) {
        let mut reasons: Vec<String> = Vec::new();
        match (&view.waiting_for, view.own.is_empty()) {
            (Some(waiting), true) | (Some(waiting @ WaitingFor::Return { .. }), _) => {
                reasons.push(format!("no addresses to hand out: waiting for {waiting}"))
            }
            (None, true) => reasons.push("no addresses to hand out yet".into()),
            _ if view.bridge.is_none() => reasons.push("no address is free for the bridge".into()),
            _ => {}
        }
        reasons.extend(links.error.clone());
        reasons.extend(links.troubles.iter().cloned());
        self.guards.retain(|reason, _| reasons.contains(reason));
        for reason in &reasons {
            let guard = || self.readiness.pending(reason);
            self.guards.entry(reason.clone()).or_insert_with(guard);
        }
        let gateways: Vec<_> = view.bridge.into_iter().collect();
        let node = (!gateways.is_empty()).then(|| cni::Node { gateways, ..self.bridge.clone() });
        replace(&self.cni_node, node);
        let impaired = links.error.is_some() || !links.troubles.is_empty();
        let ready = cni::Readiness { reasons: self.readiness.reasons(), impaired };
        replace(&self.cni_readiness, ready);
    }
}

/// Tells of a value that is another one.
fn replace<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|told| {
        let changed = *told != value;
        *told = value;
        changed
    });
}

/// The own neighbours with the round trips of those who answer now.
fn measured(own: &PeerRecord, views: &Views) -> Vec<Neighbour> {
    let rtt = |name: &PeerName| views.get(name).and_then(|view| view.direct);
    own.neighbours.iter().map(|n| Neighbour { name: n.name.clone(), rtt: rtt(&n.name) }).collect()
}

/// Whether a round trip has changed so much that packets might better go another way.
fn is_far(a: Duration, b: Duration) -> bool {
    let (less, more) = (a.min(b), a.max(b));
    more > 2 * less && more - less > Duration::from_millis(5)
}

/// Tells one set of ranges from another.
fn ranges_digest(own: &[Prefix]) -> u64 {
    use siphasher::sip::SipHasher13;
    use std::hash::{Hash, Hasher};
    let mut hash = SipHasher13::new();
    own.hash(&mut hash);
    hash.finish()
}

/// How often other round trips than before are published: who is idle has nothing to say.
const TIMED: Duration = Duration::from_secs(10);
/// Proof of life, and the age of what is shown of control links at most.
const TICK: Duration = Duration::from_secs(2);
