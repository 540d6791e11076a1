//! Many nodes, steps at random, against a plain model of who owns what: an owner for each address, and who may change it.
//!
//! The model hears of every token in the moment that it is written, and compares them address by address. Each change of an
//! owner must be one that the node which acted may make: it gave away what was its own, or took over from who is declared
//! dead, once that can do no harm.

use crate::steps::{Node, Nodes, Rules, Step, What, deaths, has, key, peer};
use proptest::prelude::*;
use std::{collections::BTreeMap, net::IpAddr};
use weft::{
    ipam::{Owner, death::Death, ring::Ring, token::Token},
    types::PeerName,
};

struct Reference {
    rules: Rules,
    nodes: Nodes,
    /// Whose an address is, by its offset.
    owners: Vec<Token>,
    /// Pods that run: which address each has.
    pods: BTreeMap<(usize, u32), IpAddr>,
}

impl Reference {
    fn new(universe: &str, seeds: usize, nodes: usize, by_force: bool) -> Self {
        let rules = Rules::new(universe, seeds, by_force);
        let names: Vec<PeerName> = (0..seeds).map(peer).collect();
        let genesis = Ring::genesis(rules.layout, &names).expect("fewer seeds than blocks");
        let of = |offset: u128| genesis.iter().find(|token| token.span().contains(offset)).cloned();
        let owners =
            (0..=rules.layout.whole().last).map(|offset| of(offset).expect("it is shared")).collect();
        let nodes = rules.begin(nodes);
        let mut this = Self { rules, nodes, owners, pods: BTreeMap::new() };
        (0..this.nodes.0.len()).for_each(|n| this.learn(n, &Node::default()));
        this
    }

    fn take(&mut self, step: Step) {
        if !self.rules.allow(&self.nodes, step) {
            return;
        }
        let before = self.nodes.clone();
        self.rules.take(&mut self.nodes, step);
        match step {
            Step::Crash(n) => self.pods.retain(|(node, _), _| *node != n),
            Step::Detach { node, pod } => _ = self.pods.remove(&(node, pod)),
            _ => {}
        }
        for (n, before) in before.0.iter().enumerate() {
            self.learn(n, before);
        }
        if let Step::Attach { node, pod } = step {
            let has = self.nodes.0[node].disk.allocations.iter().find(|has| has.owner == owner(node, pod));
            if let Some(address) = has.map(|allocation| allocation.address) {
                let others = self.pods.iter().filter(|(of, _)| **of != (node, pod));
                let is_new = others.into_iter().all(|(_, other)| *other != address);
                assert!(self.rules.by_force || is_new, "{address} has two pods");
                self.pods.insert((node, pod), address);
            }
        }
        if !self.rules.by_force {
            self.check();
        }
    }

    /// Takes in what a node has written.
    fn learn(&mut self, n: usize, before: &Node) {
        let node = &self.nodes.0[n];
        for token in node.disk.tokens.values().filter(|token| !has(before, token)) {
            for offset in token.start..=token.end {
                let owner = &mut self.owners[offset as usize];
                if rank(token) <= rank(owner) {
                    continue;
                }
                let (from, to) = (&owner.owner, &token.owner);
                // Whoever was given it by the dead one, and has not heard of it, has promised never to use it.
                let dead = |death: Death| {
                    let names =
                        |range| self.rules.layout.span(range).is_some_and(|span| span.contains(offset));
                    death.epoch == token.epoch && death.taker == *to && death.ranges.into_iter().any(names)
                };
                let takes = |(m, node): (usize, &Node)| {
                    let knows = has(node, token);
                    knows && (*from == peer(m) || *to == peer(m) && deaths(node).any(dead))
                };
                let may = self.rules.by_force || from == to || self.nodes.0.iter().enumerate().any(takes);
                assert!(may, "{n} made {offset} of {from} one of {to}");
                *owner = (**token).clone();
            }
        }
    }

    /// Nobody who lives, and knows what happened while it was away, believes to own more than it does, nor uses another's.
    fn check(&self) {
        let nodes = self.nodes.0.iter().enumerate();
        for (n, node) in nodes.filter(|(_, node)| node.lives && node.contact) {
            for offset in self.rules.owned_by(node).into_iter().flat_map(|span| span.first..=span.last) {
                let owner = &self.owners[offset as usize].owner;
                assert_eq!(*owner, peer(n), "{n} believes to own {}", self.rules.layout.address(offset));
            }
            for ((_, pod), address) in self.pods.iter().filter(|((node, _), _)| *node == n) {
                assert!(node.used.contains(address), "{n} has forgotten pod {pod}");
            }
        }
        assert!(self.rules.is_unique(&self.nodes));
    }

    /// Where those who live hear each other, and the rest is forgotten, nothing stays with the dead.
    fn bury(&mut self) {
        let Some(knows) = self.nodes.0.iter().position(|node| node.lives && node.contact) else { return };
        let (living, dead): (Vec<usize>, Vec<usize>) =
            (0..self.nodes.0.len()).partition(|n| self.nodes.0[*n].lives);
        living.iter().for_each(|node| self.take(Step::Meet { node: *node, via: knows }));
        self.talk();
        for dead in dead.iter().copied() {
            let said = deaths(&self.nodes.0[knows]).filter(|death| death.peer == peer(dead));
            let taker = said.max_by_key(|death| death.epoch).map(|death| death.taker);
            let by = living.iter().copied().find(|n| Some(peer(*n)) == taker).unwrap_or(knows);
            // Whom the taker has not known of yet it has to be told too.
            for _ in 0..2 {
                self.take(Step::Forget { by, dead });
                self.talk();
            }
        }
        for (n, dead) in living.iter().flat_map(|n| dead.iter().map(move |dead| (*n, peer(*dead)))) {
            let left = self.rules.ring(&self.nodes.0[n]).owned_by(&dead);
            assert!(left.is_empty(), "{n} still believes that {left:?} is of {dead}");
        }
    }

