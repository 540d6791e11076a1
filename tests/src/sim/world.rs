//! Topology and addresses together: the real allocator beside the real mesh on each node, over the made-up network.
//!
//! ```text
//!   Mesh ──items, unicasts, joined──▶ Node (App) ──▶ Allocator      as `run/switchboard.rs` carries them
//!    │                                  ▲  │ effects: to the disk first, then published and sent
//!    └───── peers, reachable ───────────╯  ▼
//!           as `run/steering.rs` tells    Stored: all that a restart has
//! ```

use super::{
    all_equal,
    keys::Keys,
    net::{self, App, Outbox, Sim},
    running,
};
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use weft::{
    identity::{Checker, Sealer, task::Current},
    ipam::{
        Allocator, Config, Found, IpamError, KnownPeer, Now, Owner, Request, Stored, deed,
        ring::Ring,
        seed::SeedPlan,
        span::Layout,
        token::{self, Token},
    },
    mesh::{
        gossip::{Gossiper, Item},
        machine::{Input, Mesh},
        peers::PeerRecord,
    },
    types::{AttachmentKey, PeerName, PodRef, Universe},
};

/// A node's allocator, its disk, and its pods.
pub struct Node {
    name: PeerName,
    seeds: SeedPlan,
    identity: Option<Current>,
    pub allocator: Allocator,
    disk: Stored,
    known: Vec<KnownPeer>,
    /// News of peers have come; what comes until then is looked at together.
    steer_at: Option<Instant>,
    start: Instant,
    /// Pods that were told their address, which they have until they are released.
    pods: BTreeMap<AttachmentKey, IpAddr>,
    pods_so_far: u32,
}

impl Node {
    fn new(
        name: &str,
        seeds: &SeedPlan,
        identity: Option<Current>,
        disk: Stored,
        start: Instant,
        now: Instant,
    ) -> Self {
        let name: PeerName = name.parse().expect("a name");
        let allocator = boot(&name, seeds, identity.clone(), disk.clone(), stamp(start, now));
        let (known, steer_at, pods, pods_so_far) = Default::default();
        Self {
            name,
            seeds: seeds.clone(),
            identity,
            allocator,
            disk,
            known,
            steer_at,
            start,
            pods,
            pods_so_far,
        }
    }

    /// The process ended and comes back with what was written.
    fn reboot(&mut self, now: Instant) {
        self.allocator =
            boot(&self.name, &self.seeds, self.identity.clone(), self.disk.clone(), self.now(now));
        self.known.clear();
        for key in self.pods.keys() {
            assert!(self.allocator.activated(key), "{} forgot {key}", self.name);
        }
    }

    fn attach(&mut self, now: Instant, out: &mut Outbox) -> Result<IpAddr, IpamError> {
        self.pods_so_far += 1;
        let key = AttachmentKey::new(&format!("{}-{}", self.name, self.pods_so_far), "eth0").expect("a key");
        let pod = PodRef::default();
        let request = Request { key: key.clone(), pod, wanted: Vec::new(), ranges: Vec::new(), mac: None };
        let reserved = self.allocator.reserve(request, self.now(now));
        self.flush(out);
        let address = reserved?.address;
        self.allocator.activated(&key);
        self.pods.insert(key, address);
        Ok(address)
    }

    /// Hands everything to a peer, for good.
    pub fn leave(&mut self, now: Instant, out: &mut Outbox) {
        if let Some(heir) = self.allocator.heir() {
            self.allocator.leave(&heir, self.now(now));
            self.flush(out);
        }
    }

    fn detach(&mut self, key: &AttachmentKey, now: Instant, out: &mut Outbox) {
        self.pods.remove(key);
        self.allocator.release(key, self.now(now));
        self.flush(out);
    }

