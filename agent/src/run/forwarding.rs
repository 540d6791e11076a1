//! From who is there and who owns what to where packets go.
//!
//! ```text
//!   PeerSet (mesh) ─┐                 ┌─▶ table::Inputs      the workers' forwarding table
//!   View (ipam) ────┼─▶ Forwarding ───┼─▶ narrow ranges      routes with a smaller MTU
//!   Views (paths) ──┘                 ├─▶ known peers        whom the allocator may ask
//!                                     └─▶ path inputs        whom to probe, and who relays
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{
    datapath::{
        handshake,
        path::{self, Views, Way},
        table::{self, Owner},
    },
    ipam::{KnownPeer, View},
    mesh::{
        peers::{PeerRecord, PeerSet},
        routes::Routes,
    },
    types::{PeerName, Prefix, Universe},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// What follows from one look at peers and ring.
#[derive(Clone, Debug, Default)]
pub struct Forwarding {
    pub table: table::Inputs,
    /// Ranges behind peers whose pods' MTU is smaller than ours, and addresses in our own ranges that peers hold; with
    /// the peer's MTU.
    pub narrow: BTreeMap<Prefix, u32>,
    pub known: Vec<KnownPeer>,
    /// Whom keys can be agreed with.
    pub sealing: Vec<handshake::Peer>,
    /// Whom to probe, and where.
    pub paths: path::Inputs,
}

/// What is known of how peers can be reached.
#[derive(Clone, Copy, Debug)]
pub struct Reach<'a> {
    /// Those to whom messages are likely to get through.
    pub by_gossip: &'a BTreeSet<PeerName>,
    /// Those with whom there is a control link, or should be one.
    pub neighbours: &'a BTreeSet<PeerName>,
    pub views: &'a Views,
}

/// The node's own part in it.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    pub universe: Universe,
    /// The pods' MTU, in bytes.
    pub mtu: u16,
    /// Underlay sockets can reach IPv6 endpoints, IPv4 endpoints.
    pub ipv6: bool,
    pub ipv4: bool,
}

impl Forwarding {
    pub fn new(node: Node, peers: &PeerSet, reach: Reach<'_>, view: &View) -> Self {
        let others: Vec<_> = peers.others().collect();
        let places: BTreeMap<&PeerName, usize> =
            others.iter().enumerate().map(|(place, record)| (&record.name, place)).collect();
        // No agent starts with less than the least; who says so anyway must not narrow our pods' ways to nothing.
        let told_mtu = |record: &PeerRecord| record.mtu.max(node.universe.least_mtu()).min(node.mtu);
        let endpoint = |name: &PeerName| {
            let known = reach.views.get(name).and_then(|view| view.endpoint);
            known.or_else(|| node.endpoints(peers.get(name)?).next())
        };
        let relays = relays(peers, reach.views);
        let path = |record: &PeerRecord| table::Peer {
            name: record.name.clone(),
            data_id: record.data_id,
            endpoint: endpoint(&record.name),
            relay: relays.get(&record.name).and_then(&endpoint),
            mtu: {
                let measured = reach.views.get(&record.name).and_then(|view| view.mtu);
                measured.unwrap_or(u16::MAX).min(told_mtu(record))
            },
        };
        let table_peers: Arc<[table::Peer]> = others.iter().map(|record| path(record)).collect();
        let probed = |record: &Arc<PeerRecord>| path::Peer {
            name: record.name.clone(),
            data_id: record.data_id,
            key: record.data_key,
            endpoints: node.endpoints(record).collect(),
            relay: relays.get(&record.name).cloned(),
            neighbour: reach.neighbours.contains(&record.name),
            mtu: told_mtu(record),
            least_mtu: node.universe.least_mtu(),
        };
        let paths = path::Inputs {
            me: peers.own().data_id,
            peers: others.iter().map(|record| probed(record)).collect(),
        };
        let own = &peers.own().name;
        let owner = |name: &PeerName| match places.get(name) {
            _ if name == own => Owner::Me,
            Some(place) => Owner::Peer(*place),
            None => Owner::Nobody,
        };
        let narrow = view.ranges.iter().filter_map(|(prefix, name)| {
            let mtu = table_peers[*places.get(name)?].mtu;
            (mtu < node.mtu).then_some((*prefix, mtu.into()))
        });
        // To hold what the ring gives to another needs that one's word, or anybody could take any address.
        let conceded =
            |address: &IpAddr| match view.ranges.iter().find(|(prefix, _)| prefix.contains(address)) {
                Some((_, name)) if name == own => view.conceded.contains(address),
                Some((_, name)) => peers.get(name).is_some_and(|record| record.conceded.contains(address)),
                None => true,
            };
        let conceded = &conceded;
        let sealing = others.iter().zip(&*table_peers).filter_map(|(record, peer)| {
            let (name, endpoint) = (peer.name.clone(), peer.endpoint);
            Some(handshake::Peer { name, key: record.data_key?, incarnation: record.incarnation, endpoint })
        });
        let held = others.iter().enumerate().flat_map(|(place, record)| {
            record.held.iter().filter(move |address| conceded(address)).map(move |address| (*address, place))
        });
        // The kernel takes what has no pod in our own ranges for unreachable.
        let away = held.clone().filter(|(address, _)| view.own.iter().any(|range| range.contains(address)));
        let away = away.map(|(address, place)| (Prefix::from(address), table_peers[place].mtu.into()));
        let pods = view.allocations.keys().filter(|address| Some(**address) != view.bridge);
        Self {
            narrow: narrow.chain(away).collect(),
            sealing: sealing.collect(),
            paths,
            known: others
                .iter()
                .map(|record| KnownPeer {
                    name: record.name.clone(),
                    reachable: reach.by_gossip.contains(&record.name),
                    held: record.held.clone(),
                    incarnation: record.incarnation,
                    deaths_digest: record.deaths_digest,
                    absent: record.absent.clone(),
                    left: false,
                })
                .chain(peers.left().cloned().map(KnownPeer::gone))
                .collect(),
            table: table::Inputs {
                me: peers.own().data_id,
                ranges: view.ranges.iter().map(|(prefix, name)| (*prefix, owner(name))).collect(),
                held: held.map(|(address, place)| (address, Owner::Peer(place))).collect(),
                bridge: view.bridge.into_iter().collect(),
                pods: pods.copied().collect(),
                peers: table_peers,
            },
        }
    }
}

