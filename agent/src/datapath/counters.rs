//! What was carried and what was dropped, and why.
//!
//! Each worker writes only its own counters, so that no two cores fight over a cache line; reading sums them.
//! The peers' are found by name, so that they outlive a change of the table.

use super::table::Peer;
use crate::types::PeerName;
use dashmap::DashMap;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// Why a packet went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drop {
    /// From the underlay: no header, or not exactly one IP packet behind it. From the TUN: no IP packet.
    Malformed,
    UnknownVersion,
    UnknownKind,
    /// In clear, where encryption is required.
    Clear,
    /// Sealed, where encryption is off.
    Sealed,
    /// Out: no key is agreed with the peer yet. In: of no session of ours.
    NoSession,
    /// It does not open: changed on its way, or sealed by somebody else.
    Forged,
    /// It came before, or too late to tell.
    Replayed,
    /// A handshake's message, while too many of them wait.
    Handshake,
    /// Nobody has the sender's data id.
    UnknownPeer,
    /// The inner source does not live on the peer that sent it.
    SpoofedSource,
    /// It came from a peer for an address that does not live here.
    NotLocal,
    /// Multicast, broadcast, loopback and the like don't leave their node.
    Martian,
    /// Nobody owns the destination; or we do, but no pod has it.
    NoRoute,
    /// No underlay address is known of the destination's peer.
    NoEndpoint,
    TooBig,
    /// To be relayed, but not from one peer of ours to another.
    RelayUnknown,
    /// To be relayed once more than is allowed: its way is a circle.
    RelayExpired,
    /// To be relayed, but there is no way on, or only back.
    RelayNoWay,
    /// A probe or an answer to one: of nobody whom we know, forged, or not asked for.
    Probe,
    /// The kernel had no room for it.
    SendBufferFull,
    /// The kernel refused to send it: no route to the endpoint, a firewall.
    SendRefused,
    /// The kernel did not take it at the TUN.
    TunWrite,
    /// Out: the TUN's queue was full; since the device was made.
    TunQueueFull,
    /// In: a socket's buffer was full.
    ReceiveBufferFull,
}

/// A reading of all counters, summed over the workers. Each only ever grows. A peer that left the table is forgotten
/// once every worker has seen that; should it come back, it begins at 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// From the TUN to the underlay, inner packets and their bytes.
    pub sent: Traffic,
    /// From the underlay to the TUN.
    pub received: Traffic,
    /// Between other nodes, by way of this one; datagrams and their bytes.
    pub relayed: Traffic,
    /// Answers to packets that could not be carried.
    pub icmp_errors: u64,
    /// Every reason, also where nothing was dropped.
    pub drops: BTreeMap<Drop, u64>,
    pub peers: BTreeMap<PeerName, PeerTraffic>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerTraffic {
    pub sent: Traffic,
    pub received: Traffic,
}

impl Drop {
    pub const ALL: [Self; 25] = [
        Self::Malformed,
        Self::UnknownVersion,
        Self::UnknownKind,
        Self::Clear,
        Self::Sealed,
        Self::NoSession,
        Self::Forged,
        Self::Replayed,
        Self::Handshake,
        Self::UnknownPeer,
        Self::SpoofedSource,
        Self::NotLocal,
        Self::Martian,
        Self::NoRoute,
        Self::NoEndpoint,
        Self::TooBig,
        Self::RelayUnknown,
        Self::RelayExpired,
        Self::RelayNoWay,
        Self::Probe,
        Self::SendBufferFull,
        Self::SendRefused,
        Self::TunWrite,
        Self::TunQueueFull,
        Self::ReceiveBufferFull,
    ];

    /// Its name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnknownVersion => "unknown_version",
            Self::UnknownKind => "unknown_kind",
            Self::Clear => "clear",
            Self::Sealed => "sealed",
            Self::NoSession => "no_session",
            Self::Forged => "forged",
            Self::Replayed => "replayed",
            Self::Handshake => "handshake",
            Self::UnknownPeer => "unknown_peer",
            Self::SpoofedSource => "spoofed_source",
            Self::NotLocal => "not_local",
            Self::Martian => "martian",
            Self::NoRoute => "no_route",
            Self::NoEndpoint => "no_endpoint",
            Self::TooBig => "too_big",
            Self::RelayUnknown => "relay_unknown_peer",
            Self::RelayExpired => "relay_expired",
            Self::RelayNoWay => "relay_no_way",
            Self::Probe => "probe",
            Self::SendBufferFull => "send_buffer_full",
            Self::SendRefused => "send_refused",
            Self::TunWrite => "tun_write",
            Self::TunQueueFull => "tun_queue_full",
            Self::ReceiveBufferFull => "receive_buffer_full",
        }
    }
}

/// All workers' counters.
pub(super) struct Counters {
    workers: Box<[WorkerCounters]>,
    peers: DashMap<PeerName, Arc<[PeerCounters]>>,
}