    /// Whom it knows, and whom of them its probes reach.
    fn steer(&mut self, mesh: &Mesh, answering: &[bool], now: Instant, out: &mut Outbox) {
        let known = |record: &Arc<PeerRecord>| KnownPeer {
            name: record.name.clone(),
            reachable: number(&record.name).is_some_and(|n| answering.get(n) == Some(&true)),
            held: record.held.clone(),
            incarnation: record.incarnation,
            deaths_digest: record.deaths_digest,
            absent: record.absent.clone(),
            left: false,
        };
        let left = || mesh.peers().left().cloned().map(KnownPeer::gone);
        let known = || mesh.peers().others().map(known).chain(left());
        // Mostly nothing of all this has changed: a list for each look would take half of a large network's time.
        let mut before = self.known.iter();
        if !known().all(|peer| before.next() == Some(&peer)) || before.next().is_some() {
            self.known = known().collect();
            self.allocator.on_peers(&self.known, self.now(now));
            self.flush(out);
        }
    }

    /// Writes, then publishes and sends, as the allocator's task does.
    fn flush(&mut self, out: &mut Outbox) {
        let effects = self.allocator.effects();
        effects.changes.into_iter().for_each(|change| self.disk.apply(change));
        if !effects.publish.is_empty() {
            out.inputs.push(Input::Publish(effects.publish));
        }
        let unicast = |(to, body)| Input::Unicast { to, channel: token::CHANNEL.into(), body };
        out.inputs.extend(effects.unicasts.into_iter().map(unicast));
    }

    fn now(&self, now: Instant) -> Now {
        stamp(self.start, now)
    }
}

fn nobody_died() -> deed::Takeovers {
    tokio::sync::watch::channel(Default::default()).1
}

impl App for Node {
    fn gossipers(&self) -> Vec<Box<dyn Gossiper>> {
        let checker = self.identity.clone().map(|current| (Checker::new(current), nobody_died()));
        vec![Box::new(token::RingGossiper::new(Layout::new(universe()), checker))]
    }

    fn identity(&self) -> Option<Current> {
        self.identity.clone()
    }

    fn seeds(&self) -> Vec<PeerName> {
        self.seeds.names().into()
    }

    fn learned_seeds(&mut self, seeds: Vec<PeerName>, out: &mut Outbox) {
        self.seeds = seeds.into_iter().collect();
        self.allocator.on_seeds(self.seeds.clone());
        self.flush(out);
    }

    fn contact(&mut self, now: Instant, out: &mut Outbox) {
        self.allocator.on_contact(self.now(now));
        self.flush(out);
    }

    fn items(&mut self, channel: &str, items: Vec<Item>, now: Instant, out: &mut Outbox) {
        if channel == token::CHANNEL {
            self.allocator.on_items(&items, self.now(now));
            self.flush(out);
        }
    }

    fn unicast(&mut self, from: PeerName, channel: &str, body: Vec<u8>, now: Instant, out: &mut Outbox) {
        if channel == token::CHANNEL {
            self.allocator.on_unicast(&from, &body, self.now(now));
            self.flush(out);
        }
    }

    fn peers_changed(&mut self, now: Instant) {
        let waits = self.disk.allocations.is_empty();
        let wait = if waits { STEERING } else { CALM_STEERING };
        self.steer_at.get_or_insert(now + wait);
    }

    fn looks(&self, now: Instant) -> bool {
        self.steer_at.is_some_and(|at| at <= now)
    }

    fn wake(&mut self, mesh: &Mesh, answering: &[bool], now: Instant, out: &mut Outbox) {
        if self.looks(now) {
            self.steer_at = None;
            self.steer(mesh, answering, now, out);
        }
        self.allocator.tick(self.now(now));
        self.flush(out);
    }

    fn next_wake(&self) -> Option<Instant> {
        [self.allocator.next_wake(), self.steer_at].into_iter().flatten().min()
    }
}

fn boot(name: &PeerName, seeds: &SeedPlan, identity: Option<Current>, stored: Stored, now: Now) -> Allocator {
    let config = Config {
        name: name.clone(),
        universe: universe(),
        seeds: seeds.clone(),
        sealer: identity.map(Sealer::new),
        has_bootstrap: seeds.names().first() != Some(name),
        seeding: weft::ipam::Seeding::Given,
        assigned: None,
    };
    Allocator::new(config, stored, Found::default(), now).expect("there are fewer seeds than blocks")
}

