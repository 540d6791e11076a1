//! What a node's kernel should hold: sets that selectors share, chains of policies, and which pods are sent through which.
//!
//! ```text
//!   packet that begins something ─▶ pod in `targets`? ─▶ its combination ─▶ policy ─▶ line: peers' set, ports ─▶ allowed
//!                                        │ no                    └▶ policy ─▶ …
//!                                        ▼ allowed               └▶ none allows it: dropped
//! ```
//! A combination goes through its stages in their order: the cluster's Admin tier, the pod's own policies, and without any of
//! these the Baseline tier. In a tier the first line that matches decides, or passes on to the next stage.
//! Sets grow with the pods, chains with the policies, combinations with what different pods are selected by; nothing grows
//! with pods times pods.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::model::{Action, Block, Direction, Flow, PodPeer, PolicyId, Protocol, Service};
use crate::types::Prefix;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub sets: BTreeMap<Key, BTreeSet<Element>>,
    pub chains: BTreeMap<(Direction, Stage), Chain>,
    /// Each address of an isolated pod of this node, in both directions.
    pub targets: BTreeMap<(Direction, IpAddr), Combination>,
}

/// A stage's lines in one direction; the first one that matches decides.
pub type Chain = Vec<Line>;

/// All that decides of a pod in one direction; nothing: it is isolated in the other one only.
pub type Combination = Arc<BTreeSet<Stage>>;

/// What is asked in turn; in this order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Policies for the cluster, by priority.
    Admin(Vec<PolicyId>),
    /// One of a namespace, which isolates: what none of them allows is forbidden.
    Policy(PolicyId),
    Baseline(Vec<PolicyId>),
}

/// What a set is made from. Equal ones share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Pods(PodPeer),
    Block(Block),
    /// Pods' ports of that name; where only pods of this node are asked for, only theirs.
    Ports {
        name: String,
        protocol: Protocol,
        local: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    Address(IpAddr),
    Prefix(Prefix),
    Port(IpAddr, u16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// None: everybody.
    pub peers: Option<Key>,
    pub ports: Ports,
    pub action: Action,
    pub by: PolicyId,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Whatever the protocol.
    All,
    Protocol(Protocol),
    /// Ranges with both ends included.
    Numbers(Protocol, Vec<(u16, u16)>),
    /// A set of [`Key::Ports`].
    Named(Key),
}

/// One step from some rules to others. Steps hold in the order in which they come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    AddSet(Key),
    AddElement(Key, Element),
    DeleteElement(Key, Element),
    DropSet(Key),
    /// Also in place of one that is there.
    SetChain((Direction, Stage), Chain),
    DropChain((Direction, Stage)),
    /// Sends an isolated pod's packets through its policies, or through others than before.
    SetTarget((Direction, IpAddr), Combination),
    DropTarget((Direction, IpAddr)),
}

impl Rules {
    /// Whether policies in force let somebody begin to talk, as far as this node enforces them.
    pub fn permit(&self, flow: &Flow) -> bool {
        Direction::BOTH.into_iter().all(|direction| self.permit_in(direction, flow))
    }

    pub fn permit_in(&self, direction: Direction, flow: &Flow) -> bool {
        let (own, other) = flow.ends(direction);
        let Some(combination) = self.targets.get(&(direction, own)) else { return true };
        // Its own, by way of a Service.
        if own == other {
            return true;
        }
        for stage in combination.iter() {
            let chain = self.chains.get(&(direction, stage.clone()));
            let line = chain.into_iter().flatten().find(|line| self.line_matches(line, other, flow));
            match line.map(|line| line.action) {
                Some(Action::Accept) => return true,
                Some(Action::Deny) => return false,
                Some(Action::Pass) | None => {}
            }
        }
        !isolates(combination)
    }

    /// Whether some line forbids what it matches: then what is added may narrow.
    pub fn deny(&self) -> bool {
        self.chains.values().flatten().any(|line| line.action == Action::Deny)
    }

