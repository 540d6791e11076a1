//! Every interleaving of a few nodes: what the allocator and the election promise is checked in all states that they can
//! reach, by the real code. Sizes are small; `sim.rs` and the simulator have large ones at random.

use super::{
    Allocator, Config, Found, KnownPeer, Now, Seeding, Stored,
    death::{self, Death},
    election::{Election, Vote},
    seed::seeds,
    span::{Layout, Span, coalesce},
};
use crate::{
    mesh::gossip::Item,
    types::{Incarnation, PeerName, Prefix},
};
use prost::Message;
use stateright::{Checker, Model, Property};
use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::IpAddr,
    time::Instant,
};
use weft_proto::mesh::SpaceRequest;

fn name(n: usize) -> PeerName {
    format!("n{n}").parse().unwrap()
}

/// Nodes that give each other space, are cut off, die, are forgotten and come back.
struct Ring {
    nodes: usize,
    seeds: &'static str,
    /// Who is declared dead may live: then it is only promised that all agree once they hear of it.
    by_force: bool,
    most: Budget,
    now: Now,
}

/// How often something may happen; or has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Budget {
    asks: u8,
    cuts: u8,
    crashes: u8,
    forgets: u8,
}

#[derive(Clone, Debug, PartialEq)]
struct World {
    nodes: Vec<Node>,
    /// Nobody reaches this one.
    cut: Option<usize>,
    spent: Budget,
}

/// A node between two steps: what is on its disk, and what it has heard. Each step begins from that, as after a restart.
#[derive(Clone, Debug, Default, PartialEq)]
struct Node {
    lives: bool,
    incarnation: u64,
    disk: Stored,
    contact: bool,
    /// The records that it knows: which incarnation knows of which deaths.
    records: BTreeMap<usize, (u64, u64)>,
    own: Vec<Prefix>,
    used: Vec<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Tell {
        from: usize,
        to: usize,
        what: What,
    },
    Ask {
        from: usize,
        to: usize,
    },
    Cut(usize),
    Heal,
    Crash(usize),
    /// It hears somebody before it does anything.
    Return {
        node: usize,
        via: usize,
    },
    Forget {
        by: usize,
        dead: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Tokens,
    Deaths,
    Records,
}

impl Ring {
    fn new(nodes: usize, seeds: &'static str, by_force: bool, most: Budget) -> Self {
        Self { nodes, seeds, by_force, most, now: Now { at: Instant::now(), unix_ms: 0 } }
    }

    fn layout(&self) -> Layout {
        Layout::new("10.32.0.0/30".parse().unwrap())
    }

    /// Has a node do something: begins from its disk, and writes to it.
    fn step(&self, world: &mut World, n: usize, work: impl FnOnce(&mut Allocator)) {
        let node = &world.nodes[n];
        let config = Config {
            name: name(n),
            universe: self.layout().universe(),
            seeds: seeds(self.seeds),
            seeding: Seeding::Given,
            sealer: None,
            has_bootstrap: true,
            assigned: None,
        };
        let mut allocator = Allocator::new(config, node.disk.clone(), Found::default(), self.now).unwrap();
        let known = |(n, (incarnation, deaths_digest)): (&usize, &(u64, u64))| KnownPeer {
            name: name(*n),
            reachable: true,
            held: Vec::new(),
            incarnation: Incarnation(*incarnation),
            deaths_digest: *deaths_digest,
        };
        let known: Vec<_> = node.records.iter().map(known).collect();
        if node.contact {
            allocator.on_contact(self.now);
        }
        allocator.on_peers(&known, self.now);
        work(&mut allocator);
        let effects = allocator.effects();
        let view = allocator.view();
        let node = &mut world.nodes[n];
        effects.changes.into_iter().for_each(|change| node.disk.apply(change));
        node.disk.tokens.sort_by_key(|token| token.start);
        node.disk.kept.sort_by(|a, b| a.0.key.cmp(&b.0.key));
        node.disk.allocations.sort_by_key(|allocation| allocation.address);
        node.disk.resting.clear();
        node.own = view.own;
        node.used = view.allocations.into_keys().collect();
        let record = (node.incarnation, view.deaths_digest);
        node.records.insert(n, record);
    }

