//! A few nodes, one step of one of them at a time: the real allocator, without time or network, for whoever chooses the steps
//! (`model.rs` all there are, `reference.rs` at random).
//!
//! ```text
//!   Nodes ──Step──▶ Nodes      a step begins from the disk, as after a restart, and writes to it
//! ```
//! Nobody has to be cut off: who is is told nothing for a while, as may happen here at any time.

use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
    net::IpAddr,
    time::Instant,
};
use weft::{
    ipam::{
        Allocator, Config, Found, KnownPeer, Now, Request, Seeding, Stored,
        death::{self, Death},
        ring::Ring,
        seed::SeedPlan,
        span::{Layout, Span},
        token::Token,
    },
    mesh::gossip::Item,
    types::{AttachmentKey, Incarnation, PeerName, PodRef, Prefix},
};
use weft_lab::sim::world::name;
use weft_proto::mesh::SpaceRequest;

/// What stays as it is.
pub struct Rules {
    pub layout: Layout,
    pub seeds: SeedPlan,
    /// Who is declared dead may live: then it is only promised that all agree once they hear of it.
    pub by_force: bool,
    now: Now,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Nodes(pub Vec<Node>);

/// A node between two steps: what is on its disk, and what it has heard.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    pub lives: bool,
    pub incarnation: u64,
    pub disk: Stored,
    /// Somebody has told it what happened while it was away.
    pub contact: bool,
    records: BTreeMap<usize, Record>,
    /// What it believes to own, and uses.
    pub own: Vec<Prefix>,
    pub used: Vec<IpAddr>,
}

/// What a peer says of itself: the later counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Record {
    incarnation: u64,
    version: u64,
    deaths: u64,
    held: Vec<IpAddr>,
    absent: Vec<(PeerName, Incarnation)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    Tell {
        from: usize,
        to: usize,
        what: What,
    },
    Ask {
        from: usize,
        to: usize,
    },
    /// A pod comes, with a number, or goes.
    Attach {
        node: usize,
        pod: u32,
    },
    Detach {
        node: usize,
        pod: u32,
    },
    Crash(usize),
    Return(usize),
    /// Who has come back hears all that another one knows.
    Meet {
        node: usize,
        via: usize,
    },
    /// An operator declares a node dead, and those with it that do not answer either.
    Forget {
        by: usize,
        dead: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    Tokens,
    Deaths,
    Records,
}

impl Rules {
    pub fn new(universe: &str, seeds: usize, by_force: bool) -> Self {
        Self {
            layout: Layout::new(universe.parse().expect("a universe")),
            seeds: (0..seeds).map(peer).collect(),
            by_force,
            now: Now { at: Instant::now(), unix_ms: 0 },
        }
    }

    /// Nodes that have met, the seeds among them with their shares.
    pub fn begin(&self, count: usize) -> Nodes {
        let node = Node { lives: true, incarnation: 1, contact: true, ..Node::default() };
        let mut nodes = Nodes(vec![node; count]);
        (0..count).for_each(|n| self.work(&mut nodes, n, Found::default(), |_| {}));
        self.meet(&mut nodes, &Vec::from_iter(0..count));
        nodes
    }

    /// Whether it can happen now.
    pub fn allow(&self, nodes: &Nodes, step: Step) -> bool {
        let lives = |n: usize| nodes.0[n].lives;
        match step {
            Step::Tell { from, to, .. } | Step::Ask { from, to } => from != to && lives(from) && lives(to),
            Step::Attach { node, .. } | Step::Detach { node, .. } => lives(node),
            Step::Crash(node) => lives(node) && (0..nodes.0.len()).any(|n| n != node && lives(n)),
            Step::Return(node) => !lives(node),
            Step::Meet { node, via } => {
                let nobody_knows = || nodes.0.iter().all(|n| !n.contact && n.disk.kept.is_empty());
                let knows = nodes.0[via].contact || nobody_knows();
                node != via && lives(node) && lives(via) && !nodes.0[node].contact && knows
            }
            Step::Forget { by, dead } if self.by_force => by != dead && lives(by),
            Step::Forget { by, dead } => {
                let node = &nodes.0[by];
                let is_known = !self.is_covered(node, dead) || self.may_repeat(nodes, node, by, dead);
                by != dead && lives(by) && !lives(dead) && is_known && self.is_met(nodes, by)
            }
        }
    }

