//! Gathers what the agent shows of itself.

use super::steering::Steered;
use crate::{
    admin::{
        Counters, Encryption, Observe, Path, PeerView, PodView, RangeView, Readiness, Snapshot, Traffic,
    },
    config::Config,
    datapath::{
        self,
        path::{View as PathView, Views, Way},
        path_task,
        session_task::Refusals,
        sessions::Sessions,
        task::Reader,
    },
    identity,
    ipam::{Owner, View},
    links,
    mesh::{
        machine,
        peers::{PeerRecord, PeerSet},
    },
    policy,
    types::{Incarnation, PeerName, Prefix},
};
use arc_swap::ArcSwap;
use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};
use tokio::sync::watch;

/// Where it all comes from: what is read never waits.
pub struct Sources {
    pub config: Config,
    pub incarnation: Incarnation,
    pub started: Instant,
    /// None: links are in clear.
    pub identity: Option<identity::task::Current>,
    pub view: watch::Receiver<Arc<View>>,
    pub peers: watch::Receiver<Arc<PeerSet>>,
    pub steered: watch::Receiver<Arc<Steered>>,
    pub packets: Reader,
    /// None: packets go in clear.
    pub sessions: Option<Arc<ArcSwap<Sessions>>>,
    /// Handshake messages of no use; none where packets go in clear.
    pub refusals: Option<Refusals>,
    pub views: watch::Receiver<Arc<Views>>,
    pub probes: path_task::Passed,
    pub readiness: Readiness,
    pub links: watch::Receiver<links::Status>,
    pub cni_warnings: watch::Receiver<Vec<String>>,
    /// None: network policies are not enforced.
    pub policies: Option<watch::Receiver<Arc<policy::Status>>>,
    /// Why the cluster cannot be heard; none outside of one.
    pub cluster: Option<watch::Receiver<Option<String>>>,
}

impl Observe for Sources {
    fn snapshot(&self) -> Snapshot {
        let view = self.view.borrow().clone();
        let peers = self.peers.borrow().clone();
        let mesh = self.steered.borrow().mesh.clone();
        let packets = self.packets.read();
        let linked: BTreeSet<_> = mesh
            .iter()
            .flat_map(|mesh| &mesh.links)
            .filter_map(|link| Some(link.peer.as_ref()?.0.clone()))
            .collect();
        Snapshot {
            name: self.config.name.clone(),
            incarnation: self.incarnation,
            software: crate::SOFTWARE.into(),
            uptime: self.started.elapsed(),
            universe: self.config.universe,
            endpoints: peers.own().endpoints.clone(),
            encryption: match self.sessions {
                Some(_) => Encryption::Required,
                None => Encryption::Off,
            },
            not_ready: self.readiness.reasons(),
            warnings: self.warnings(&view, &peers),
            mtu: self.config.mtu,
            bridge_address: view.bridge,
            peers: peer_views(&peers, &linked, &self.views.borrow(), &packets),
            ranges: range_views(&view, &self.config.name),
            addresses_free: view.counts.free,
            waiting_for: view.waiting_for.as_ref().map(ToString::to_string),
            pods: pod_views(&view),
            traffic: traffic(packets.sent, packets.received),
            relayed: {
                let probes = self.probes.relayed();
                (packets.relayed.packets + probes.packets, packets.relayed.bytes + probes.bytes)
            },
            drops: self.drops(&packets),
            gossip: mesh.map(|mesh| gossip(&mesh.counters)).unwrap_or_default(),
            repairs: self.links.borrow().repairs,
        }
    }
}

impl Sources {
    fn warnings(&self, view: &View, peers: &PeerSet) -> Vec<String> {
        let mut warnings = self.cni_warnings.borrow().clone();
        warnings.extend(self.cluster.iter().filter_map(|trouble| trouble.borrow().clone()));
        warnings.extend(self.unsealed(peers));
        let policies = self.policies.iter().filter_map(|status| status.borrow().error.clone());
        warnings.extend(policies.map(|error| format!("network policies are not in force: {error}")));
        match &self.identity {
            Some(current) => warnings.extend(current.borrow().warnings(SystemTime::now())),
            None => warnings.push(INSECURE.into()),
        }
        let mesh = self.steered.borrow().mesh.clone();
        let troubles = mesh.iter().flat_map(|mesh| &mesh.troubles);
        warnings.extend(troubles.map(|trouble| format!("peer {}: {}", trouble.target, trouble.reason)));
        let refusals = mesh.iter().flat_map(|mesh| &mesh.refusals);
        warnings.extend(refusals.map(|(who, what)| format!("{who} {what}")));
        warnings.extend(self.views.borrow().iter().filter_map(|(name, path)| match &path.way {
            Way::Direct => None,
            Way::Relayed(relay) => {
                Some(format!("peer {name} does not answer directly; packets go via {relay}"))
            }
            Way::Down(why) => Some(format!("peer {name} cannot be reached: {why}")),
        }));
        if !view.held.is_empty() {
            let held: Vec<_> = view.held.iter().map(IpAddr::to_string).collect();
            warnings
                .push(format!("these addresses are in use here, but belong to others: {}", held.join(", ")));
        }
        if !view.conceded.is_empty() {
            let conceded: Vec<_> = view.conceded.iter().map(IpAddr::to_string).collect();
            warnings
                .push(format!("peers use these addresses of this node's ranges: {}", conceded.join(", ")));
        }
        warnings
    }
}