impl Counters {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers: (0..workers).map(|_| WorkerCounters::default()).collect(), peers: DashMap::new() }
    }

    pub(super) fn worker(&self, worker: usize) -> &WorkerCounters {
        &self.workers[worker]
    }

    /// The counters of the table's peers, in its order, each with one part per worker.
    pub(super) fn places(&self, peers: &[Peer]) -> Vec<Arc<[PeerCounters]>> {
        let fresh = || (0..self.workers.len()).map(|_| PeerCounters::default()).collect();
        let place = |peer: &Peer| self.peers.entry(peer.name.clone()).or_insert_with(fresh).clone();
        peers.iter().map(place).collect()
    }

    /// Forgets the peers whose counters no worker has a place for any more.
    pub(super) fn forget_unplaced(&self) {
        // A worker takes its share under the entry's lock: what only the map holds can't be taken meanwhile.
        self.peers.retain(|_, counters| Arc::strong_count(counters) > 1);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot { drops: Drop::ALL.map(|drop| (drop, 0)).into(), ..Snapshot::default() };
        for worker in &self.workers {
            worker.traffic.add_to(&mut sum.sent, &mut sum.received);
            let relayed = worker.passed_on();
            sum.relayed.packets += relayed.packets;
            sum.relayed.bytes += relayed.bytes;
            sum.icmp_errors += worker.icmp_errors.0.load(Relaxed);
            for (drop, counter) in Drop::ALL.iter().zip(&worker.drops) {
                *sum.drops.entry(*drop).or_default() += counter.0.load(Relaxed);
            }
        }
        for peer in &self.peers {
            let traffic = sum.peers.entry(peer.key().clone()).or_default();
            for counters in peer.value().iter() {
                counters.add_to(&mut traffic.sent, &mut traffic.received);
            }
        }
        sum
    }
}

/// One worker's. The alignment keeps workers on cache lines of their own.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct WorkerCounters {
    traffic: PeerCounters,
    relayed: TrafficCounters,
    icmp_errors: Counter,
    drops: [Counter; Drop::ALL.len()],
}

impl WorkerCounters {
    pub(super) fn passed_on(&self) -> Traffic {
        let TrafficCounters { packets, bytes } = &self.relayed;
        Traffic { packets: packets.0.load(Relaxed), bytes: bytes.0.load(Relaxed) }
    }

    pub(super) fn drops(&self) -> BTreeMap<Drop, u64> {
        Drop::ALL.iter().zip(&self.drops).map(|(drop, counter)| (*drop, counter.0.load(Relaxed))).collect()
    }

    pub(super) fn dropped(&self, drop: Drop, packets: usize) {
        self.drops[drop as usize].add(packets as u64);
    }

    pub(super) fn sent(&self, peer: &PeerCounters, packets: usize, bytes: usize) {
        self.traffic.sent.add(packets, bytes);
        peer.sent.add(packets, bytes);
    }

    pub(super) fn received(&self, peer: &PeerCounters, packets: usize, bytes: usize) {
        self.traffic.received.add(packets, bytes);
        peer.received.add(packets, bytes);
    }

    pub(super) fn relayed(&self, packets: usize, bytes: usize) {
        self.relayed.add(packets, bytes);
    }

    pub(super) fn answered(&self) {
        self.icmp_errors.add(1);
    }
}

/// One worker's traffic with one peer.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct PeerCounters {
    sent: TrafficCounters,
    received: TrafficCounters,
}

impl PeerCounters {
    fn add_to(&self, sent: &mut Traffic, received: &mut Traffic) {
        for (sum, counters) in [(sent, &self.sent), (received, &self.received)] {
            sum.packets += counters.packets.0.load(Relaxed);
            sum.bytes += counters.bytes.0.load(Relaxed);
        }
    }
}

#[derive(Default)]
struct TrafficCounters {
    packets: Counter,
    bytes: Counter,
}

impl TrafficCounters {
    fn add(&self, packets: usize, bytes: usize) {
        self.packets.add(packets as u64);
        self.bytes.add(bytes as u64);
    }
}

/// Written by one thread, so that a load and a store do: no locked instruction per packet.
#[derive(Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, more: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(more), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DataId;

    fn peer(name: &str) -> Peer {
        Peer { name: name.parse().unwrap(), data_id: DataId(0), endpoint: None, relay: None, mtu: 1400 }
    }

    #[test]
    fn every_reason_has_its_counter() {
        let counters = Counters::new(1);
        for (place, drop) in Drop::ALL.into_iter().enumerate() {
            assert_eq!(drop as usize, place);
            counters.worker(0).dropped(drop, place + 1);
        }
        let drops = counters.snapshot().drops;
        assert!(Drop::ALL.into_iter().enumerate().all(|(place, drop)| drops[&drop] == place as u64 + 1));
    }

    #[test]
    fn a_peers_traffic_outlives_a_change_of_the_table() {
        let counters = Counters::new(2);
        let both = counters.places(&[peer("a"), peer("b")]);
        counters.worker(0).sent(&both[1][0], 1, 100);
        counters.worker(1).received(&both[1][1], 1, 50);
        let b = counters.places(&[peer("b"), peer("c")]);
        drop(both);
        counters.forget_unplaced();
        counters.worker(1).sent(&b[0][1], 1, 10);
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.peers.keys().map(PeerName::as_str).collect::<Vec<_>>(), ["b", "c"]);
        let traffic = snapshot.peers[&"b".parse().unwrap()];
        assert_eq!(traffic.sent, Traffic { packets: 2, bytes: 110 });
        assert_eq!((traffic.sent, traffic.received), (snapshot.sent, snapshot.received));
    }
}