    /// What has been forgotten may be once more where something is left, and its taker does not answer.
    fn may_repeat(&self, nodes: &Nodes, node: &Node, by: usize, dead: usize) -> bool {
        let last = deaths(node).filter(|death| death.peer == peer(dead)).max_by_key(|death| death.epoch);
        let is_lost = last.is_some_and(|last| {
            let taker = (0..nodes.0.len()).find(|n| peer(*n) == last.taker).expect("a node");
            taker == by || !nodes.0[taker].lives
        });
        is_lost && !self.ring(node).owned_by(&peer(dead)).is_empty()
    }

    /// Whether all that live are known to this node, or to one that is. Whom nobody knows that it can ask, an operator has to think
    /// of himself.
    fn is_met(&self, nodes: &Nodes, by: usize) -> bool {
        let (mut met, mut asked) = (BTreeSet::from([by]), BTreeSet::new());
        while let Some(&next) = met.difference(&asked).next() {
            asked.insert(next);
            let lives = |n: &usize| {
                let (node, heard) = (&nodes.0[*n], nodes.0[next].disk.members.get(&peer(*n)));
                node.lives && heard == Some(&Incarnation(node.incarnation))
            };
            met.extend((0..nodes.0.len()).filter(lives));
        }
        nodes.0.iter().enumerate().all(|(n, node)| !node.lives || !node.contact || met.contains(&n))
    }

    fn is_covered(&self, node: &Node, other: usize) -> bool {
        let incarnation = self.incarnation(node, other);
        deaths(node).any(|death| death.peer == peer(other) && incarnation <= death.incarnation)
    }

    fn incarnation(&self, node: &Node, other: usize) -> Incarnation {
        let heard = node.records.get(&other).map(|record| Incarnation(record.incarnation));
        heard.max(node.disk.members.get(&peer(other)).copied()).unwrap_or_default()
    }

    pub fn ring(&self, node: &Node) -> Ring {
        let mut ring = Ring::new(self.layout, None);
        node.disk.tokens.values().for_each(|token| _ = ring.merge(token.clone()));
        ring
    }

    pub fn take(&self, nodes: &mut Nodes, step: Step) {
        match step {
            Step::Tell { from, to, what } => self.tell(nodes, from, to, what),
            Step::Ask { from, to } => {
                let request = SpaceRequest { count: 1, urgent: true }.encode_to_vec();
                self.step(nodes, to, |allocator| allocator.on_unicast(&peer(from), &request, self.now));
            }
            Step::Attach { node, pod } => {
                let (key, wanted, ranges) = (key(node, pod), Vec::new(), Vec::new());
                let request = Request { key, pod: PodRef::default(), wanted, ranges, mac: None };
                self.step(nodes, node, |allocator| _ = allocator.reserve(request, self.now));
            }
            Step::Detach { node, pod } => {
                self.step(nodes, node, |allocator| _ = allocator.release(&key(node, pod), self.now));
            }
            Step::Crash(n) => {
                let Node { incarnation, disk, .. } = std::mem::take(&mut nodes.0[n]);
                nodes.0[n] = Node { incarnation, disk, ..Node::default() };
            }
            Step::Return(node) => {
                nodes.0[node].lives = true;
                nodes.0[node].incarnation += 1;
                self.work(nodes, node, Found { rebooted: true, ..Found::default() }, |_| {});
            }
            Step::Meet { node, via } => {
                self.tell_all(nodes, via, node);
                nodes.0[node].contact = true;
                self.step(nodes, node, |_| {});
                self.tell(nodes, node, via, What::Records);
            }
            Step::Forget { by, dead } => {
                let is_lost = |n: usize| n == dead || !self.by_force && !nodes.0[n].lives;
                let named = (0..nodes.0.len()).filter(|n| *n != by && is_lost(*n));
                let named = named.filter(|n| *n == dead || !self.is_covered(&nodes.0[by], *n));
                let deaths: Vec<Item> = self.deaths(&nodes.0[by], by, named.collect());
                self.step(nodes, by, |allocator| allocator.forget(&deaths, self.now));
            }
        }
    }