    fn tell(&self, world: &mut World, from: usize, to: usize, what: What) {
        let source = world.nodes[from].clone();
        match what {
            What::Records => {
                for (n, record) in source.records {
                    let held = world.nodes[to].records.entry(n).or_insert(record);
                    // A record's version, which the model leaves out, grows with each digest: later ones win there.
                    if n == from || record.0 > held.0 {
                        *held = record;
                    }
                }
                self.step(world, to, |_| {});
            }
            What::Tokens => {
                let tokens: Vec<Item> =
                    source.disk.tokens.iter().map(|token| token.to_item(&self.layout())).collect();
                self.step(world, to, |allocator| allocator.on_items(&tokens, self.now));
            }
            What::Deaths => {
                let deaths: Vec<Item> = source.disk.kept.into_iter().map(|(item, _)| item).collect();
                self.step(world, to, |allocator| allocator.on_items(&deaths, self.now));
            }
        }
    }

    fn tell_all(&self, world: &mut World, from: usize, to: usize) {
        for what in [What::Deaths, What::Tokens, What::Records] {
            self.tell(world, from, to, what);
        }
    }

    /// What becomes of it when everybody hears everybody.
    fn healed(&self, world: &World) -> World {
        let mut world = world.clone();
        world.cut = None;
        for _ in 0..4 {
            for from in 0..self.nodes {
                for to in 0..self.nodes {
                    if from != to && world.nodes[from].lives && world.nodes[to].lives {
                        self.tell_all(&mut world, from, to);
                    }
                }
            }
        }
        world
    }

    fn agrees(&self, world: &World) -> bool {
        let healed = self.healed(world);
        let ring = |node: &Node| {
            let mut ring = super::ring::Ring::new(self.layout(), None);
            node.disk.tokens.iter().for_each(|token| _ = ring.merge(token.clone()));
            ring.routes()
        };
        let mut rings = healed.nodes.iter().filter(|node| node.lives).map(ring);
        let Some(first) = rings.next() else { return true };
        let spans = first.iter().map(|(prefix, _)| self.layout().span(*prefix).unwrap());
        coalesce(spans) == [self.layout().whole()]
            && rings.all(|ring| ring == first)
            && is_unique(self, &healed)
    }
}

impl World {
    fn reaches(&self, a: usize, b: usize) -> bool {
        let lives = |n: usize| self.nodes[n].lives;
        a != b && lives(a) && lives(b) && self.cut != Some(a) && self.cut != Some(b)
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.cut, self.spent).hash(state);
        for node in &self.nodes {
            (node.lives, node.incarnation, node.contact, &node.records, &node.own, &node.used).hash(state);
            for token in &node.disk.tokens {
                (token.start, token.end, &token.owner).hash(state);
                (token.epoch, token.hands, token.version, token.free).hash(state);
            }
            (node.disk.in_force, &node.disk.kept).hash(state);
        }
    }
}

/// No address has two owners, nor two users, among those who live.
fn is_unique(model: &Ring, world: &World) -> bool {
    let living = || world.nodes.iter().filter(|node| node.lives);
    let span = |prefix: &Prefix| model.layout().span(*prefix).unwrap();
    let mut owned: Vec<Span> = living().flat_map(|node| node.own.iter().map(span)).collect();
    let mut used: Vec<IpAddr> = living().flat_map(|node| node.used.iter().copied()).collect();
    owned.sort();
    used.sort();
    owned.windows(2).all(|pair| pair[0].last < pair[1].first)
        && used.windows(2).all(|pair| pair[0] != pair[1])
}