impl Sources {
    /// Packets and handshake messages, by reason.
    fn drops(&self, packets: &datapath::Snapshot) -> Counters {
        let probes = self.probes.drops();
        let packets = packets.drops.iter();
        let packets = packets.map(|(drop, count)| (drop.as_str(), *count + probes[drop]));
        let refusals = self.refusals.iter().flat_map(Refusals::read);
        let refusals = refusals.map(|(refusal, count)| (refusal.as_str(), count));
        packets.chain(refusals).map(|(reason, count)| (reason.to_string(), count)).collect()
    }

    /// Peers with which no packets are exchanged, for want of keys.
    fn unsealed(&self, peers: &PeerSet) -> Vec<String> {
        let Some(sessions) = &self.sessions else {
            let sealed = peers.others().filter(|record| record.data_key.is_some());
            let warning = |record: &Arc<PeerRecord>| {
                format!(
                    "peer {} requires encryption, which is off here: no packets are exchanged",
                    record.name
                )
            };
            return sealed.map(warning).collect();
        };
        let clear = peers.others().filter(|record| record.data_key.is_none()).map(|record| {
            format!(
                "peer {} has encryption off, which is required here: no packets are exchanged",
                record.name
            )
        });
        let sessions = sessions.load();
        let silent = sessions.unanswered().iter().map(|(peer, since)| {
            format!(
                "peer {peer} answers no handshake since {} s: is its UDP port open?",
                since.elapsed().as_secs()
            )
        });
        clear.chain(silent).collect()
    }
}

fn peer_views(
    peers: &PeerSet,
    linked: &BTreeSet<PeerName>,
    paths: &Views,
    packets: &datapath::Snapshot,
) -> Vec<PeerView> {
    let own = &peers.own().name;
    let view = |record: &Arc<PeerRecord>| {
        let carried = packets.peers.get(&record.name).copied().unwrap_or_default();
        let path = paths.get(&record.name);
        PeerView {
            name: record.name.clone(),
            endpoints: record.endpoints.clone(),
            software: record.software.clone(),
            linked: linked.contains(&record.name),
            path: if record.name == *own { Path::Local } else { path.map_or(Path::Direct, shown) },
            rtt: path.and_then(|path| path.rtt),
            loss: path.map(|path| path.loss),
            mtu: path.and_then(|path| path.mtu).unwrap_or(record.mtu),
            traffic: traffic(carried.sent, carried.received),
        }
    };
    peers.iter().map(view).collect()
}

fn shown(view: &PathView) -> Path {
    match &view.way {
        Way::Direct => Path::Direct,
        Way::Relayed(relay) => Path::Relayed(relay.clone()),
        Way::Down(why) => Path::Down((*why).into()),
    }
}

fn range_views(view: &View, own: &PeerName) -> Vec<RangeView> {
    let within = |prefix: &Prefix, address: &&IpAddr| prefix.contains(*address);
    let range = |(prefix, owner): &(Prefix, PeerName)| {
        let mine = owner == own;
        let count = |addresses: &mut dyn Iterator<Item = &IpAddr>| {
            if mine { addresses.filter(|address| within(prefix, address)).count() as u64 } else { 0 }
        };
        RangeView {
            prefix: *prefix,
            owner: owner.clone(),
            allocated: count(&mut view.allocations.keys()),
            resting: count(&mut view.resting.iter()),
        }
    };
    view.ranges.iter().map(range).collect()
}

fn pod_views(view: &View) -> Vec<PodView> {
    let pod = |(address, allocation): (&IpAddr, &Arc<crate::ipam::Allocation>)| {
        let Owner::Pod(attachment) = &allocation.owner else { return None };
        Some(PodView {
            attachment: attachment.clone(),
            pod: allocation.pod.clone(),
            addresses: vec![*address],
            active: !view.reserved.contains(attachment),
        })
    };
    view.allocations.iter().filter_map(pod).collect()
}

fn traffic(sent: datapath::Traffic, received: datapath::Traffic) -> Traffic {
    Traffic {
        packets_sent: sent.packets,
        bytes_sent: sent.bytes,
        packets_received: received.packets,
        bytes_received: received.bytes,
    }
}

fn gossip(counters: &machine::Counters) -> Counters {
    let sum = |by_reason: &std::collections::BTreeMap<&'static str, u64>| by_reason.values().sum();
    [
        ("frames_received", counters.frames_in),
        ("frames_sent", counters.frames_out),
        ("bytes_received", counters.bytes_in),
        ("bytes_sent", counters.bytes_out),
        ("items_received", counters.items_in),
        ("items_merged", counters.items_merged),
        ("items_rejected", sum(&counters.items_rejected)),
        ("items_forged", counters.items_rejected.get("forged").copied().unwrap_or_default()),
        ("links_opened", counters.links_opened),
        ("links_garbage", counters.links_garbage),
        ("links_refused", sum(&counters.links_refused)),
        ("unicasts_delivered", counters.unicasts_delivered),
        ("unicasts_relayed", counters.unicasts_relayed),
        ("unicasts_dropped", sum(&counters.unicasts_dropped)),
        ("frames_dropped", sum(&counters.frames_dropped)),
    ]
    .into_iter()
    .map(|(name, count)| (name.to_string(), count))
    .collect()
}

const INSECURE: &str =
    "run with --insecure: control links are in clear, and whoever reaches the control port can be any node";