impl Node {
    /// Where a peer may be, best first. Inside the universe what we send would come back to us by the TUN, to be sent again.
    fn endpoints(self, record: &PeerRecord) -> impl Iterator<Item = SocketAddr> {
        let usable =
            move |ip: IpAddr| !self.universe.contains(ip) && if ip.is_ipv4() { self.ipv4 } else { self.ipv6 };
        record.endpoints.iter().map(|endpoint| endpoint.0).filter(move |address| usable(address.ip()))
    }
}

/// The next node on the way to each peer that does not answer directly, if there is one.
fn relays(peers: &PeerSet, views: &Views) -> BTreeMap<PeerName, PeerName> {
    let lost: Vec<_> =
        views.iter().filter(|(_, view)| view.way != Way::Direct).map(|(name, _)| name).collect();
    if lost.is_empty() {
        return BTreeMap::new();
    }
    let answering = views.iter().filter_map(|(name, view)| Some((name.clone(), view.direct?)));
    let routes = Routes::measured(peers, &answering.collect());
    lost.into_iter().filter_map(|name| Some((name.clone(), routes.next_hop(name)?.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Incarnation;

    /// Nobody has been probed.
    fn forwarding(node: Node, peers: &PeerSet, view: &View) -> Forwarding {
        let (nobody, views) = (BTreeSet::new(), Views::new());
        Forwarding::new(node, peers, Reach { by_gossip: &nobody, neighbours: &nobody, views: &views }, view)
    }

    #[test]
    fn an_address_is_held_only_where_its_owner_says_so() {
        let record = |name: &str| PeerRecord::new(name.parse().unwrap(), Incarnation(1));
        let node = Node { universe: "10.32.0.0/12".parse().unwrap(), mtu: 1440, ipv6: false, ipv4: true };
        let addresses: Vec<IpAddr> =
            ["10.32.0.1", "10.33.0.1", "10.33.0.2", "10.34.0.1"].map(|text| text.parse().unwrap()).into();
        let mut peers = PeerSet::new(record("me"));
        peers.insert(PeerRecord { held: addresses.clone(), ..record("a") });
        peers.insert(PeerRecord { conceded: vec![addresses[1]], ..record("b") });
        let range = |prefix: &str, owner: &str| (prefix.parse().unwrap(), owner.parse().unwrap());
        let mut view = View {
            ranges: Arc::new(vec![range("10.32.0.0/16", "me"), range("10.33.0.0/16", "b")]),
            ..View::default()
        };
        let held = |view: &View| -> Vec<IpAddr> {
            let made = forwarding(node, &peers, view);
            made.table.held.iter().map(|(address, _)| *address).collect()
        };
        assert_eq!(held(&view), [addresses[1], addresses[3]], "b's word, and nobody's range");
        view.conceded.insert(addresses[0]);
        assert_eq!(held(&view), [addresses[0], addresses[1], addresses[3]]);
        view.own.push("10.32.0.0/16".parse().unwrap());
        let narrow = forwarding(node, &peers, &view).narrow;
        assert!(narrow.contains_key(&addresses[0].into()), "it needs a way out of our own range");
    }

    #[test]
    fn a_peers_mtu_counts_where_it_is_smaller_but_not_absurd() {
        let record = |name: &str| PeerRecord::new(name.parse().unwrap(), Incarnation(1));
        let mtu = |universe: &str, mtu: u16| {
            let node = Node { universe: universe.parse().unwrap(), mtu: 1440, ipv6: false, ipv4: true };
            let mut peers = PeerSet::new(record("me"));
            peers.insert(PeerRecord { mtu, ..record("b") });
            forwarding(node, &peers, &View::default()).table.peers[0].mtu
        };
        assert_eq!([1300, 9000, 68, 0].map(|told| mtu("10.32.0.0/12", told)), [1300, 1440, 576, 576]);
        assert_eq!([1300, 68].map(|told| mtu("fd00:77::/64", told)), [1300, 1280]);
    }

    #[test]
    fn a_peer_is_sent_to_at_its_first_endpoint_that_can_be_one() {
        let record = |name: &str| PeerRecord::new(name.parse().unwrap(), Incarnation(1));
        let node = Node { universe: "10.32.0.0/12".parse().unwrap(), mtu: 1440, ipv6: false, ipv4: true };
        let endpoint = |endpoints: &[&str]| {
            let endpoints = endpoints.iter().map(|text| text.parse().unwrap()).collect();
            let mut peers = PeerSet::new(record("me"));
            peers.insert(PeerRecord { endpoints, ..record("b") });
            let made = forwarding(node, &peers, &View::default());
            made.table.peers[0].endpoint.map(|address| address.to_string())
        };
        let good = "192.0.2.2:6783";
        assert_eq!(endpoint(&["[2001:db8::2]:6783", "10.33.0.1:6783", good]).as_deref(), Some(good));
        assert_eq!(endpoint(&["10.33.0.1:6783"]), None, "inside the universe");
    }
}