impl Model for Ring {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let nodes = vec![Node { lives: true, incarnation: 1, ..Node::default() }; self.nodes];
        let mut world = World { nodes, cut: None, spent: Budget::default() };
        for n in 0..self.nodes {
            world.nodes[n].contact = true;
            self.step(&mut world, n, |_| {});
        }
        vec![self.healed(&world)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let (all, spent) = (0..self.nodes, world.spent);
        for from in all.clone() {
            for to in all.clone().filter(|to| world.reaches(from, *to)) {
                let tells = [What::Tokens, What::Deaths, What::Records];
                actions.extend(tells.map(|what| Action::Tell { from, to, what }));
                if spent.asks < self.most.asks {
                    actions.push(Action::Ask { from, to });
                }
            }
        }
        for n in all.clone() {
            let lives = world.nodes[n].lives;
            if lives && world.cut.is_none() && spent.cuts < self.most.cuts {
                actions.push(Action::Cut(n));
            }
            if lives && spent.crashes < self.most.crashes {
                actions.push(Action::Crash(n));
            }
            if !lives {
                let vias =
                    all.clone().filter(|via| *via != n && world.nodes[*via].lives && world.cut != Some(*via));
                actions.extend(vias.map(|via| Action::Return { node: n, via }));
            }
            if spent.forgets < self.most.forgets {
                // Whoever may hear it can be asked, and does not; by force nobody is asked.
                let may = |by: usize| {
                    let others = all.clone().filter(|other| *other != n && *other != by);
                    let all_reached = others.into_iter().all(|other| world.reaches(by, other));
                    by != n && world.nodes[by].lives && (self.by_force || !lives && all_reached)
                };
                let by = all.clone().filter(|by| may(*by));
                actions.extend(by.map(|by| Action::Forget { by, dead: n }));
            }
        }
        if world.cut.is_some() {
            actions.push(Action::Heal);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Tell { from, to, what } => self.tell(&mut next, from, to, what),
            Action::Ask { from, to } => {
                next.spent.asks += 1;
                let request = SpaceRequest { count: 1, urgent: true }.encode_to_vec();
                self.step(&mut next, to, |allocator| allocator.on_unicast(&name(from), &request, self.now));
            }
            Action::Cut(n) => (next.cut, next.spent.cuts) = (Some(n), next.spent.cuts + 1),
            Action::Heal => next.cut = None,
            Action::Crash(n) => {
                next.spent.crashes += 1;
                let Node { incarnation, disk, .. } = next.nodes[n].clone();
                next.nodes[n] = Node { incarnation, disk, ..Node::default() };
            }
            Action::Return { node, via } => {
                next.nodes[node].incarnation += 1;
                next.nodes[node].lives = true;
                self.tell_all(&mut next, via, node);
                next.nodes[node].contact = true;
                self.step(&mut next, node, |_| {});
            }
            Action::Forget { by, dead } => {
                next.spent.forgets += 1;
                let (incarnation, _) = *next.nodes[by].records.get(&dead)?;
                let epoch = {
                    let disk = &next.nodes[by].disk;
                    let tokens = disk.tokens.iter().map(|token| token.epoch);
                    let deaths = disk.kept.iter().filter_map(|(item, _)| Death::from_item(item).ok());
                    tokens.chain(deaths.map(|death| death.epoch)).max().unwrap_or(0) + 1
                };
                let (peer, taker) = (name(dead), name(by));
                let forced = self.by_force;
                let death = Death { peer, incarnation: Incarnation(incarnation), epoch, taker, forced };
                let item = death.to_item(Vec::new());
                assert_eq!(item.channel, death::CHANNEL);
                self.step(&mut next, by, |allocator| allocator.forget(&[item], self.now));
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("once all hear all, they agree", |model: &Self, world: &World| {
                model.agrees(world)
            }),
            Property::sometimes("a dead node's addresses have another owner", |_, world: &World| {
                let dead = |node: &Node| !node.lives;
                world.nodes.iter().any(dead)
                    && world.nodes.iter().any(|node| node.disk.tokens.iter().any(|token| token.epoch > 0))
            }),
        ];
        if !self.by_force {
            properties.push(Property::always("no address has two owners", is_unique));
            properties.push(Property::sometimes(
                "who was forgotten comes back and owns again",
                |_, world: &World| {
                    let was_dead = |node: &Node| node.lives && node.incarnation > 1 && !node.own.is_empty();
                    world.nodes.iter().any(|node| was_dead(node) && !node.disk.kept.is_empty())
                },
            ));
        }
        properties
    }
}

fn check<M>(what: &str, model: M, most: usize)
where
    M: Model + Send + Sync + 'static,
    M::State: Hash + Clone + PartialEq + std::fmt::Debug + Send + Sync + 'static,
    M::Action: Clone + PartialEq + std::fmt::Debug + Send + Sync,
{
    let start = Instant::now();
    let checker = model.checker().threads(2).target_state_count(most).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{what}: {states} states, {depth} steps deep, in {:?}", start.elapsed());
    checker.assert_properties();
}

#[test]
fn no_address_has_two_owners_whoever_is_cut_off_dies_is_forgotten_and_comes_back() {
    let most = Budget { asks: 1, cuts: 1, crashes: 1, forgets: 1 };
    check("ring", Ring::new(3, "n0,n1", false, most), RING_STATES);
}

#[test]
fn two_who_forget_the_same_node_do_not_both_take_it_over() {
    let most = Budget { asks: 0, cuts: 1, crashes: 1, forgets: 2 };
    check("two takers", Ring::new(3, "n0,n1,n2", false, most), RING_STATES);
}

#[test]
fn who_was_wrongly_declared_dead_agrees_once_it_hears_of_it() {
    let most = Budget { asks: 1, cuts: 1, crashes: 1, forgets: 1 };
    check("by force", Ring::new(3, "n0,n1", true, most), RING_STATES);
}

/// Voters that propose, hear each other in any order, and restart.
struct Voters {
    count: usize,
    proposals: u8,
    restarts: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Ballots {
    elections: Vec<Election>,
    proposals: u8,
    restarts: u8,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Propose(usize),
    Hear { from: usize, to: usize },
    Restart(usize),
}

impl Model for Voters {
    type State = Ballots;
    type Action = Step;

