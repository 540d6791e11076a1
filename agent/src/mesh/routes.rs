//! Which neighbour brings a unicast nearer to its destination: the shortest ways over the neighbours' graph.
//!
//! Each peer's record names its neighbours with their round-trip times; a link that either end names counts.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::peers::PeerSet;
use crate::types::PeerName;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::Duration,
};

/// The next hop to each peer that can be reached.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Routes {
    next: BTreeMap<PeerName, PeerName>,
}

impl Routes {
    /// Dijkstra's algorithm from this agent; its own links are what it has now, not what its record says.
    pub fn new(peers: &PeerSet, links: &BTreeSet<PeerName>) -> Self {
        let own = &peers.own().name;
        let mut edges: BTreeMap<&PeerName, BTreeMap<&PeerName, Duration>> = BTreeMap::new();
        for record in peers.iter() {
            for neighbour in &record.neighbours {
                if [&record.name, &neighbour.name].contains(&own) {
                    continue;
                }
                let cost = HOP + neighbour.rtt.unwrap_or(UNMEASURED);
                for (from, to) in [(&record.name, &neighbour.name), (&neighbour.name, &record.name)] {
                    let edge = edges.entry(from).or_default().entry(to).or_insert(cost);
                    *edge = cost.min(*edge);
                }
            }
        }
        let measured: BTreeMap<_, _> = peers.own().neighbours.iter().map(|n| (&n.name, n.rtt)).collect();
        let first = |link: &PeerName| HOP + measured.get(link).copied().flatten().unwrap_or(UNMEASURED);
        let mut queue: BinaryHeap<_> =
            links.iter().map(|link| Reverse((first(link), 1, link, link))).collect();
        let mut next = BTreeMap::new();
        while let Some(Reverse((cost, hops, at, via))) = queue.pop() {
            if next.contains_key(at) || at == own {
                continue;
            }
            next.insert(at.clone(), via.clone());
            if hops < HOP_LIMIT {
                let onward = edges.get(at).into_iter().flatten();
                queue.extend(onward.map(|(to, edge)| Reverse((cost + *edge, hops + 1, *to, via))));
            }
        }
        Self { next }
    }

    pub fn next_hop(&self, destination: &PeerName) -> Option<&PeerName> {
        self.next.get(destination)
    }
}

/// Hops that a unicast may take.
pub const HOP_LIMIT: u32 = 8;
/// What a hop costs beside its round-trip time: the relay's work. Prefers few hops where times are alike.
const HOP: Duration = Duration::from_micros(200);
/// Taken for a link whose round-trip time nobody has measured.
const UNMEASURED: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mesh::peers::{Neighbour, PeerRecord},
        types::Incarnation,
    };

    fn name(text: &str) -> PeerName {
        text.parse().unwrap()
    }

    fn record(own: &str, neighbours: &[(&str, u64)]) -> PeerRecord {
        let neighbour = |(to, us): &(&str, u64)| Neighbour {
            name: name(to),
            rtt: (*us != 0).then(|| Duration::from_micros(*us)),
        };
        let neighbours = neighbours.iter().map(neighbour).collect();
        PeerRecord { neighbours, ..PeerRecord::new(name(own), Incarnation(1)) }
    }

    fn routes(records: &[PeerRecord], links: &[&str]) -> Routes {
        let mut peers = PeerSet::new(record("me", &[("near", 100), ("far", 90_000)]));
        records.iter().for_each(|record| peers.insert(record.clone()));
        Routes::new(&peers, &links.iter().map(|link| name(link)).collect())
    }

    #[test]
    fn the_quicker_way_is_taken_even_with_more_hops() {
        let records =
            [record("near", &[("mid", 100)]), record("mid", &[("x", 100)]), record("far", &[("x", 100)])];
        let routes = routes(&records, &["near", "far"]);
        assert_eq!(routes.next_hop(&name("x")), Some(&name("near")));
        assert_eq!(routes.next_hop(&name("far")), Some(&name("near")));
    }

    #[test]
    fn only_links_that_are_up_count_at_home() {
        let records = [record("near", &[("x", 100)]), record("far", &[("x", 100)])];
        assert_eq!(routes(&records, &["far"]).next_hop(&name("x")), Some(&name("far")));
        assert_eq!(routes(&records, &[]).next_hop(&name("x")), None);
    }

    #[test]
    fn a_link_counts_that_either_end_names_and_nobody_who_left() {
        let gone = PeerRecord { left: true, ..record("gone", &[("y", 1)]) };
        let routes = routes(&[record("near", &[]), record("x", &[("near", 0)]), gone], &["near"]);
        assert_eq!(routes.next_hop(&name("x")), Some(&name("near")));
        assert_eq!(routes.next_hop(&name("y")), None);
        assert_eq!(routes.next_hop(&name("me")), None);
    }

    #[test]
    fn ways_end_at_the_hop_limit() {
        let hop = |n: u32| format!("n{n}");
        let chain: Vec<_> = (1..=10).map(|n| record(&hop(n), &[(hop(n + 1).as_str(), 1)])).collect();
        let routes = routes(&chain, &["n1"]);
        assert!(routes.next_hop(&name(&hop(HOP_LIMIT))).is_some());
        assert!(routes.next_hop(&name(&hop(HOP_LIMIT + 1))).is_none());
    }
}
