//! Every interleaving of a few nodes: what the allocator promises is checked in all states that they can reach, by the real code.
//! Sizes are small; `reference.rs` and `ipam.rs` have large ones at random.

use crate::steps::{Nodes, Rules, Step, What};
use stateright::{Checker, Model, Property};
use std::{fmt::Debug, hash::Hash, time::Instant};
use weft::{
    ipam::span::coalesce,
    types::{PeerName, Prefix},
};

/// Nodes that give each other space, die, are forgotten and come back, as often as they may.
struct Few {
    nodes: usize,
    rules: Rules,
    most: Budget,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Budget {
    asks: u8,
    crashes: u8,
    forgets: u8,
}

#[derive(Clone, Debug, PartialEq, Hash)]
struct World {
    nodes: Nodes,
    spent: Budget,
}

impl Few {
    fn new(seeds: usize, by_force: bool, most: Budget) -> Self {
        Self { nodes: 3, rules: Rules::new("10.32.0.0/30", seeds, by_force), most }
    }

    /// All come to have one ring, which holds the whole universe, as soon as they hear each other.
    fn agrees(&self, world: &World) -> bool {
        world.nodes.0.iter().any(|node| !node.lives) || self.agreement(world, &[0, 1, 2]).is_some()
    }

    /// And the same one, whoever hears whom first.
    fn agrees_in_any_order(&self, world: &World) -> bool {
        let [one, other] = [[0, 1, 2], [2, 1, 0]].map(|order| self.agreement(world, &order));
        one.is_some() && one == other
    }

    fn agreement(&self, world: &World, order: &[usize]) -> Option<Vec<(Prefix, PeerName)>> {
        let mut nodes = world.nodes.clone();
        self.rules.meet(&mut nodes, order);
        let layout = self.rules.layout;
        let rings = nodes.0.iter().map(|node| self.rules.ring(node).routes());
        let mut rings = rings.collect::<Vec<_>>();
        rings.dedup();
        let [ring] = rings.as_slice() else { return None };
        let spans = ring.iter().map(|(prefix, _)| layout.span(*prefix).expect("in the universe"));
        let is_whole = coalesce(spans) == [layout.whole()];
        (is_whole && self.rules.is_unique(&nodes)).then(|| ring.clone())
    }
}

impl Model for Few {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World { nodes: self.rules.begin(self.nodes), spent: Budget::default() }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let (all, spent) = (0..self.nodes, world.spent);
        for a in all.clone() {
            if spent.crashes < self.most.crashes {
                steps.push(Step::Crash(a));
            }
            steps.push(Step::Return(a));
            for b in all.clone() {
                let tells = [What::Tokens, What::Deaths, What::Records];
                steps.extend(tells.map(|what| Step::Tell { from: a, to: b, what }));
                if spent.asks < self.most.asks {
                    steps.push(Step::Ask { from: a, to: b });
                }
                if spent.forgets < self.most.forgets {
                    steps.push(Step::Forget { by: a, dead: b });
                }
                steps.push(Step::Meet { node: a, via: b });
            }
        }
        steps.retain(|step| self.rules.allow(&world.nodes, *step));
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        self.rules.take(&mut next.nodes, step);
        match step {
            Step::Ask { .. } => next.spent.asks += 1,
            Step::Crash(_) => next.spent.crashes += 1,
            Step::Forget { .. } => next.spent.forgets += 1,
            _ => {}
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let always = Property::always;
        let mut properties = vec![
            always("once all hear each other, they agree", Self::agrees),
            Property::sometimes("addresses are taken over", |_, world: &World| {
                world.nodes.0.iter().any(|node| node.disk.tokens.values().any(|token| token.epoch > 0))
            }),
        ];
        if self.rules.by_force {
            properties.push(always("whoever hears whom first, on the same", Self::agrees_in_any_order));
        } else {
            properties.push(always("no address has two owners", |model: &Self, world: &World| {
                model.rules.is_unique(&world.nodes)
            }));
        }
        if self.most.asks > 0 && self.most.crashes > 0 {
            properties.push(Property::sometimes("who was forgotten owns again", |_, world: &World| {
                let nodes = &world.nodes.0;
                nodes
                    .iter()
                    .any(|node| node.incarnation > 1 && !node.own.is_empty() && !node.disk.kept.is_empty())
            }));
        }
        properties
    }
}

/// Looks at all states that so many steps at most lead to.
pub fn check<M>(what: &str, model: M, most: usize)
where
    M: Model<
            State: Hash + Clone + PartialEq + Debug + Send + Sync,
            Action: Clone + PartialEq + Debug + Send + Sync,
        > + Send
        + Sync
        + 'static,
{
    let start = Instant::now();
    let checker = model.checker().threads(2).target_max_depth(most).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{what}: {states} states, at most {depth} steps from the first, in {:?}", start.elapsed());
    checker.assert_properties();
}

#[test]
fn no_address_has_two_owners_whoever_dies_is_forgotten_and_comes_back() {
    check("ring", Few::new(2, false, Budget { asks: 1, crashes: 1, forgets: 1 }), ALL);
}

#[test]
fn two_who_forget_the_same_node_do_not_both_take_it_over() {
    check("two takers", Few::new(3, false, Budget { asks: 0, crashes: 1, forgets: 2 }), STEPS);
}

#[test]
fn who_was_wrongly_declared_dead_agrees_once_it_hears_of_it() {
    check("by force", Few::new(2, true, Budget { asks: 1, crashes: 0, forgets: 1 }), ALL);
}

/// Where more would take minutes.
const STEPS: usize = 9;
/// There is nothing new after fewer.
pub const ALL: usize = 100;
