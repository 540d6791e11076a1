//! Which neighbour brings a unicast or a packet nearer to its destination: the shortest ways over the neighbours' graph.
//!
//! Each peer's record names its neighbours, with the round-trip times of probes to those who answer them.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::peers::PeerSet;
use crate::types::PeerName;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
    time::Duration,
};

/// The next hop to each peer that can be reached.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Routes {
    next: HashMap<PeerName, PeerName>,
}

/// Names are looked up once; the search knows numbers only.
#[derive(Default)]
struct Graph<'a> {
    numbers: HashMap<&'a PeerName, usize>,
    names: Vec<&'a PeerName>,
    edges: Vec<Vec<(usize, Duration)>>,
}

impl Routes {
    /// For control: each hop is a link, and a link counts that either end names. The own links are what they are now, not
    /// what the record says.
    pub fn new(peers: &PeerSet, links: &BTreeSet<PeerName>) -> Self {
        let own = &peers.own().name;
        let mut graph = Graph::of(peers);
        for record in peers.others() {
            let from = graph.number(&record.name);
            for neighbour in record.neighbours.iter().filter(|neighbour| neighbour.name != *own) {
                let (to, cost) = (graph.number(&neighbour.name), HOP + neighbour.rtt.unwrap_or(UNMEASURED));
                graph.edges[from].push((to, cost));
                graph.edges[to].push((from, cost));
            }
        }
        let measured: BTreeMap<_, _> = peers.own().neighbours.iter().map(|n| (&n.name, n.rtt)).collect();
        let first = |link| (link, HOP + measured.get(link).copied().flatten().unwrap_or(UNMEASURED));
        graph.search(own, links.iter().map(first))
    }

    /// For packets: each hop is one that both ends have measured. `answering` are those who answer our own probes now.
    pub fn measured(peers: &PeerSet, answering: &BTreeMap<PeerName, Duration>) -> Self {
        let own = &peers.own().name;
        let mut graph = Graph::of(peers);
        let mut told = HashMap::new();
        for record in peers.iter() {
            let from = graph.number(&record.name);
            for neighbour in &record.neighbours {
                let to = graph.number(&neighbour.name);
                if let Some(rtt) = neighbour.rtt
                    && told.insert((from, to), rtt).is_none()
                {
                    graph.edges[from].push((to, HOP + rtt));
                }
            }
        }
        for (from, edges) in graph.edges.iter_mut().enumerate() {
            edges.retain_mut(|(to, cost)| {
                let back = told.get(&(*to, from));
                *cost = back.map_or(*cost, |rtt| (HOP + *rtt).max(*cost));
                back.is_some()
            });
        }
        // What both ends have told counts here, too: all must reckon alike, or packets would go round in circles.
        let me = graph.number(own);
        let first: Vec<_> = answering
            .iter()
            .map(|(name, rtt)| {
                let to = graph.number(name);
                let told = told.get(&(me, to)).zip(told.get(&(to, me)));
                (name, HOP + told.map_or(*rtt, |(here, there)| *here.max(there)))
            })
            .collect();
        graph.search(own, first.into_iter())
    }

    pub fn next_hop(&self, destination: &PeerName) -> Option<&PeerName> {
        self.next.get(destination)
    }
}

impl<'a> Graph<'a> {
    fn of(peers: &'a PeerSet) -> Self {
        let mut graph = Self::default();
        peers.iter().for_each(|record| _ = graph.number(&record.name));
        graph
    }

    fn number(&mut self, name: &'a PeerName) -> usize {
        *self.numbers.entry(name).or_insert_with(|| {
            self.names.push(name);
            self.edges.push(Vec::new());
            self.names.len() - 1
        })
    }