/// As the seeds' shares are, once each has taken an address of its own for its bridge.
fn equal_shares(layout: Layout, names: &[PeerName]) -> Vec<Token> {
    let mut used = BTreeSet::new();
    let mut tokens = Ring::genesis(layout, names).expect("there are fewer nodes than blocks");
    for token in &mut tokens {
        token.free = !used.insert(token.owner.clone()) || token.span().size() > layout.unit();
    }
    tokens
}

fn stamp(start: Instant, now: Instant) -> Now {
    Now { at: now, unix_ms: (now - start).as_millis() as u64 }
}

pub fn universe() -> Universe {
    "10.32.0.0/12".parse().expect("a universe")
}

/// A network of nodes with pods that come and go, and what must hold of it at any time.
pub struct World {
    pub sim: Sim<Node>,
    /// Keys of everybody, where there are any.
    keys: Option<Keys>,
    seed: u64,
    pub rng: ChaCha8Rng,
    start: Instant,
    /// Who has which address now.
    used: BTreeMap<IpAddr, usize>,
    pub refused: usize,
    pub attached: usize,
}

impl World {
    /// `seeds` nodes that share the universe from the start.
    pub fn new(seed: u64, seeds: usize, keys: Option<Keys>) -> Self {
        let mut world = Self::empty(seed, keys);
        let plan: SeedPlan = (0..seeds).map(|n| name(n).parse().expect("a name")).collect();
        (0..seeds).for_each(|n| world.join(if n == 0 { &[] } else { &[0] }, &plan));
        world
    }

    /// A network that has been there before and starts again, without keys: each node knows all the others, and what is whose.
    pub fn acquainted(seed: u64, nodes: usize) -> Self {
        let mut world = Self::empty(seed, None);
        let names: Vec<PeerName> = (0..nodes).map(|n| name(n).parse().expect("a name")).collect();
        let records: Vec<_> =
            names.iter().enumerate().map(|(n, name)| world.sim.first_record(name, net::address(n))).collect();
        let layout = Layout::new(universe());
        let tokens = equal_shares(layout, &names);
        let shares: BTreeMap<_, _> =
            tokens.iter().map(|token| (token.start, Arc::new(token.clone()))).collect();
        let items: Vec<_> = tokens
            .iter()
            .map(|token| token.to_item(&layout))
            .chain(records.iter().map(PeerRecord::to_item))
            .collect();
        for own in &records {
            let others = records.iter().filter(|record| record.name != own.name);
            let members = others.map(|record| (record.name.clone(), record.incarnation)).collect();
            let disk = Stored { in_force: true, tokens: shares.clone(), members, ..Stored::default() };
            let before: Vec<_> = world.sim.nodes.len().checked_sub(1).into_iter().collect();
            world.start(&before, &SeedPlan::default(), disk, items.clone());
        }
        world
    }

    fn empty(seed: u64, keys: Option<Keys>) -> Self {
        let sim = Sim::new(seed);
        let (rng, start) = (ChaCha8Rng::seed_from_u64(seed), sim.now);
        let (used, refused, attached) = Default::default();
        Self { sim, keys, seed, rng, start, used, refused, attached }
    }

    pub fn join(&mut self, bootstrap: &[usize], seeds: &SeedPlan) {
        self.start(bootstrap, seeds, Stored::default(), Vec::new());
    }

    fn start(&mut self, bootstrap: &[usize], seeds: &SeedPlan, disk: Stored, items: Vec<Item>) {
        let name = name(self.sim.nodes.len());
        let identity = self.keys.as_ref().map(|keys| keys.of(&name));
        let node = Node::new(&name, seeds, identity, disk, self.start, self.sim.now);
        let n = self.sim.start_knowing(&name, bootstrap, items, node);
        self.sim.call(n, |app, _, out| app.flush(out));
    }

    /// A pod is attached or detached on any node.
    fn churn(&mut self) {
        let alive: Vec<_> = running(&self.sim).collect();
        let n = *alive.choose(&mut self.rng).expect("somebody runs");
        if self.rng.random_bool(0.6) {
            self.attach(n);
        } else {
            let pods: Vec<_> = self.sim.nodes[n].app.pods.keys().cloned().collect();
            if let Some(key) = pods.choose(&mut self.rng) {
                let address = self.sim.nodes[n].app.pods[key];
                assert_eq!(self.used.remove(&address), Some(n));
                self.sim.call(n, |app, now, out| app.detach(key, now, out));
            }
        }
    }

