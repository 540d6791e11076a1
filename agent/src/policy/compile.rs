//! The index to the rules of one node: wholly, or as the steps that one pod's change takes.
//!
//! Only policies that isolate a pod of this node become chains, and only what their lines name becomes a set.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    index::{Index, Touched},
    model::{Action, Block, Direction, Peer, Pod, PolicyId, Port, Protocol, Rule, Tier, Wanted},
    rules::{Chain, Change, Combination, Element, Key, Line, Ports, Rules, Stage},
};
use crate::types::Prefix;
use ipnet::{Ipv4Subnets, Ipv6Subnets};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// Keeps the rules in step with an index.
#[derive(Clone, Debug, Default)]
pub struct Compiler {
    rules: Rules,
    /// As the rules have it.
    endpoints: BTreeMap<IpAddr, Arc<Pod>>,
    /// How many lines use a set.
    users: BTreeMap<Key, usize>,
    /// How many targets lead to a stage.
    leading: BTreeMap<(Direction, Stage), usize>,
}

impl Compiler {
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Follows the index, and returns the steps to it.
    pub fn follow(&mut self, index: &mut Index) -> Vec<Change> {
        match index.take_touched() {
            Touched::Addresses(addresses) => {
                let mut changes = Vec::new();
                for address in addresses {
                    self.follow_endpoint(index, address, &mut changes);
                }
                changes
            }
            Touched::Everything => {
                let fresh = Self::of(index);
                let changes = self.rules.changes_to(&fresh.rules);
                *self = fresh;
                changes
            }
        }
    }

    fn of(index: &Index) -> Self {
        let mut fresh = Self { endpoints: index.endpoints().clone(), ..Self::default() };
        let mut by_namespace: Namespaced<'_> = BTreeMap::new();
        for (address, pod) in index.endpoints() {
            by_namespace.entry(&pod.namespace).or_default().push((*address, pod));
        }
        let mut steps = Vec::new();
        for address in index.attached().keys() {
            if let Some(pod) = index.endpoint(*address) {
                fresh.lead(index, *address, pod, &by_namespace, &mut steps);
            }
        }
        fresh
    }

    fn follow_endpoint(&mut self, index: &Index, address: IpAddr, changes: &mut Vec<Change>) {
        let before = self.endpoints.get(&address).cloned();
        let after = index.endpoint(address).cloned();
        let here = index.attached().contains_key(&address);
        let was_here = self.rules.targets.contains_key(&(Direction::Ingress, address));
        let has = |pod: &Option<Arc<Pod>>, key: &Key| {
            pod.as_ref().map(|pod| elements(index, key, address, pod)).unwrap_or_default()
        };
        let mut steps = Vec::new();
        for (key, standing) in &self.rules.sets {
            if matches!(key, Key::Block(_)) {
                continue;
            }
            // Whether it was of this node before is not known; what stands is.
            let local_ports = matches!(key, Key::Ports { local: true, .. });
            let wanted = if local_ports && !here { BTreeSet::new() } else { has(&after, key) };
            let had = has(&before, key);
            let gone = had.difference(&wanted).filter(|element| standing.contains(element));
            steps.extend(gone.map(|element| Change::DeleteElement(key.clone(), element.clone())));
            let new = wanted.difference(standing);
            steps.extend(new.map(|element| Change::AddElement(key.clone(), element.clone())));
        }
        steps.into_iter().for_each(|step| self.step(step, changes));
        match &after {
            Some(pod) => self.endpoints.insert(address, pod.clone()),
            None => self.endpoints.remove(&address),
        };
        match after.filter(|_| here) {
            Some(pod) => {
                let mut by_namespace: Namespaced<'_> = BTreeMap::new();
                if self.needs_new_sets(index, &pod) {
                    for (address, pod) in index.endpoints() {
                        by_namespace.entry(&pod.namespace).or_default().push((*address, pod));
                    }
                }
                self.lead(index, address, &pod, &by_namespace, changes);
            }
            None if was_here => self.let_go(address, changes),
            None => {}
        }
    }

    fn needs_new_sets(&self, index: &Index, pod: &Pod) -> bool {
        Direction::BOTH.into_iter().any(|direction| {
            let mut stages = stages(index, pod, direction).into_iter();
            stages.any(|stage| !self.leading.contains_key(&(direction, stage)))
        })
    }

    /// Sends a pod of this node through the policies that are for it.
    fn lead(
        &mut self,
        index: &Index,
        address: IpAddr,
        pod: &Pod,
        by_namespace: &Namespaced<'_>,
        changes: &mut Vec<Change>,
    ) {
        let combinations = Direction::BOTH.map(|direction| (direction, stages(index, pod, direction)));
        if combinations.iter().all(|(_, stages)| stages.is_empty()) {
            return self.let_go(address, changes);
        }
        for (direction, stages) in combinations {
            let combination: Combination = Arc::new(stages);
            let standing = self.rules.targets.get(&(direction, address)).cloned();
            if standing.as_ref() == Some(&combination) {
                continue;
            }
            for stage in combination.iter() {
                self.use_stage(index, direction, stage, by_namespace, changes);
            }
            self.step(Change::SetTarget((direction, address), combination), changes);
            for stage in standing.iter().flat_map(|standing| standing.iter()) {
                self.disuse_stage(direction, stage, changes);
            }
        }
    }