    /// Those who live hear each other, in this order, until there is nothing new.
    pub fn meet(&self, nodes: &mut Nodes, order: &[usize]) {
        loop {
            let before = nodes.clone();
            for &from in order {
                for &to in order {
                    if from != to && nodes.0[from].lives && nodes.0[to].lives {
                        self.tell_all(nodes, from, to);
                        if !std::mem::replace(&mut nodes.0[to].contact, true) {
                            self.step(nodes, to, |_| {});
                        }
                    }
                }
            }
            if *nodes == before {
                return;
            }
        }
    }

    /// No address has two owners, nor two users, among those who live. Who has come back uses nothing until it has met somebody.
    pub fn is_unique(&self, nodes: &Nodes) -> bool {
        let mut used: Vec<IpAddr> = living(nodes).flat_map(|node| node.used.iter().copied()).collect();
        used.sort();
        self.one_owns(nodes) && used.windows(2).all(|pair| pair[0] != pair[1])
    }

    pub fn one_owns(&self, nodes: &Nodes) -> bool {
        let mut owned: Vec<Span> = living(nodes).flat_map(|node| self.owned_by(node)).collect();
        owned.sort();
        owned.windows(2).all(|pair| pair[0].last < pair[1].first)
    }

    pub fn owned_by(&self, node: &Node) -> Vec<Span> {
        node.own.iter().map(|prefix| self.layout.span(*prefix).expect("in the universe")).collect()
    }

    fn tell_all(&self, nodes: &mut Nodes, from: usize, to: usize) {
        for what in [What::Deaths, What::Tokens, What::Records] {
            self.tell(nodes, from, to, what);
        }
    }

    fn tell(&self, nodes: &mut Nodes, from: usize, to: usize, what: What) {
        let (source, known) = (&nodes.0[from], &nodes.0[to]);
        let items: Vec<Item> = match what {
            What::Tokens => {
                let news = source.disk.tokens.values().filter(|token| !has(known, token));
                news.map(|token| token.to_item(&self.layout)).collect()
            }
            What::Deaths => {
                let knows = |item: &Item| known.disk.kept.iter().any(|(known, _)| known == item);
                source.disk.kept.iter().map(|(item, _)| item).filter(|item| !knows(item)).cloned().collect()
            }
            What::Records => {
                let later = |(n, record): &(&usize, &Record)| {
                    **n != to && known.records.get(n).is_none_or(|known| known < *record)
                };
                let news: Vec<_> =
                    source.records.iter().filter(later).map(|(n, r)| (*n, r.clone())).collect();
                if !news.is_empty() {
                    nodes.0[to].records.extend(news);
                    self.step(nodes, to, |_| {});
                }
                return;
            }
        };
        if !items.is_empty() {
            self.step(nodes, to, |allocator| allocator.on_items(&items, self.now));
        }
    }

    /// As an agent makes them up for its operator.
    fn deaths(&self, of: &Node, by: usize, named: Vec<usize>) -> Vec<Item> {
        let epochs = of.disk.tokens.values().map(|token| token.epoch);
        let epoch = epochs.chain(deaths(of).map(|death| death.epoch)).max().unwrap_or(0) + 1;
        let known = death::digest(&deaths(of).collect::<Vec<_>>());
        let ring = self.ring(of);
        let item = |dead: usize| {
            let (peer, incarnation, taker) = (peer(dead), self.incarnation(of, dead), peer(by));
            let ranges =
                ring.owned_by(&peer).into_iter().flat_map(|span| self.layout.prefixes(span)).collect();
            Death { peer, incarnation, epoch, taker, forced: self.by_force, ranges, known }
                .to_item(Vec::new())
        };
        named.into_iter().map(item).collect()
    }

