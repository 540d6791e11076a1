//! All that an agent shows of itself, gathered at one moment; metrics and the local API are rendered from it.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{AttachmentKey, Endpoint, Incarnation, PeerName, PodRef, Prefix, Universe};
use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

/// Gives a snapshot when asked. It is asked at each scrape and each command: reading what is at hand, never waiting.
pub trait Observe: Send + Sync + 'static {
    fn snapshot(&self) -> Snapshot;
}

pub type Observer = Arc<dyn Observe>;

impl<F: Fn() -> Snapshot + Send + Sync + 'static> Observe for F {
    fn snapshot(&self) -> Snapshot {
        self()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub name: PeerName,
    pub incarnation: Incarnation,
    /// Such as `weft 0.1.0`.
    pub software: String,
    /// Since this incarnation started.
    pub uptime: Duration,
    pub universe: Universe,
    pub endpoints: Vec<Endpoint>,
    pub encryption: Encryption,
    /// Why ADD would not work now; empty: ready.
    pub not_ready: Vec<String>,
    /// What a person should look at though ADD works.
    pub warnings: Vec<String>,
    /// The pods' MTU in bytes.
    pub mtu: u16,
    pub bridge_address: Option<IpAddr>,
    /// Everybody known who has not left, ourselves included.
    pub peers: Vec<PeerView>,
    /// The whole ring.
    pub ranges: Vec<RangeView>,
    /// Addresses that could be handed out now: the network's own, and what peers hold, are not among them.
    pub addresses_free: u128,
    /// What we wait for while we own nothing.
    pub waiting_for: Option<String>,
    pub pods: Vec<PodView>,
    /// Of all peers together, those that are gone included.
    pub traffic: Traffic,
    /// Datagrams and bytes that passed through here between other nodes.
    pub relayed: (u64, u64),
    /// Packets dropped, by reason.
    pub drops: Counters,
    /// Events of the gossip, such as `items_sent` or `items_rejected`.
    pub gossip: Counters,
    /// Times that links, routes or firewall rules were put right after others had changed them.
    pub repairs: u64,
}

/// Event or reason → how often since the start.
pub type Counters = BTreeMap<String, u64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    Off,
    Required,
}

/// How data reaches a peer now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Path {
    /// To ourselves.
    Local,
    Direct,
    /// By that peer first.
    Relayed(PeerName),
    /// And why.
    Down(String),
}

#[derive(Clone, Debug, PartialEq)]
pub struct PeerView {
    pub name: PeerName,
    pub endpoints: Vec<Endpoint>,
    pub software: String,
    /// A control link is up.
    pub linked: bool,
    pub path: Path,
    /// Round trip on that path; none where nobody has measured it.
    pub rtt: Option<Duration>,
    /// Part of the probes of late that were lost, 0 to 1.
    pub loss: Option<f32>,
    /// Of the path to it, or of the pods where that is not known, in bytes.
    pub mtu: u16,
    pub traffic: Traffic,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeView {
    pub prefix: Prefix,
    pub owner: PeerName,
    /// Addresses handed out; known for our own ranges, 0 for others.
    pub allocated: u64,
    /// Addresses freed a moment ago; known for our own ranges, 0 for others.
    pub resting: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    pub attachment: AttachmentKey,
    pub pod: PodRef,
    pub addresses: Vec<IpAddr>,
    /// Its veth exists; else it is only reserved.
    pub active: bool,
}

/// Inner packets and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub packets_sent: u64,
    pub bytes_sent: u64,
    pub packets_received: u64,
    pub bytes_received: u64,
}

impl Snapshot {
    pub fn is_ready(&self) -> bool {
        self.not_ready.is_empty()
    }

    /// Peers beside ourselves.
    pub fn others(&self) -> impl Iterator<Item = &PeerView> {
        self.peers.iter().filter(|peer| peer.name != self.name)
    }

    pub fn links(&self) -> usize {
        self.others().filter(|peer| peer.linked).count()
    }

    pub fn my_ranges(&self) -> impl Iterator<Item = &RangeView> {
        self.ranges.iter().filter(|range| range.owner == self.name)
    }