    fn let_go(&mut self, address: IpAddr, changes: &mut Vec<Change>) {
        for direction in Direction::BOTH {
            let at = (direction, address);
            let Some(combination) = self.rules.targets.get(&at).cloned() else { continue };
            self.step(Change::DropTarget(at), changes);
            for stage in combination.iter() {
                self.disuse_stage(direction, stage, changes);
            }
        }
    }

    fn use_stage(
        &mut self,
        index: &Index,
        direction: Direction,
        stage: &Stage,
        by_namespace: &Namespaced<'_>,
        changes: &mut Vec<Change>,
    ) {
        let at = (direction, stage.clone());
        let uses = self.leading.entry(at.clone()).or_default();
        *uses += 1;
        if *uses > 1 {
            return;
        }
        let chain = chain(index, stage, direction);
        for key in chain.iter().flat_map(Line::keys) {
            let users = self.users.entry(key.clone()).or_default();
            *users += 1;
            if *users > 1 {
                continue;
            }
            self.step(Change::AddSet(key.clone()), changes);
            for element in fill(index, key, by_namespace) {
                self.step(Change::AddElement(key.clone(), element), changes);
            }
        }
        self.step(Change::SetChain(at, chain), changes);
    }

    fn disuse_stage(&mut self, direction: Direction, stage: &Stage, changes: &mut Vec<Change>) {
        let at = (direction, stage.clone());
        let uses = self.leading.get_mut(&at).expect("what is led to has been counted");
        *uses -= 1;
        if *uses > 0 {
            return;
        }
        self.leading.remove(&at);
        let chain = self.rules.chains.get(&at).cloned().unwrap_or_default();
        self.step(Change::DropChain(at), changes);
        for key in chain.iter().flat_map(Line::keys) {
            let users = self.users.get_mut(key).expect("a line's sets have been counted");
            *users -= 1;
            if *users == 0 {
                self.users.remove(key);
                self.step(Change::DropSet(key.clone()), changes);
            }
        }
    }

    fn step(&mut self, change: Change, changes: &mut Vec<Change>) {
        self.rules.apply(&change);
        changes.push(change);
    }
}