    /// Once everybody is back, all agree with the model about all that is there.
    fn agree(&mut self) {
        let knows = self.nodes.0.iter().position(|node| node.lives && node.contact);
        let via = knows.or_else(|| self.nodes.0.iter().position(|node| node.lives)).expect("somebody lives");
        for node in 0..self.nodes.0.len() {
            self.take(Step::Return(node));
            self.take(Step::Meet { node, via });
        }
        self.talk();
        let first = self.rules.ring(&self.nodes.0[0]);
        for node in &self.nodes.0 {
            let ring = self.rules.ring(node);
            for (offset, owner) in self.owners.iter().enumerate() {
                // By force two own it, and what the lower epoch's token covered beyond the higher one's is whose it was before.
                let owner =
                    if self.rules.by_force { first.owner(offset as u128) } else { Some(&owner.owner) };
                assert_eq!(ring.owner(offset as u128), owner, "of {offset}");
            }
        }
    }

    /// Those who live tell each other what they know, until there is nothing new.
    fn talk(&mut self) {
        let all = 0..self.nodes.0.len();
        let (mut before, mut rounds) = (None, 0);
        while before.as_ref() != Some(&self.nodes) {
            before = Some(self.nodes.clone());
            rounds += 1;
            assert!(rounds < 100, "they never agree");
            for (from, to) in all.clone().flat_map(|from| all.clone().map(move |to| (from, to))) {
                for what in [What::Deaths, What::Tokens, What::Records] {
                    self.take(Step::Tell { from, to, what });
                }
            }
        }
    }
}

/// Of two tokens the greater has an address.
fn rank(token: &Token) -> impl Ord {
    let Token { start, end, owner, epoch, hands, version, free, .. } = token;
    (*epoch, *hands, *version, *free, owner.clone(), *end, *start)
}

fn owner(node: usize, pod: u32) -> Owner {
    Owner::Pod(key(node, pod))
}

fn steps(nodes: usize) -> impl Strategy<Value = Vec<Step>> {
    let (node, pod) = (0..nodes, 0..6u32);
    let two = (node.clone(), node.clone());
    let what = prop::sample::select(vec![What::Tokens, What::Deaths, What::Records]);
    let step = prop_oneof![
        30 => (two.clone(), what).prop_map(|((from, to), what)| Step::Tell { from, to, what }),
        6 => two.clone().prop_map(|(from, to)| Step::Ask { from, to }),
        6 => (node.clone(), pod.clone()).prop_map(|(node, pod)| Step::Attach { node, pod }),
        3 => (node.clone(), pod).prop_map(|(node, pod)| Step::Detach { node, pod }),
        1 => node.clone().prop_map(Step::Crash),
        2 => node.clone().prop_map(Step::Return),
        3 => two.clone().prop_map(|(node, via)| Step::Meet { node, via }),
        3 => two.prop_map(|(by, dead)| Step::Forget { by, dead }),
    ];
    prop::collection::vec(step, 0..300)
}

proptest! {
    #[test]
    fn what_many_nodes_do_in_any_order_is_what_a_plain_model_allows(
        (nodes, steps) in prop::sample::select(vec![3, 4, NODES]).prop_flat_map(|nodes| (Just(nodes), steps(nodes))),
        universe in prop::sample::select(vec!["10.32.0.0/28", "10.32.0.0/25"]),
        seeds in prop::sample::select(vec![1, 3, NODES]),
    ) {
        let mut reference = Reference::new(universe, seeds.min(nodes), nodes, false);
        for step in steps {
            reference.take(step);
        }
        reference.bury();
        reference.agree();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whoever_is_forgotten_by_force_while_he_lives_all_agree_in_the_end(
        (nodes, steps) in prop::sample::select(vec![3, 4, NODES]).prop_flat_map(|nodes| (Just(nodes), steps(nodes))),
        universe in prop::sample::select(vec!["10.32.0.0/28", "10.32.0.0/25"]),
        seeds in prop::sample::select(vec![1, 3, NODES]),
    ) {
        let mut reference = Reference::new(universe, seeds.min(nodes), nodes, true);
        // Here every step is a restart, and after each an agent says anew that it has room, until it hears who holds what: with pods
        // that never ends.
        let has_pod = |step: &Step| matches!(step, Step::Attach { .. } | Step::Detach { .. });
        for step in steps.into_iter().filter(|step| !has_pod(step)) {
            reference.take(step);
        }
        reference.agree();
        prop_assert!(reference.rules.one_owns(&reference.nodes));
    }
}

#[test]
fn of_two_takers_of_one_node_the_later_one_has_its_range() {
    let mut reference = Reference::new("10.32.0.0/25", NODES, NODES, false);
    for step in [
        Step::Crash(3),
        Step::Forget { by: 6, dead: 3 },
        Step::Return(3),
        Step::Tell { from: 6, to: 1, what: What::Deaths },
        Step::Tell { from: 3, to: 1, what: What::Records },
        Step::Crash(3),
        Step::Forget { by: 1, dead: 3 },
    ] {
        reference.take(step);
    }
    let of_3 = reference.owners.iter().position(|token| token.owner == peer(3)).expect("a seed has a share");
    reference.agree();
    assert_eq!(reference.owners[of_3].owner, peer(1));
}

const NODES: usize = 7;
