//! Elections of who shares the universe, in every interleaving of a few voters: the state machine alone, and whole allocators
//! with their disks, which keep what was promised.

use crate::{
    model::{ALL, check},
    steps::peer,
};
use stateright::{Model, Property};
use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    time::{Duration, Instant},
};
use weft::{
    ipam::{
        Allocator, Change, Config, Found, Now, Seeding, Stored,
        election::{CHANNEL, Election, Vote},
        seed::SeedPlan,
    },
    mesh::gossip::Item,
};

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
enum Turn {
    Propose(usize),
    Hear { from: usize, to: usize },
    Restart(usize),
}

impl Model for Voters {
    type State = Ballots;
    type Action = Turn;

    fn init_states(&self) -> Vec<Ballots> {
        let election = |n| Election::new(peer(n), self.count, 64, Vote::default());
        let elections = (0..self.count).map(election).collect();
        vec![Ballots { elections, proposals: 0, restarts: 0 }]
    }

    fn actions(&self, state: &Ballots, turns: &mut Vec<Turn>) {
        for from in 0..self.count {
            turns.extend((0..self.count).filter(|to| *to != from).map(|to| Turn::Hear { from, to }));
            if state.proposals < self.proposals {
                turns.push(Turn::Propose(from));
            }
            if state.restarts < self.restarts {
                turns.push(Turn::Restart(from));
            }
        }
    }

    fn next_state(&self, state: &Ballots, turn: Turn) -> Option<Ballots> {
        let mut next = state.clone();
        match turn {
            Turn::Propose(n) => {
                next.proposals += 1;
                next.elections[n].propose();
            }
            Turn::Hear { from, to } => {
                let vote = next.elections[from].own().clone();
                next.elections[to].hear(&peer(from), vote);
                next.elections[to].think();
            }
            Turn::Restart(n) => {
                next.restarts += 1;
                let vote = next.elections[n].own().clone();
                next.elections[n] = Election::new(peer(n), self.count, 64, vote);
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
    check("election of 3", Voters { count: 3, proposals: 2, restarts: 0 }, ALL);
    check("election with restarts", Voters { count: 3, proposals: 1, restarts: 2 }, ALL);
}

/// Three agents that vote: the first two may propose, each once, and the last may restart, once.
struct Agents {
    now: Now,
}

#[derive(Clone, Debug, PartialEq, Hash)]
struct Network {
    agents: Vec<Agent>,
    proposed: [bool; 2],
    restarted: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Agent {
    disk: Stored,
    /// On disk too.
    seeds: SeedPlan,
    /// Votes of others, until it restarts, and the own one as others hear it.
    heard: BTreeMap<usize, Item>,
    said: Option<Item>,
}

impl Agents {
    /// A step begins from the disk; what was heard since the last restart is heard again.
    fn step(&self, network: &mut Network, n: usize, work: impl FnOnce(&mut Allocator)) {
        let agent = &mut network.agents[n];
        let config = Config {
            name: peer(n),
            universe: "10.32.0.0/28".parse().expect("a universe"),
            seeds: agent.seeds.clone(),
            seeding: Seeding::Consensus(3),
            sealer: None,
            has_bootstrap: true,
            assigned: None,
        };
        let allocator = Allocator::new(config, agent.disk.clone(), Found::default(), self.now);
        let mut allocator = allocator.expect("fewer seeds than blocks");
        allocator.on_contact(self.now);
        allocator.on_items(&agent.heard.values().cloned().collect::<Vec<_>>(), self.now);
        work(&mut allocator);
        let effects = allocator.effects();
        for change in effects.changes {
            if let Change::Seeds(seeds) = &change {
                agent.seeds = seeds.clone();
            }
            agent.disk.apply(change);
        }
        for item in effects.publish.into_iter().filter(|item| item.channel == CHANNEL) {
            hold(&mut agent.said, item);
        }
    }
}

/// As the mesh does: the greater item counts.
fn hold(known: &mut Option<Item>, item: Item) {
    if known.as_ref().is_none_or(|known| item.beats(known)) {
        *known = Some(item);
    }
}

impl Model for Agents {
    type State = Network;
    type Action = Turn;

    fn init_states(&self) -> Vec<Network> {
        let agents = vec![Agent::default(); 3];
        let mut network = Network { agents, proposed: [false; 2], restarted: false };
        (0..3).for_each(|n| self.step(&mut network, n, |_| {}));
        vec![network]
    }

    fn actions(&self, network: &Network, turns: &mut Vec<Turn>) {
        for from in 0..3 {
            turns.extend((0..3).filter(|to| *to != from).map(|to| Turn::Hear { from, to }));
        }
        turns.extend((0..2).filter(|n| !network.proposed[*n]).map(Turn::Propose));
        turns.extend((!network.restarted).then_some(Turn::Restart(2)));
    }

    fn next_state(&self, network: &Network, turn: Turn) -> Option<Network> {
        let mut next = network.clone();
        match turn {
            Turn::Propose(n) => {
                next.proposed[n] = true;
                let late = Now { at: self.now.at + Duration::from_secs(60), ..self.now };
                self.step(&mut next, n, |allocator| allocator.tick(late));
            }
            Turn::Hear { from, to } => {
                let said = next.agents[from].said.clone();
                let mut heard = next.agents[to].heard.remove(&from);
                said.into_iter().for_each(|item| hold(&mut heard, item));
                next.agents[to].heard.extend(heard.map(|item| (from, item)));
                self.step(&mut next, to, |_| {});
            }
            Turn::Restart(n) => {
                next.restarted = true;
                (next.agents[n].heard, next.agents[n].said) = Default::default();
                self.step(&mut next, n, |_| {});
            }
        }
        (next != *network).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn elected(network: &Network) -> Vec<SeedPlan> {
            let seeds = network.agents.iter().map(|agent| agent.seeds.clone());
            seeds.filter(|seeds| !seeds.names().is_empty()).collect()
        }
        vec![
            Property::always("all that are elected are the same", |_, network: &Network| {
                elected(network).windows(2).all(|pair| pair[0] == pair[1])
            }),
            Property::sometimes("after a restart two know who is elected", |_, network: &Network| {
                network.restarted && elected(network).len() == 2
            }),
        ]
    }
}

impl Hash for Agent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.disk.kept, self.seeds.names(), &self.heard, &self.said).hash(state);
    }
}

#[test]
fn voters_keep_their_word_when_they_restart() {
    check("agents that vote", Agents { now: Now { at: Instant::now(), unix_ms: 0 } }, STEPS);
}

/// Enough for two proposals with a restart between them.
const STEPS: usize = 13;
