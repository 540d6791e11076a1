//! Several allocators with a mesh that loses, doubles and reorders, and nodes that crash: no address is ever used by two
//! nodes, and no space is lost.

use super::{
    Allocator, Config, Found, IpamError, KnownPeer, Now, Request, Stored,
    seed::seeds,
    span::{Layout, coalesce},
};
use crate::{
    mesh::gossip::Item,
    types::{AttachmentKey, Incarnation, PeerName, PodRef},
};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

pub(super) struct Node {
    pub(super) name: PeerName,
    pub(super) allocator: Allocator,
    pub(super) disk: Stored,
    /// The mesh's part: the greatest item for each key.
    pub(super) items: BTreeMap<Vec<u8>, Item>,
    /// Pods that the runtime believes to be attached here.
    pub(super) pods: BTreeMap<u32, IpAddr>,
}

pub(super) struct Sim {
    pub(super) layout: Layout,
    pub(super) seeds: String,
    pub(super) now: Now,
    pub(super) nodes: Vec<Node>,
    /// Messages under way: from, to, body. Items travel by `sync` and `hear`.
    unicasts: Vec<(usize, usize, Vec<u8>)>,
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Reserve {
        node: usize,
        pod: u32,
    },
    Activate {
        node: usize,
        pod: u32,
    },
    Release {
        node: usize,
        pod: u32,
    },
    /// One node hears one item of another.
    Hear {
        from: usize,
        to: usize,
        item: usize,
    },
    Sync {
        from: usize,
        to: usize,
    },
    /// A message arrives, is lost, or stays to arrive once more.
    Message {
        at: usize,
        arrives: bool,
        stays: bool,
    },
    /// A node restarts from its disk; with `torn`, in the middle of its next reservation, before anything is written.
    Crash {
        node: usize,
        torn: bool,
    },
    Wait {
        seconds: u64,
    },
}

impl Sim {
    pub(super) fn new(universe: &str, seeds: &str, nodes: usize) -> Self {
        let now = Now { at: Instant::now(), unix_ms: 0 };
        let layout = Layout::new(universe.parse().unwrap());
        let mut sim = Self { layout, seeds: seeds.into(), now, nodes: Vec::new(), unicasts: Vec::new() };
        for n in 0..nodes {
            let name: PeerName = format!("n{n}").parse().unwrap();
            let allocator = sim.boot(&name, Stored::default());
            let (disk, items, pods) = Default::default();
            sim.nodes.push(Node { name, allocator, disk, items, pods });
            sim.flush(n);
        }
        sim
    }

    pub(super) fn boot(&self, name: &PeerName, stored: Stored) -> Allocator {
        let config = Config {
            name: name.clone(),
            universe: self.layout.universe(),
            seeds: seeds(&self.seeds),
            sealer: None,
            has_bootstrap: self.seeds != name.as_str(),
            seeding: super::Seeding::Given,
            assigned: None,
        };
        Allocator::new(config, stored, Found::default(), self.now).unwrap()
    }

    /// Stores, then publishes and sends, as the task does.
    pub(super) fn flush(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let effects = node.allocator.effects();
        for change in effects.changes {
            node.disk.apply(change);
        }
        for item in effects.publish {
            node.hold(item);
        }
        for (to, body) in effects.unicasts {
            let to = self.nodes.iter().position(|node| node.name == to).unwrap();
            self.unicasts.push((at, to, body));
        }
    }

    pub(super) fn reserve(&mut self, at: usize, pod: u32) -> Result<IpAddr, IpamError> {
        let now = self.now;
        let node = &mut self.nodes[at];
        let reserved = node.allocator.reserve(request(at, pod), now).map(|allocation| allocation.address);
        self.flush(at);
        if let Ok(address) = reserved {
            self.nodes[at].pods.insert(pod, address);
        }
        reserved
    }

