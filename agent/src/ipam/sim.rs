//! Several allocators with a mesh that loses, doubles and reorders, and nodes that crash: no address is ever used by two
//! nodes, and no space is lost.

use super::{
    Allocator, Change, Config, Found, IpamError, KnownPeer, Now, Owner, Request, Stored, WaitingFor,
    ring::Ring,
    span::{Layout, coalesce},
    token::Token,
};
use crate::{
    mesh::gossip::Item,
    types::{AttachmentKey, PeerName, PodRef},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

struct Node {
    name: PeerName,
    allocator: Allocator,
    disk: Stored,
    /// The mesh's part: the greatest item for each key.
    items: BTreeMap<Vec<u8>, Item>,
    /// Pods that the runtime believes to be attached here.
    pods: BTreeMap<u32, IpAddr>,
}

struct Sim {
    layout: Layout,
    seeds: String,
    now: Now,
    nodes: Vec<Node>,
    /// Messages under way: from, to, body. Items travel by `sync` and `hear`.
    unicasts: Vec<(usize, usize, Vec<u8>)>,
}

#[derive(Clone, Debug)]
enum Op {
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
    fn new(universe: &str, seeds: &str, nodes: usize) -> Self {
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

    fn boot(&self, name: &PeerName, stored: Stored) -> Allocator {
        let config = Config {
            name: name.clone(),
            universe: self.layout.universe(),
            seeds: self.seeds.parse().unwrap(),
            has_bootstrap: self.seeds != name.as_str(),
        };
        Allocator::new(config, stored, Found::default(), self.now).unwrap()
    }

    /// Stores, then publishes and sends, as the task does.
    fn flush(&mut self, at: usize) {
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

    fn reserve(&mut self, at: usize, pod: u32) -> Result<IpAddr, IpamError> {
        let now = self.now;
        let node = &mut self.nodes[at];
        let reserved = node.allocator.reserve(request(at, pod), now).map(|allocation| allocation.address);
        self.flush(at);
        if let Ok(address) = reserved {
            self.nodes[at].pods.insert(pod, address);
        }
        reserved
    }

    fn hear(&mut self, to: usize, items: Vec<Item>) {
        let now = self.now;
        let node = &mut self.nodes[to];
        let new: Vec<Item> = items.into_iter().filter(|item| node.hold(item.clone())).collect();
        node.allocator.on_items(&new, now);
        self.flush(to);
    }

    fn sync(&mut self, from: usize, to: usize) {
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

    fn peers(&mut self) -> Vec<KnownPeer> {
        let known = |node: &mut Node| {
            let held = node.allocator.view().held;
            KnownPeer { name: node.name.clone(), reachable: true, held }
        };
        self.nodes.iter_mut().map(known).collect()
    }

    fn wait(&mut self, seconds: u64) {
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

    fn crash(&mut self, at: usize, torn: bool) {
        if torn {
            let _ = self.nodes[at].allocator.reserve(request(at, 999), self.now);
        }
        let (name, disk) = (self.nodes[at].name.clone(), self.nodes[at].disk.clone());
        self.nodes[at].allocator = self.boot(&name, disk);
        self.nodes[at].items.clear();
        self.flush(at);
    }

    fn apply(&mut self, op: &Op) {
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
    fn converge(&mut self) {
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
    fn run(&mut self, seconds: u64) {
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

impl Stored {
    fn apply(&mut self, change: Change) {
        match change {
            Change::InForce => self.in_force = true,
            Change::Token(token) => {
                self.tokens.retain(|known| known.start != token.start);
                self.tokens.push(token);
            }
            Change::Allocation(address, allocation) => {
                self.allocations.retain(|known| known.address != address);
                self.allocations.extend(allocation.map(|allocation| (*allocation).clone()));
            }
            Change::Resting(address, freed) => {
                self.resting.retain(|known| *known != address);
                self.resting.extend(freed.map(|_| address));
            }
        }
    }
}

fn key(node: usize, pod: u32) -> AttachmentKey {
    AttachmentKey::new(&format!("n{node}p{pod}"), "eth0").unwrap()
}

fn request(node: usize, pod: u32) -> Request {
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

#[test]
fn a_joiner_gets_space_from_the_seed() {
    let mut sim = Sim::new("10.32.0.0/12", "n0", 2);
    assert_eq!(sim.reserve(0, 1), Ok("10.32.0.2".parse().unwrap()));
    assert_eq!(sim.reserve(1, 1), Err(IpamError::NotReady(WaitingFor::FirstContact)));
    sim.sync(0, 1);
    let asked = IpamError::NotReady(WaitingFor::Space { from: "n0".parse().unwrap() });
    assert_eq!(sim.reserve(1, 1), Err(asked));
    sim.run(1);
    let address = sim.reserve(1, 1).unwrap();
    let view = sim.nodes[0].allocator.view();
    let owner = view.ranges.iter().find(|(prefix, _)| prefix.contains(&address)).unwrap();
    assert_eq!(owner.1.as_str(), "n1");
    assert_eq!(sim.nodes[1].allocator.view().counts.owned, 1 << 18, "a quarter: half of an equal share");
}

#[test]
fn a_seed_without_state_waits_for_a_peer() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 2);
    assert_eq!(sim.reserve(0, 1), Err(IpamError::NotReady(WaitingFor::FirstContact)));
    // Also after a restart: what it stored is only what it was told by the flag.
    sim.crash(0, false);
    assert_eq!(sim.reserve(0, 1), Err(IpamError::NotReady(WaitingFor::FirstContact)));
    sim.sync(1, 0);
    assert!(sim.reserve(0, 1).is_ok());
    sim.crash(0, false);
    assert!(sim.reserve(0, 2).is_ok(), "a stored ring needs no contact");
}

#[test]
fn a_longer_seed_list_does_not_disturb_a_ring() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 3);
    sim.run(1);
    let before = sim.nodes[0].allocator.view().ranges;
    sim.seeds = "n0,n1,n2".into();
    (0..2).for_each(|at| sim.crash(at, false));
    let (name, disk) = (sim.nodes[2].name.clone(), Stored::default());
    sim.nodes[2].allocator = sim.boot(&name, disk.clone());
    sim.nodes[2].disk = disk;
    sim.nodes[2].items.clear();
    sim.hear(2, Vec::new());
    assert_eq!(sim.nodes[0].allocator.view().ranges, before);
    sim.converge();
    sim.run(1);
    assert!(sim.reserve(2, 1).is_ok(), "a new seed asks for space like a joiner");
}

#[test]
fn who_lost_its_disk_owns_what_it_had_not_given_away() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 3);
    sim.run(3);
    for at in 0..3 {
        assert!(sim.reserve(at, 1).is_ok());
    }
    let before: Vec<_> = sim.nodes.iter_mut().map(|node| node.allocator.view().own).collect();
    let node = &mut sim.nodes[0];
    (node.disk, node.items) = Default::default();
    let pods = std::mem::take(&mut node.pods);
    sim.crash(0, false);
    assert!(sim.reserve(0, 2).is_err());
    sim.run(3);
    assert_eq!(sim.nodes.iter_mut().map(|node| node.allocator.view().own).collect::<Vec<_>>(), before);
    assert_eq!(sim.reserve(0, 1).ok(), pods.get(&1).copied());
}

#[test]
fn a_full_universe_is_told_from_a_slow_one() {
    let mut sim = Sim::new("10.32.0.0/29", "n0", 3);
    let mut addresses = BTreeSet::new();
    // Six addresses, of which each node's bridge takes one.
    for pod in 0..20 {
        sim.run(3);
        for node in 0..3 {
            if let Ok(address) = sim.reserve(node, pod) {
                assert!(sim.nodes[node].allocator.activated(&key(node, pod)));
                assert!(addresses.insert(address), "{address} twice");
            }
        }
    }
    assert_eq!(addresses.len(), 3);
    let full = sim.reserve(1, 99).unwrap_err();
    assert!(matches!(full, IpamError::Full { .. }), "{full}");
    assert!(full.to_string().contains("10.32.0.0/29 is full: n0 owns"), "{full}");
    // One pod leaves anywhere: any node can have its address.
    let (at, pod) = (0..3).find_map(|at| Some((at, *sim.nodes[at].pods.keys().next()?))).unwrap();
    sim.apply(&Op::Release { node: at, pod });
    sim.run(31);
    let _ = sim.reserve((at + 1) % 3, 50);
    sim.run(3);
    assert!(sim.reserve((at + 1) % 3, 50).is_ok());
}

#[test]
fn thousands_of_nodes_fit_a_12() {
    let layout = Layout::new("10.32.0.0/12".parse().unwrap());
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let mut ring = Ring::new(layout);
    let mut nodes: Vec<Allocator> = Vec::new();
    let publish = |ring: &mut Ring, node: &mut Allocator| {
        let effects = node.effects();
        for item in &effects.publish {
            ring.merge(Token::from_item(item, &layout).ok().unwrap());
        }
        effects
    };
    for n in 0..3000 {
        let config = Config {
            name: format!("n{n}").parse().unwrap(),
            universe: layout.universe(),
            seeds: if n == 0 { "n0" } else { "" }.parse().unwrap(),
            has_bootstrap: n > 0,
        };
        let name = config.name.clone();
        // A joiner has heard of the greatest free range only, and asks for more than it can get.
        let best = ring.ranges().filter(|(_, token)| token.free).max_by_key(|(span, _)| span.size());
        let tokens: Vec<Token> = best.map(|(_, token)| token.clone()).into_iter().collect();
        let peers: Vec<KnownPeer> = tokens
            .iter()
            .map(|token| KnownPeer { name: token.owner.clone(), reachable: true, held: Vec::new() })
            .collect();
        let stored = Stored { in_force: n > 0, tokens, ..Stored::default() };
        let mut joiner = Allocator::new(config, stored, Found::default(), now).unwrap();
        joiner.on_peers(&peers, now);
        for (giver, body) in publish(&mut ring, &mut joiner).unicasts {
            let giver = &mut nodes[giver.as_str()[1..].parse::<usize>().unwrap()];
            giver.on_unicast(&name, &body, now);
            joiner.on_items(&publish(&mut ring, giver).publish, now);
        }
        assert!(joiner.reserve(request(n, 1), now).is_ok(), "node {n} got no address");
        publish(&mut ring, &mut joiner);
        nodes.push(joiner);
    }
    assert_eq!(ring.shares(false).len(), 3000);
    assert_eq!(coalesce(ring.ranges().map(|(span, _)| span)), [layout.whole()]);
}

#[test]
fn who_leaves_hands_everything_over() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 2);
    sim.run(1);
    let address = sim.reserve(0, 1).unwrap();
    sim.apply(&Op::Release { node: 0, pod: 1 });
    let heir = sim.nodes[0].allocator.heir().unwrap();
    assert_eq!(heir.as_str(), "n1");
    let now = sim.now;
    sim.nodes[0].allocator.leave(&heir, now);
    sim.flush(0);
    sim.run(1);
    assert_eq!(sim.nodes[1].allocator.view().counts.owned, 65_536);
    assert_eq!(sim.reserve(0, 2), Err(IpamError::Left));
    assert_eq!(sim.nodes[0].disk.allocations, []);
    assert_eq!(sim.nodes[0].disk.resting, Vec::<IpAddr>::new());
    assert!(sim.nodes[1].allocator.view().ranges.iter().any(|(prefix, _)| prefix.contains(&address)));
}

#[test]
fn addresses_are_reclaimed_from_veths() {
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let config = Config {
        name: "n0".parse().unwrap(),
        universe: "10.32.0.0/16".parse().unwrap(),
        seeds: "n0".parse().unwrap(),
        has_bootstrap: false,
    };
    let veth = |pod, address: &str| crate::types::VethAlias {
        attachment: key(0, pod),
        addresses: vec![address.parse().unwrap()],
        pod: PodRef::default(),
    };
    let found = Found {
        veths: vec![veth(1, "10.32.0.2"), veth(2, "10.32.0.4"), veth(3, "10.32.0.4"), veth(4, "192.0.2.1")],
        bridge: Some("10.32.0.3".parse().unwrap()),
        rebooted: false,
    };
    let mut allocator = Allocator::new(config.clone(), Stored::default(), found, now).unwrap();
    let view = allocator.view();
    assert_eq!(view.bridge, Some("10.32.0.3".parse().unwrap()), "pods know it as their gateway");
    assert_eq!(view.allocations.len(), 3);
    assert!(view.reserved.is_empty(), "what has a veth is active");
    assert_eq!(
        allocator.reserve(request(0, 1), now).unwrap().address,
        "10.32.0.2".parse::<IpAddr>().unwrap()
    );
    let next =
        |allocator: &mut Allocator, pod| allocator.reserve(request(0, pod), now).unwrap().address.to_string();
    assert_eq!(next(&mut allocator, 5), "10.32.0.1");
    assert_eq!(next(&mut allocator, 6), "10.32.0.5");

    // The node reboots: pods without a veth are gone, and their addresses rest.
    let mut disk = Stored::default();
    allocator.effects().changes.into_iter().for_each(|change| disk.apply(change));
    let rebooted = Found { veths: vec![veth(6, "10.32.0.5")], bridge: None, rebooted: true };
    let mut allocator = Allocator::new(config, disk, rebooted, now).unwrap();
    let owners: Vec<Owner> = allocator.view().allocations.values().map(|a| a.owner.clone()).collect();
    assert_eq!(owners, [Owner::Bridge, Owner::Pod(key(0, 6))]);
    assert_eq!(next(&mut allocator, 7), "10.32.0.6");
}

#[test]
fn a_pod_on_a_lost_address_is_held_and_the_new_owner_leaves_it_alone() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 2);
    sim.run(1);
    // n1 lost its disk and has come back with a veth on an address of n0's.
    let now = sim.now;
    let veth = crate::types::VethAlias {
        attachment: key(1, 1),
        addresses: vec!["10.32.0.2".parse().unwrap()],
        pod: PodRef::default(),
    };
    let found = Found { veths: vec![veth], bridge: None, rebooted: false };
    let config = Config {
        name: "n1".parse().unwrap(),
        universe: sim.layout.universe(),
        seeds: "n0,n1".parse().unwrap(),
        has_bootstrap: true,
    };
    sim.nodes[1].allocator = Allocator::new(config, Stored::default(), found, now).unwrap();
    let held = sim.nodes[1].allocator.view().held;
    assert_eq!(held, ["10.32.0.2".parse::<IpAddr>().unwrap()]);
    let peers = sim.peers();
    sim.nodes[0].allocator.on_peers(&peers, now);
    assert_eq!(sim.reserve(0, 1), Ok("10.32.0.3".parse().unwrap()));
    let wanted = Request { wanted: held, ..request(0, 2) };
    let refused = sim.nodes[0].allocator.reserve(wanted, now).unwrap_err();
    assert_eq!(refused.to_string(), "10.32.0.2 was asked for, but it is in use by a pod on n1");
}