    fn line_matches(&self, line: &Line, peer: IpAddr, flow: &Flow) -> bool {
        let peers = line.peers.as_ref().is_none_or(|key| match key {
            Key::Block(_) => self.sets.get(key).is_some_and(|elements| {
                elements.iter().any(|e| matches!(e, Element::Prefix(prefix) if prefix.contains(&peer)))
            }),
            _ => self.holds(key, &Element::Address(peer)),
        });
        peers
            && match (&line.ports, flow.to) {
                (Ports::All, _) => true,
                (_, Service::Other) => false,
                (Ports::Protocol(wanted), Service::Port(protocol, _)) => protocol == *wanted,
                (Ports::Numbers(wanted, ranges), Service::Port(protocol, number)) => {
                    protocol == *wanted && ranges.iter().any(|(from, to)| (*from..=*to).contains(&number))
                }
                (Ports::Named(key), Service::Port(protocol, number)) => {
                    matches!(key, Key::Ports { protocol: wanted, .. } if *wanted == protocol)
                        && self.holds(key, &Element::Port(flow.destination, number))
                }
            }
    }

    fn holds(&self, key: &Key, element: &Element) -> bool {
        self.sets.get(key).is_some_and(|elements| elements.contains(element))
    }

    pub fn apply(&mut self, change: &Change) {
        match change.clone() {
            Change::AddSet(key) => {
                self.sets.insert(key, BTreeSet::new());
            }
            Change::AddElement(key, element) => {
                self.sets.entry(key).or_default().insert(element);
            }
            Change::DeleteElement(key, element) => {
                self.sets.entry(key).or_default().remove(&element);
            }
            Change::DropSet(key) => {
                self.sets.remove(&key);
            }
            Change::SetChain(at, chain) => {
                self.chains.insert(at, chain);
            }
            Change::DropChain(at) => {
                self.chains.remove(&at);
            }
            Change::SetTarget(at, combination) => {
                self.targets.insert(at, combination);
            }
            Change::DropTarget(at) => {
                self.targets.remove(&at);
            }
        }
    }

    /// The way from here to there: nothing is dropped while something still leads to it.
    pub fn changes_to(&self, next: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        for (key, elements) in &next.sets {
            match self.sets.get(key) {
                Some(standing) => {
                    let gone = standing.difference(elements).cloned();
                    changes.extend(gone.map(|element| Change::DeleteElement(key.clone(), element)));
                    let new = elements.difference(standing).cloned();
                    changes.extend(new.map(|element| Change::AddElement(key.clone(), element)));
                }
                None => {
                    changes.push(Change::AddSet(key.clone()));
                    changes.extend(elements.iter().map(|e| Change::AddElement(key.clone(), e.clone())));
                }
            }
        }
        let new = next.chains.iter().filter(|(at, chain)| self.chains.get(*at) != Some(*chain));
        changes.extend(new.map(|(at, chain)| Change::SetChain(at.clone(), chain.clone())));
        let new = next.targets.iter().filter(|(at, target)| self.targets.get(*at) != Some(*target));
        changes.extend(new.map(|(at, target)| Change::SetTarget(*at, target.clone())));
        let gone = self.targets.keys().filter(|at| !next.targets.contains_key(*at));
        changes.extend(gone.map(|at| Change::DropTarget(*at)));
        let gone = self.chains.keys().filter(|at| !next.chains.contains_key(*at));
        changes.extend(gone.map(|at| Change::DropChain(at.clone())));
        let gone = self.sets.keys().filter(|key| !next.sets.contains_key(*key));
        changes.extend(gone.map(|key| Change::DropSet(key.clone())));
        changes
    }
}

/// Whether what no stage decides is forbidden.
pub fn isolates(combination: &Combination) -> bool {
    combination.iter().any(|stage| matches!(stage, Stage::Policy(_)))
}

impl Line {
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        let ports = match &self.ports {
            Ports::Named(key) => Some(key),
            _ => None,
        };
        self.peers.iter().chain(ports)
    }
}