    fn init_states(&self) -> Vec<Ballots> {
        let election = |n| Election::new(name(n), self.count, 64, Vote::default());
        let elections = (0..self.count).map(election).collect();
        vec![Ballots { elections, proposals: 0, restarts: 0 }]
    }

    fn actions(&self, state: &Ballots, steps: &mut Vec<Step>) {
        for from in 0..self.count {
            steps.extend((0..self.count).filter(|to| *to != from).map(|to| Step::Hear { from, to }));
            if state.proposals < self.proposals {
                steps.push(Step::Propose(from));
            }
            if state.restarts < self.restarts {
                steps.push(Step::Restart(from));
            }
        }
    }

    fn next_state(&self, state: &Ballots, step: Step) -> Option<Ballots> {
        let mut next = state.clone();
        match step {
            Step::Propose(n) => {
                next.proposals += 1;
                next.elections[n].propose();
            }
            Step::Hear { from, to } => {
                let vote = next.elections[from].own().clone();
                next.elections[to].hear(&name(from), vote);
                next.elections[to].think();
            }
            Step::Restart(n) => {
                next.restarts += 1;
                let vote = next.elections[n].own().clone();
                next.elections[n] = Election::new(name(n), self.count, 64, vote);
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("all that is decided is the same", |_, state: &Ballots| {
                let mut decided = state.elections.iter().filter_map(Election::decided);
                let first = decided.next();
                decided.all(|names| Some(names) == first)
            }),
            Property::sometimes("something is decided", |_, state: &Ballots| {
                state.elections.iter().any(|election| election.decided().is_some())
            }),
        ]
    }
}

#[test]
fn voters_never_decide_two_things() {
    check("election of 3", Voters { count: 3, proposals: 2, restarts: 1 }, ELECTION_STATES);
    check("election of 4", Voters { count: 4, proposals: 2, restarts: 0 }, ELECTION_STATES);
}

/// Beyond, the rest is left to chance (`sim.rs`): each test takes some seconds.
const RING_STATES: usize = 150_000;
const ELECTION_STATES: usize = 1_000_000;