    fn step(&self, nodes: &mut Nodes, n: usize, work: impl FnOnce(&mut Allocator)) {
        self.work(nodes, n, Found::default(), work);
    }

    fn work(&self, nodes: &mut Nodes, n: usize, found: Found, work: impl FnOnce(&mut Allocator)) {
        let node = &mut nodes.0[n];
        let config = Config {
            name: peer(n),
            universe: self.layout.universe(),
            seeds: self.seeds.clone(),
            seeding: Seeding::Given,
            sealer: None,
            has_bootstrap: true,
            assigned: None,
        };
        let disk = node.disk.clone();
        let mut allocator = Allocator::new(config, disk, found, self.now).expect("fewer seeds than blocks");
        if node.contact {
            allocator.on_contact(self.now);
        }
        let others = node.records.iter().filter(|(other, _)| **other != n && !self.is_covered(node, **other));
        let known = |(other, record): (&usize, &Record)| KnownPeer {
            name: peer(*other),
            reachable: true,
            held: record.held.clone(),
            incarnation: Incarnation(record.incarnation),
            deaths_digest: record.deaths,
            absent: record.absent.clone(),
            left: false,
        };
        let others: Vec<_> = others.map(known).collect();
        allocator.on_peers(&others, self.now);
        work(&mut allocator);
        let disk = &mut node.disk;
        allocator.effects().changes.into_iter().for_each(|change| disk.apply(change));
        disk.kept.sort_by(|(a, _), (b, _)| a.key.cmp(&b.key));
        disk.allocations.sort_by_key(|allocation| allocation.address);
        disk.resting.clear();
        let view = allocator.view();
        (node.own, node.used) = (view.own, view.allocations.into_keys().collect());
        // Who hears of its own death says that it lives.
        let died = self::deaths(node).filter(|death| death.peer == peer(n)).map(|d| d.incarnation.0).max();
        node.incarnation = node.incarnation.max(died.map_or(0, |died| died + 1));
        let record = node.records.entry(n).or_default();
        let (incarnation, version, deaths) = (node.incarnation, record.version, view.deaths_digest);
        let next = Record { incarnation, version, deaths, held: view.held, absent: view.absent };
        if *record != next {
            *record = Record { version: version + 1, ..next };
        }
    }
}

impl Hash for Nodes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for node in &self.0 {
            (node.lives, node.incarnation, node.contact, &node.records, &node.own, &node.used).hash(state);
            for token in node.disk.tokens.values() {
                (token.start, token.end, &token.owner).hash(state);
                (token.epoch, token.hands, token.version, token.free).hash(state);
            }
            (node.disk.in_force, &node.disk.kept, &node.disk.members).hash(state);
        }
    }
}

fn living(nodes: &Nodes) -> impl Iterator<Item = &Node> {
    nodes.0.iter().filter(|node| node.lives && node.contact)
}

/// Whether a token is on a node's disk.
pub fn has(node: &Node, token: &Token) -> bool {
    node.disk.tokens.get(&token.start).is_some_and(|known| **known == *token)
}

/// Those that a node knows of.
pub fn deaths(node: &Node) -> impl Iterator<Item = Death> {
    node.disk.kept.iter().filter_map(|(item, _)| Death::from_item(item).ok())
}

pub fn peer(n: usize) -> PeerName {
    name(n).parse().expect("a name")
}

pub fn key(node: usize, pod: u32) -> AttachmentKey {
    AttachmentKey::new(&format!("{node}-{pod}"), "eth0").expect("a key")
}