type Namespaced<'a> = BTreeMap<&'a str, Vec<(IpAddr, &'a Arc<Pod>)>>;

/// All elements of a set.
fn fill(index: &Index, key: &Key, by_namespace: &Namespaced<'_>) -> BTreeSet<Element> {
    let of = |pods: &[(IpAddr, &Arc<Pod>)]| -> Vec<Element> {
        pods.iter().flat_map(|(address, pod)| elements(index, key, *address, pod)).collect()
    };
    match key {
        Key::Block(block) => {
            let own = without(block).into_iter();
            let nodes = index.nodes_in(block).filter(|node| !block.contains(*node)).map(Prefix::from);
            own.chain(nodes).map(Element::Prefix).collect()
        }
        Key::Pods(peer) => {
            let selected =
                by_namespace.iter().filter(|(name, _)| index.namespace_matches(&peer.namespaces, name));
            selected.flat_map(|(_, pods)| of(pods)).collect()
        }
        Key::Ports { local: true, .. } => {
            let attached = index.attached().keys();
            let here = attached.filter_map(|address| Some((*address, index.endpoint(*address)?)));
            of(&here.collect::<Vec<_>>()).into_iter().collect()
        }
        Key::Ports { .. } => by_namespace.values().flat_map(|pods| of(pods)).collect(),
    }
}

/// What a pod with this address adds to a set.
fn elements(index: &Index, key: &Key, address: IpAddr, pod: &Pod) -> BTreeSet<Element> {
    match key {
        Key::Pods(peer) if index.pod_matches(peer, pod) => [Element::Address(address)].into(),
        Key::Ports { name, protocol, .. } => {
            let ports = pod.ports.iter().filter(|port| port.name == *name && port.protocol == *protocol);
            ports.map(|port| Element::Port(address, port.number)).collect()
        }
        Key::Pods(_) | Key::Block(_) => BTreeSet::new(),
    }
}

/// What decides of a pod, in its order.
fn stages(index: &Index, pod: &Pod, direction: Direction) -> BTreeSet<Stage> {
    let tier = |tier| {
        let ruling = index.ruling(tier, pod).filter(|policy| !policy.rules(direction).is_empty());
        Some(ruling.map(|policy| policy.id()).collect::<Vec<_>>()).filter(|policies| !policies.is_empty())
    };
    let isolating = index.selecting(pod).filter(|policy| policy.rules(direction).is_some());
    let mut stages: BTreeSet<_> = isolating.map(|policy| Stage::Policy(policy.id.clone())).collect();
    if stages.is_empty() {
        stages.extend(tier(Tier::Baseline).map(Stage::Baseline));
    }
    stages.extend(tier(Tier::Admin).map(Stage::Admin));
    stages
}

fn chain(index: &Index, stage: &Stage, direction: Direction) -> Chain {
    match stage {
        Stage::Policy(id) => {
            let rules = index.policies().get(id).and_then(|policy| policy.rules(direction));
            let rules = rules.unwrap_or_default().iter();
            rules.flat_map(|rule| lines(rule, direction, Action::Accept, id)).collect()
        }
        Stage::Admin(ids) | Stage::Baseline(ids) => {
            let found = ids.iter().filter_map(|id| Some((id, index.cluster_policy(&id.name)?)));
            let rules = found.flat_map(|(id, policy)| policy.rules(direction).iter().map(move |it| (id, it)));
            rules.flat_map(|(id, rule)| lines(&rule.matching, direction, rule.action, id)).collect()
        }
    }
}

fn lines(rule: &Rule, direction: Direction, action: Action, by: &PolicyId) -> Vec<Line> {
    let peers: Vec<Option<Key>> = match &rule.peers {
        None => vec![None],
        Some(peers) => peers.iter().map(|peer| Some(key(peer))).collect(),
    };
    let ports = ports(rule.ports.as_deref(), direction);
    let line = |peers: &Option<Key>, ports: &Ports| Line {
        peers: peers.clone(),
        ports: ports.clone(),
        action,
        by: by.clone(),
    };
    peers.iter().flat_map(|peers| ports.iter().map(move |ports| line(peers, ports))).collect()
}

fn key(peer: &Peer) -> Key {
    match peer {
        Peer::Pods(pods) => Key::Pods(pods.clone()),
        Peer::Block(block) => Key::Block(block.clone()),
    }
}

/// As few as say the same: each protocol's numbers together.
fn ports(ports: Option<&[Port]>, direction: Direction) -> Vec<Ports> {
    let Some(ports) = ports else { return vec![Ports::All] };
    let mut numbers: BTreeMap<Protocol, Vec<(u16, u16)>> = BTreeMap::new();
    let (mut whole, mut named) = (BTreeSet::new(), BTreeSet::new());
    for Port { protocol, wanted } in ports {
        match wanted {
            Wanted::Any => {
                whole.insert(*protocol);
            }
            Wanted::Range(from, to) => numbers.entry(*protocol).or_default().push((*from, *to)),
            Wanted::Named(name) => {
                let local = direction == Direction::Ingress;
                named.insert(Key::Ports { name: name.clone(), protocol: *protocol, local });
            }
        }
    }
    let numbers = numbers.into_iter().filter(|(protocol, _)| !whole.contains(protocol));
    let numbers = numbers.map(|(protocol, ranges)| Ports::Numbers(protocol, joined(ranges)));
    whole
        .iter()
        .copied()
        .map(Ports::Protocol)
        .chain(numbers)
        .chain(named.into_iter().map(Ports::Named))
        .collect()
}

/// In order, and none overlapping or touching another.
fn joined(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u16, u16)> = Vec::new();
    for (from, to) in ranges {
        match joined.last_mut() {
            Some(last) if u32::from(from) <= u32::from(last.1) + 1 => last.1 = last.1.max(to),
            _ => joined.push((from, to)),
        }
    }
    joined
}

/// A block less its exceptions, as prefixes.
fn without(block: &Block) -> Vec<Prefix> {
    let same_family = |prefix: &&Prefix| prefix.addr().is_ipv4() == block.cidr.addr().is_ipv4();
    let inside = block.except.iter().filter(same_family).filter(|except| block.cidr.contains(*except));
    let outer: BTreeSet<Prefix> = inside.copied().collect();
    if block.except.iter().any(|except| except.contains(&block.cidr)) {
        return Vec::new();
    }
    // Gaps between the exceptions, as numbers.
    let mut gaps = Vec::new();
    let mut next = Some(number(block.cidr.network()));
    for except in outer {
        let Some(from) = next else { break };
        let (first, last) = (number(except.network()), number(except.broadcast()));
        if last < from {
            continue;
        }
        if first > from {
            gaps.push((from, first - 1));
        }
        next = last.checked_add(1);
    }
    let end = number(block.cidr.broadcast());
    gaps.extend(next.filter(|from| *from <= end).map(|from| (from, end)));
    let prefixes = gaps.into_iter().flat_map(|(from, to)| subnets(block.cidr, from, to));
    // nftables' interval sets do not take a whole family.
    let halves = |prefix: Prefix| match prefix.prefix_len() {
        0 => prefix.subnets(1).expect("one bit is not too long").collect(),
        _ => vec![prefix],
    };
    prefixes.flat_map(halves).collect()
}

fn subnets(family: Prefix, from: u128, to: u128) -> Vec<Prefix> {
    match family {
        Prefix::V4(_) => {
            let address = |number: u128| Ipv4Addr::from(number as u32);
            Ipv4Subnets::new(address(from), address(to), 0).map(Prefix::V4).collect()
        }
        Prefix::V6(_) => {
            Ipv6Subnets::new(Ipv6Addr::from(from), Ipv6Addr::from(to), 0).map(Prefix::V6).collect()
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}