    pub(super) fn hear(&mut self, to: usize, items: Vec<Item>) {
        let now = self.now;
        let node = &mut self.nodes[to];
        let new: Vec<Item> = items.into_iter().filter(|item| node.hold(item.clone())).collect();
        node.allocator.on_items(&new, now);
        self.flush(to);
    }

    pub(super) fn sync(&mut self, from: usize, to: usize) {
        let items = self.nodes[from].items.values().cloned().collect();
        self.hear(to, items);
        let peers = self.peers();
        self.nodes[to].allocator.on_contact(self.now);
        self.nodes[to].allocator.on_peers(&peers, self.now);
        self.flush(to);
    }

    fn deliver(&mut self, at: usize) {
        let (from, to, body) = self.unicasts[at].clone();
        let from = self.nodes[from].name.clone();
        self.nodes[to].allocator.on_unicast(&from, &body, self.now);
        self.flush(to);
    }

    pub(super) fn peers(&mut self) -> Vec<KnownPeer> {
        let known = |node: &mut Node| {
            let view = node.allocator.view();
            KnownPeer {
                name: node.name.clone(),
                reachable: true,
                held: view.held,
                incarnation: Incarnation(1),
                deaths_digest: view.deaths_digest,
                absent: view.absent.clone(),
                left: false,
            }
        };
        self.nodes.iter_mut().map(known).collect()
    }

    pub(super) fn wait(&mut self, seconds: u64) {
        let end = self.now.at + Duration::from_secs(seconds);
        self.now.at = end;
        self.now.unix_ms += seconds * 1000;
        for at in 0..self.nodes.len() {
            self.nodes[at].allocator.tick(self.now);
            self.flush(at);
            // What timed out is gone for the runtime too.
            let node = &mut self.nodes[at];
            let view = node.allocator.view();
            node.pods.retain(|_, address| view.allocations.contains_key(address));
        }
    }

    pub(super) fn crash(&mut self, at: usize, torn: bool) {
        if torn {
            let _ = self.nodes[at].allocator.reserve(request(at, 999), self.now);
        }
        let (name, disk) = (self.nodes[at].name.clone(), self.nodes[at].disk.clone());
        self.nodes[at].allocator = self.boot(&name, disk);
        self.nodes[at].items.clear();
        self.flush(at);
    }

    pub(super) fn apply(&mut self, op: &Op) {
        let nodes = self.nodes.len();
        match *op {
            Op::Reserve { node, pod } => _ = self.reserve(node % nodes, pod),
            Op::Activate { node, pod } => {
                let at = node % nodes;
                self.nodes[at].allocator.activated(&key(at, pod));
            }
            Op::Release { node, pod } => {
                let (at, now) = (node % nodes, self.now);
                self.nodes[at].allocator.release(&key(at, pod), now);
                self.flush(at);
                self.nodes[at].pods.remove(&pod);
            }
            Op::Hear { from, to, item } => {
                let items = &self.nodes[from % nodes].items;
                let item = items.values().nth(item % items.len().max(1)).cloned();
                self.hear(to % nodes, item.into_iter().collect());
            }
            Op::Sync { from, to } => self.sync(from % nodes, to % nodes),
            Op::Message { at, arrives, stays } if !self.unicasts.is_empty() => {
                let at = at % self.unicasts.len();
                if arrives {
                    self.deliver(at);
                }
                if !stays {
                    self.unicasts.remove(at);
                }
            }
            Op::Message { .. } => {}
            Op::Crash { node, torn } => self.crash(node % nodes, torn),
            Op::Wait { seconds } => self.wait(seconds),
        }
        self.check();
    }