    /// Addresses of each owner.
    pub fn shares(&self) -> BTreeMap<&PeerName, u128> {
        let mut shares = BTreeMap::new();
        for range in &self.ranges {
            *shares.entry(&range.owner).or_default() += addresses_in(range.prefix);
        }
        shares
    }

    /// Our addresses: owned, allocated, resting.
    pub fn addresses(&self) -> (u128, u64, u64) {
        self.my_ranges().fold((0, 0, 0), |(owned, allocated, resting), range| {
            (owned + addresses_in(range.prefix), allocated + range.allocated, resting + range.resting)
        })
    }
}

impl Path {
    /// Its kind, in metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Direct => "direct",
            Self::Relayed(_) => "relayed",
            Self::Down(_) => "down",
        }
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Required => "required",
        })
    }
}

/// Addresses in a prefix; all but one of `::/0`.
pub(crate) fn addresses_in(prefix: Prefix) -> u128 {
    1u128.checked_shl(u32::from(prefix.max_prefix_len() - prefix.prefix_len())).unwrap_or(u128::MAX)
}

/// Snapshots for the tests of what is rendered from them.
#[cfg(test)]
pub(crate) mod example {
    use super::*;

    /// Node-1 of two nodes, with a pod and a reservation.
    pub(crate) fn snapshot() -> Snapshot {
        let counters = |list: &[(&str, u64)]| list.iter().map(|(name, n)| (name.to_string(), *n)).collect();
        let traffic =
            Traffic { packets_sent: 1200, bytes_sent: 3 << 20, packets_received: 900, bytes_received: 5000 };
        let peer = |name: &str, endpoint: &str, path, linked| PeerView {
            name: name.parse().unwrap(),
            endpoints: vec![endpoint.parse().unwrap()],
            software: "weft 0.1.0".into(),
            linked,
            rtt: linked.then_some(Duration::from_micros(234)),
            loss: linked.then_some(0.125),
            path,
            mtu: 1440,
            traffic: if linked { traffic } else { Traffic::default() },
        };
        let range = |prefix: &str, owner: &str, allocated, resting| RangeView {
            prefix: prefix.parse().unwrap(),
            owner: owner.parse().unwrap(),
            allocated,
            resting,
        };
        let pod = |id: &str, name: &str, address: &str, active| PodView {
            attachment: AttachmentKey::new(id, "eth0").unwrap(),
            pod: PodRef { uid: "7d1c".into(), namespace: "default".into(), name: name.into() },
            addresses: vec![address.parse().unwrap()],
            active,
        };
        Snapshot {
            name: "node-1".parse().unwrap(),
            incarnation: Incarnation(1_763_683_200_000_000),
            software: "weft 0.1.0".into(),
            uptime: Duration::from_secs(3 * 3600 + 125),
            universe: "10.32.0.0/12".parse().unwrap(),
            endpoints: vec!["192.0.2.1:6783".parse().unwrap()],
            encryption: Encryption::Off,
            not_ready: Vec::new(),
            warnings: Vec::new(),
            mtu: 1440,
            bridge_address: Some("10.32.0.1".parse().unwrap()),
            peers: vec![
                peer("node-1", "192.0.2.1:6783", Path::Local, false),
                peer("node-2", "192.0.2.2:6783", Path::Direct, true),
                peer("node-3", "[2001:db8::3]:6783", Path::Down("no answer, no relay".into()), false),
            ],
            ranges: vec![
                range("10.32.0.0/13", "node-1", 3, 1),
                range("10.40.0.0/14", "node-2", 0, 0),
                range("10.44.0.0/14", "node-3", 0, 0),
            ],
            // The universe's first is nobody's.
            addresses_free: (1 << 19) - 5,
            waiting_for: None,
            pods: vec![
                pod("4f3c9a0b11d2", "web-0", "10.32.0.2", true),
                pod("88aa", "web-1", "10.32.0.3", false),
            ],
            traffic,
            relayed: (7, 9000),
            drops: counters(&[("no_peer", 3), ("too_big", 1)]),
            gossip: counters(&[("items_received", 40), ("items_rejected", 0)]),
            repairs: 1,
        }
    }
}