#[test]
fn a_wanted_address_is_given_or_refused_with_the_reason() {
    let mut sim = Sim::new("10.32.0.0/24", "n0,n1", 2);
    sim.run(1);
    let now = sim.now;
    let mut ask = |wanted: &[&str], ranges: &[&str], pod| {
        let parse = |text: &&str| text.parse().unwrap();
        let wanted = wanted.iter().map(parse).collect();
        let ranges = ranges.iter().map(|text| text.parse().unwrap()).collect();
        let request = Request { wanted, ranges, ..request(0, pod) };
        sim.nodes[0].allocator.reserve(request, now).map(|a| a.address.to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(ask(&["10.32.0.9"], &[], 1).unwrap(), "10.32.0.9");
    assert_eq!(ask(&[], &[], 1).unwrap(), "10.32.0.9", "the same attachment");
    assert_eq!(ask(&[], &["10.32.0.64/28"], 2).unwrap(), "10.32.0.64");
    for (wanted, ranges, reason) in [
        (&["10.32.0.9"][..], &[][..], "in use by / (n0p1/eth0)"),
        (&["10.32.0.1"], &[], "in use by the bridge"),
        (&["10.32.0.0"], &[], "first or last address"),
        (&["10.32.0.200"], &[], "but n1 owns it"),
        (&["10.9.0.1"], &[], "10.32.0.0/24 (--universe) does not hold it"),
        (&["fd00::1"], &[], "does not hold it"),
        (&["10.32.0.11", "10.32.0.12"], &[], "only one address"),
        (&[], &["10.32.0.128/28"], "lies in the ranges asked for: 10.32.0.128/28"),
        (&[], &["192.0.2.0/24"], "lies in the ranges asked for: 192.0.2.0/24"),
    ] {
        let refused = ask(wanted, ranges, 3).unwrap_err();
        assert!(refused.contains(reason), "{refused}");
    }
    assert!(ask(&["10.32.0.10"], &[], 1).unwrap_err().contains("has 10.32.0.9 already"));
}

#[test]
fn a_reservation_that_is_not_activated_times_out() {
    let mut sim = Sim::new("10.32.0.0/24", "n0", 1);
    let (one, two) = (sim.reserve(0, 1).unwrap(), sim.reserve(0, 2).unwrap());
    assert!(sim.nodes[0].allocator.activated(&key(0, 1)));
    sim.wait(59);
    assert_eq!(sim.reserve(0, 2), Ok(two), "asking again starts the time anew");
    sim.wait(59);
    assert!(sim.nodes[0].allocator.view().allocations.contains_key(&two));
    sim.wait(1);
    let view = sim.nodes[0].allocator.view();
    assert!(view.allocations.contains_key(&one) && view.resting.contains(&two));
}