    /// What must hold at every moment.
    fn check(&mut self) {
        let mut used = BTreeMap::new();
        let mut owned = Vec::new();
        for node in &mut self.nodes {
            let view = node.allocator.view();
            for (address, allocation) in &view.allocations {
                let other = used.insert(*address, node.name.clone());
                assert_eq!(other, None, "{address} is used by two nodes, {} is one", node.name);
                assert!(!self.layout.reserved(self.layout.offset(*address).unwrap()), "{allocation:?}");
            }
            for address in node.pods.values() {
                assert!(view.allocations.contains_key(address), "{address} was forgotten by {}", node.name);
            }
            assert_eq!(view.held, Vec::<IpAddr>::new(), "nobody loses what is in use");
            owned.extend(view.own.iter().map(|prefix| (self.layout.span(*prefix).unwrap(), &node.name)));
        }
        owned.sort();
        for pair in owned.windows(2) {
            assert!(pair[0].0.last < pair[1].0.first, "two believe to own the same: {pair:?}");
        }
    }

    /// Everybody hears everything, twice over: all rings are one and lose nothing.
    pub(super) fn converge(&mut self) {
        self.unicasts.clear();
        for _ in 0..3 {
            for from in 0..self.nodes.len() {
                for to in 0..self.nodes.len() {
                    self.sync(from, to);
                }
            }
            self.check();
        }
        let view = self.nodes[0].allocator.view();
        let spans = view.ranges.iter().map(|(prefix, _)| self.layout.span(*prefix).unwrap());
        assert_eq!(coalesce(spans), [self.layout.whole()], "space is conserved");
        for node in &mut self.nodes {
            assert_eq!(node.allocator.view().ranges, view.ranges, "{} disagrees", node.name);
        }
    }

    /// Lets everything arrive, with time passing, until nothing moves any more.
    pub(super) fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            for at in 0..self.unicasts.len() {
                self.deliver(at);
            }
            self.converge();
            self.wait(1);
        }
    }
}

impl Node {
    fn hold(&mut self, item: Item) -> bool {
        let rank = |item: &Item| (item.rank.clone(), item.body.clone());
        let new = self.items.get(&item.key).is_none_or(|known| rank(&item) > rank(known));
        if new {
            self.items.insert(item.key.clone(), item);
        }
        new
    }
}

pub(super) fn key(node: usize, pod: u32) -> AttachmentKey {
    AttachmentKey::new(&format!("n{node}p{pod}"), "eth0").unwrap()
}

pub(super) fn request(node: usize, pod: u32) -> Request {
    let key = key(node, pod);
    Request { key, pod: PodRef::default(), wanted: Vec::new(), ranges: Vec::new(), mac: None }
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let node = 0..4usize;
    let op = prop_oneof![
        6 => (node.clone(), 0..12u32).prop_map(|(node, pod)| Op::Reserve { node, pod }),
        3 => (node.clone(), 0..12u32).prop_map(|(node, pod)| Op::Activate { node, pod }),
        3 => (node.clone(), 0..12u32).prop_map(|(node, pod)| Op::Release { node, pod }),
        6 => (node.clone(), node.clone(), 0..64usize).prop_map(|(from, to, item)| Op::Hear { from, to, item }),
        4 => (node.clone(), node.clone()).prop_map(|(from, to)| Op::Sync { from, to }),
        6 => (0..8usize, prop::bool::weighted(0.8), prop::bool::weighted(0.2))
            .prop_map(|(at, arrives, stays)| Op::Message { at, arrives, stays }),
        1 => (node, any::<bool>()).prop_map(|(node, torn)| Op::Crash { node, torn }),
        2 => (1..40u64).prop_map(|seconds| Op::Wait { seconds }),
    ];
    prop::collection::vec(op, 0..250)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn an_address_is_never_used_twice_and_no_space_is_lost(
        ops in ops(),
        universe in prop::sample::select(vec!["10.32.0.0/29", "10.32.0.0/26", "10.32.0.0/12", "fd00:77::/64"]),
        seeds in prop::sample::select(vec!["n0", "n0,n1,n2", "n0,n1,n2,n3", "n0,n9"]),
    ) {
        let mut sim = Sim::new(universe, seeds, 4);
        for op in &ops {
            sim.apply(op);
        }
        sim.converge();
    }
}