    /// Gives a pod of a node an address, if it has one.
    pub fn attach(&mut self, n: usize) -> bool {
        match self.sim.call(n, |app, now, out| app.attach(now, out)) {
            Ok(address) => {
                let other = self.used.insert(address, n);
                assert_eq!(other, None, "seed {}: {address} is handed out twice, last by {n}", self.seed);
                self.attached += 1;
                true
            }
            Err(IpamError::NotReady(_)) => {
                self.refused += 1;
                false
            }
            Err(error) => panic!("seed {}: node {n}: {error}", self.seed),
        }
    }

    /// Nobody believes to own what another owns, and nobody has lost an address that is in use.
    pub fn check(&mut self) {
        let layout = Layout::new(universe());
        let mut owned = Vec::new();
        for (n, node) in self.sim.nodes.iter_mut().enumerate() {
            let view = node.app.allocator.view();
            assert_eq!(view.held, Vec::<IpAddr>::new(), "seed {}: node {n} lost what is in use", self.seed);
            for address in node.app.pods.values() {
                assert!(
                    view.allocations.contains_key(address),
                    "seed {}: node {n} forgot {address}",
                    self.seed
                );
            }
            let pods = view.allocations.values().filter(|a| a.owner != Owner::Bridge).count();
            assert_eq!(pods, node.app.pods.len(), "seed {}: node {n}", self.seed);
            owned.extend(view.own.iter().map(|prefix| (layout.span(*prefix).expect("in the universe"), n)));
        }
        owned.sort();
        for pair in owned.windows(2) {
            assert!(pair[0].0.last < pair[1].0.first, "seed {}: two own the same: {pair:?}", self.seed);
        }
    }

    /// Runs for so long, with pods coming and going.
    pub fn live(&mut self, time: Duration) {
        let end = self.sim.now + time;
        while self.sim.now < end {
            self.sim.run(SECOND / 20);
            (0..3).for_each(|_| self.churn());
        }
        self.check();
    }

    pub fn restart(&mut self, n: usize) {
        let now = self.sim.now;
        self.sim.kill(n);
        self.sim.nodes[n].app.reboot(now);
        let bootstrap = usize::from(n == 0);
        self.sim.revive(n, &[bootstrap], Vec::new());
        self.sim.call(n, |app, _, out| app.flush(out));
    }

    /// Everybody has addresses to hand out.
    pub fn all_have_space(&mut self, within: Duration) -> Duration {
        self.sim.expect("all have addresses to hand out", within, |sim| {
            running(sim).all(|n| !sim.nodes[n].app.disk.allocations.is_empty())
        })
    }

    /// All have one ring, which holds the whole universe.
    pub fn agrees(&mut self) {
        let took = self.sim.expect("all replicas are equal", SECOND * 60, all_equal);
        self.check();
        let ranges = self.sim.nodes[0].app.allocator.view().ranges;
        let size: u128 = ranges.iter().map(|(prefix, _)| 1 << (32 - prefix.prefix_len())).sum();
        assert_eq!(size, 1 << 20, "seed {}: space is conserved", self.seed);
        for node in &mut self.sim.nodes {
            assert_eq!(
                node.app.allocator.view().ranges,
                ranges,
                "seed {}: {} disagrees",
                self.seed,
                node.name
            );
        }
        let owners: BTreeSet<_> = ranges.iter().map(|(_, owner)| owner.clone()).collect();
        assert_eq!(owners.len(), self.sim.nodes.len(), "seed {}: everybody owns something", self.seed);
        println!("seed {}: all agree after {took:?}", self.seed);
    }
}

pub fn name(n: usize) -> String {
    format!("node-{n}")
}

fn number(name: &PeerName) -> Option<usize> {
    name.as_str().strip_prefix("node-")?.parse().ok()
}

pub const SECOND: Duration = Duration::from_secs(1);
/// How long an agent takes to look at its peers when it waits for addresses, and when it has some. A real one looks at once.
const STEERING: Duration = Duration::from_millis(20);
const CALM_STEERING: Duration = Duration::from_secs(1);