    /// Dijkstra's algorithm.
    fn search(mut self, own: &'a PeerName, first: impl Iterator<Item = (&'a PeerName, Duration)>) -> Routes {
        let own = self.number(own);
        let first: Vec<_> = first.map(|(to, cost)| (cost, 1, self.number(to))).collect();
        let mut queue: BinaryHeap<_> =
            first.into_iter().map(|(cost, hops, to)| Reverse((cost, hops, to, to))).collect();
        let mut best = vec![None; self.names.len()];
        let mut done = vec![false; self.names.len()];
        let mut next = HashMap::with_capacity(self.names.len());
        while let Some(Reverse((cost, hops, at, via))) = queue.pop() {
            if at == own || std::mem::replace(&mut done[at], true) {
                continue;
            }
            next.insert(self.names[at].clone(), self.names[via].clone());
            if hops == HOP_LIMIT {
                continue;
            }
            for (to, edge) in &self.edges[at] {
                let way = (cost + *edge, hops + 1, via);
                if !done[*to] && best[*to].is_none_or(|best| way < best) {
                    best[*to] = Some(way);
                    queue.push(Reverse((way.0, way.1, *to, via)));
                }
            }
        }
        Routes { next }
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
    fn packets_go_only_where_both_ends_have_measured() {
        let records = [
            record("near", &[("x", 100), ("y", 100)]),
            record("far", &[("x", 0), ("y", 100)]),
            record("x", &[("near", 0), ("far", 100)]),
            record("y", &[("near", 90_000), ("far", 100)]),
        ];
        let mut peers = PeerSet::new(record("me", &[]));
        records.iter().for_each(|record| peers.insert(record.clone()));
        let answering =
            [(name("near"), Duration::from_micros(100)), (name("far"), Duration::from_micros(500))];
        let routes = Routes::measured(&peers, &answering.into());
        assert_eq!(routes.next_hop(&name("x")), None);
        assert_eq!(routes.next_hop(&name("y")), Some(&name("far")), "of two measures the greater counts");
    }

    /// Nodes with random cuts between them, all of whom know all records: packets reach whom they can, and pass nobody
    /// twice.
    #[test]
    fn packets_arrive_wherever_there_is_a_way() {
        use rand::{RngExt, SeedableRng};
        for seed in 0..200 {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let (n, good) = (rng.random_range(2..9), rng.random_range(0.1..0.9));
            let mut rtt = vec![vec![0u64; n]; n];
            for (a, b) in (0..n).flat_map(|a| (0..a).map(move |b| (a, b))) {
                let (there, back) = (rng.random_range(1..5), rng.random_range(1..5));
                if rng.random_bool(good) {
                    (rtt[a][b], rtt[b][a]) = (there * 100, back * 100);
                }
            }
            let neighbours = |a: usize| (0..n).filter(move |b| *b != a);
            let records: Vec<_> = (0..n)
                .map(|a| {
                    let told = neighbours(a).map(|b| (format!("n{b}"), rtt[a][b])).collect::<Vec<_>>();
                    record(
                        &format!("n{a}"),
                        &told.iter().map(|(b, us)| (b.as_str(), *us)).collect::<Vec<_>>(),
                    )
                })
                .collect();
            let routes: Vec<_> = (0..n)
                .map(|a| {
                    let mut peers = PeerSet::new(records[a].clone());
                    neighbours(a).for_each(|b| peers.insert(records[b].clone()));
                    let answering = neighbours(a).filter(|b| rtt[a][*b] > 0);
                    let answering =
                        answering.map(|b| (name(&format!("n{b}")), Duration::from_micros(rtt[a][b])));
                    Routes::measured(&peers, &answering.collect())
                })
                .collect();
            let mut reached: Vec<BTreeSet<usize>> = (0..n).map(|a| BTreeSet::from([a])).collect();
            for _ in 0..n {
                for a in 0..n {
                    let further = (0..n).filter(|b| rtt[a][*b] > 0).flat_map(|b| reached[b].clone());
                    let further: Vec<_> = further.collect();
                    reached[a].extend(further);
                }
            }
            for (a, b) in (0..n).flat_map(|a| neighbours(a).map(move |b| (a, b))) {
                let (mut at, mut passed) = (a, BTreeSet::new());
                while at != b
                    && let Some(next) = routes[at].next_hop(&name(&format!("n{b}")))
                {
                    assert!(passed.insert(at), "seed {seed}: from {a} to {b} in a circle at {at}");
                    at = next.as_str()[1..].parse().unwrap();
                }
                assert_eq!(at == b, reached[a].contains(&b), "seed {seed}: from {a} to {b}");
            }
        }
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
