//! Rules as nftables text: a table of our own, so that its repair and the firewall's do not meet.
//!
//! ```text
//!   forward ─▶ chain egress ──▶ chain ingress ─▶
//!                │ established, related: accept
//!                │ a pod to itself: accept
//!                └ vmap egress4: pod's address ─▶ combination out-1f… ─┬▶ admin-out-2e…   accept, drop, or return at the first match
//!                                                                     ├▶ out/shop/web     accept what a line matches
//!                                                                     ├▶ out/shop/base    …
//!                                                                     └ drop
//! ```
//! Two base chains, because `accept` ends only the one that it is said in: each end decides for itself. What is established
//! passes one rule in each, whatever the number of policies. New TCP connections of an isolated pod begin with a SYN: what a
//! policy has ended must not come to life again by the next segment.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    counts::{Counted, Outcome},
    model::{Action, Direction, PolicyId},
    rules::{Chain, Change, Combination, Element, Key, Line, Ports, Rules, Stage, isolates},
};
use crate::types::POLICY_TABLE;
use siphasher::sip::SipHasher;
use std::{collections::BTreeMap, fmt::Write, net::IpAddr};

/// Remembers which combinations there are a chain for.
#[derive(Clone, Debug, Default)]
pub struct Renderer {
    targets: BTreeMap<(Direction, IpAddr), Combination>,
    uses: BTreeMap<(Direction, Combination), usize>,
    /// Drops are logged to that NFLOG group.
    log: Option<u16>,
    /// The table is its writer's own, and outlives it.
    owned: bool,
}

impl Renderer {
    pub fn new(log: Option<u16>, owned: bool) -> Self {
        Self { log, owned, ..Self::default() }
    }

    /// The text for `nft -f -` that makes the table anew, whatever there is.
    pub fn table(&mut self, rules: &Rules, revision: u32) -> String {
        *self = Self::new(self.log, self.owned);
        let flags = if self.owned { OWNED } else { "" };
        let mut text = format!("{}table inet {POLICY_TABLE} {{\n{flags}{SKELETON}", gone(self.owned));
        text += &self.steps(&Rules::default().changes_to(rules), revision);
        text
    }

    /// The text for `nft -f -` that takes these steps together, or none of them.
    pub fn steps(&mut self, changes: &[Change], revision: u32) -> String {
        let mut text = String::new();
        let mut rest = changes;
        while let Some(change) = rest.first() {
            let like = |other: &&Change| match (change, *other) {
                (Change::AddElement(key, _), Change::AddElement(other, _)) => key == other,
                (Change::DeleteElement(key, _), Change::DeleteElement(other, _)) => key == other,
                _ => false,
            };
            let count = rest.iter().take_while(like).count().max(1);
            self.step(&rest[..count], &mut text);
            rest = &rest[count..];
        }
        let _ = writeln!(text, "flush set inet {POLICY_TABLE} {REVISION}");
        let _ = writeln!(text, "add element inet {POLICY_TABLE} {REVISION} {{ {revision} }}");
        text
    }

    /// What the table's counters count, by their names.
    pub fn counters(&self) -> BTreeMap<String, Counted> {
        let mut named = BTreeMap::from([(LATE.into(), Counted::Late)]);
        for (direction, combination) in self.uses.keys() {
            named.extend(combination.iter().flat_map(|stage| stage_counters(*direction, stage)));
            if isolates(combination) {
                let what = Counted::Unallowed(*direction, own(combination).cloned().collect());
                named.insert(combination_name(*direction, combination), what);
            }
        }
        named
    }

    fn step(&mut self, alike: &[Change], text: &mut String) {
        match &alike[0] {
            Change::AddSet(key) => {
                for family in FAMILIES {
                    let _ = writeln!(
                        text,
                        "add set inet {POLICY_TABLE} {} {{ {} }}",
                        set_name(key, family),
                        set_type(key, family)
                    );
                }
            }
            Change::DropSet(key) => {
                for family in FAMILIES {
                    let _ = writeln!(text, "delete set inet {POLICY_TABLE} {}", set_name(key, family));
                }
            }
            Change::AddElement(key, _) => write_elements("add", key, alike, text),
            Change::DeleteElement(key, _) => write_elements("delete", key, alike, text),
            Change::SetChain((direction, stage), chain) => self.write_chain(*direction, stage, chain, text),
            Change::DropChain((direction, stage)) => {
                let name = chain_name(*direction, stage);
                let _ = writeln!(
                    text,
                    "flush chain inet {POLICY_TABLE} {name}\ndelete chain inet {POLICY_TABLE} {name}"
                );
                for (counter, _) in stage_counters(*direction, stage) {
                    let _ = writeln!(text, "delete counter inet {POLICY_TABLE} {counter}");
                }
            }
            Change::SetTarget(at, combination) => {
                let (before, (direction, address)) = (self.targets.insert(*at, combination.clone()), *at);
                let uses = self.uses.entry((direction, combination.clone())).or_default();
                *uses += 1;
                if *uses == 1 {
                    self.write_combination(direction, combination, text);
                }
                if let Some(before) = before {
                    write_target("delete", *at, None, text);
                    write_target("add", *at, Some(combination), text);
                    self.release(direction, &before, text);
                } else {
                    if direction == Direction::Ingress {
                        write_itself("add", address, text);
                    }
                    write_target("add", *at, Some(combination), text);
                }
            }
            Change::DropTarget(at) => {
                if let Some(before) = self.targets.remove(at) {
                    write_target("delete", *at, None, text);
                    if at.0 == Direction::Ingress {
                        write_itself("delete", at.1, text);
                    }
                    self.release(at.0, &before, text);
                }
            }
        }
    }

    fn write_combination(&self, direction: Direction, combination: &Combination, text: &mut String) {
        let name = combination_name(direction, combination);
        if isolates(combination) {
            let _ = writeln!(text, "add counter inet {POLICY_TABLE} {name}");
        }
        let _ = writeln!(text, "add chain inet {POLICY_TABLE} {name}");
        let mut rule = |rule: &str| {
            let _ = writeln!(text, "add rule inet {POLICY_TABLE} {name} {rule}");
        };
        rule(&format!("tcp flags & (fin | syn | rst | ack) != syn counter name {LATE} drop"));
        for stage in combination.iter() {
            rule(&format!("jump {}", chain_name(direction, stage)));
        }
        if isolates(combination) {
            if let Some(log) = self.log(direction, own(combination)) {
                rule(&log);
            }
            rule(&format!("counter name {name} drop"));
        }
    }

    fn write_chain(&self, direction: Direction, stage: &Stage, chain: &Chain, text: &mut String) {
        let name = chain_name(direction, stage);
        for (counter, _) in stage_counters(direction, stage) {
            let _ = writeln!(text, "add counter inet {POLICY_TABLE} {counter}");
        }
        let _ =
            writeln!(text, "add chain inet {POLICY_TABLE} {name}\nflush chain inet {POLICY_TABLE} {name}");
        for line in chain {
            let counter = counter_name(direction, stage, line);
            let verdict = match line.action {
                Action::Accept => "accept",
                Action::Deny => "drop",
                Action::Pass => "return",
            };
            let log = self.log(direction, [&line.by]).filter(|_| line.action == Action::Deny);
            // Where neither names an address one rule is for both families.
            let families = if line.keys().next().is_none() { &FAMILIES[..1] } else { &FAMILIES };
            for family in families {
                let matched = matched(direction, line, *family);
                let mut rule = |rest: &str| {
                    let _ = writeln!(text, "add rule inet {POLICY_TABLE} {name} {matched}{rest}");
                };
                log.iter().for_each(|log| rule(log));
                rule(&format!("counter name {counter} {verdict}"));
            }
        }
    }

    fn log<'a>(&self, direction: Direction, by: impl IntoIterator<Item = &'a PolicyId>) -> Option<String> {
        let group = self.log?;
        let names: Vec<_> = by.into_iter().map(PolicyId::to_string).collect();
        let mut prefix = format!("weft {} {}", direction.word(), names.join(","));
        prefix.truncate(LONGEST_PREFIX);
        Some(format!("limit rate {LOG_RATE} log prefix \"{prefix}\" group {group}"))
    }

    fn release(&mut self, direction: Direction, combination: &Combination, text: &mut String) {
        let at = (direction, combination.clone());
        let uses = self.uses.get_mut(&at).expect("a target's combination has been counted");
        *uses -= 1;
        if *uses == 0 {
            self.uses.remove(&at);
            let name = combination_name(direction, combination);
            let _ = writeln!(
                text,
                "flush chain inet {POLICY_TABLE} {name}\ndelete chain inet {POLICY_TABLE} {name}"
            );
            if isolates(combination) {
                let _ = writeln!(text, "delete counter inet {POLICY_TABLE} {name}");
            }
        }
    }
}

/// The text that takes the table away, if there is one.
pub fn gone(owned: bool) -> String {
    match owned {
        // One with other flags would not be taken for the same.
        true => format!("destroy table inet {POLICY_TABLE}\n"),
        // An empty one first, as deleting one that does not exist would fail; `destroy` is younger than many an nft.
        false => format!("table inet {POLICY_TABLE} {{}}\ndelete table inet {POLICY_TABLE}\n"),
    }
}

fn write_elements(verb: &str, key: &Key, alike: &[Change], text: &mut String) {
    for family in FAMILIES {
        let listed = alike.iter().filter_map(|change| match change {
            Change::AddElement(_, element) | Change::DeleteElement(_, element) => element_of(family, element),
            _ => None,
        });
        let listed: Vec<String> = listed.collect();
        for some in listed.chunks(ELEMENTS) {
            let _ = writeln!(
                text,
                "{verb} element inet {POLICY_TABLE} {} {{ {} }}",
                set_name(key, family),
                some.join(", ")
            );
        }
    }
}

fn element_of(family: Family, element: &Element) -> Option<String> {
    let (address, text) = match element {
        Element::Address(address) => (*address, address.to_string()),
        Element::Prefix(prefix) => (prefix.addr(), prefix.to_string()),
        Element::Port(address, number) => (*address, format!("{address} . {number}")),
    };
    (Family::of(address) == family).then_some(text)
}

fn matched(direction: Direction, line: &Line, family: Family) -> String {
    let ip = family.word();
    let side = match direction {
        Direction::Ingress => "saddr",
        Direction::Egress => "daddr",
    };
    let mut text = String::new();
    if let Some(key) = &line.peers {
        let _ = write!(text, "{ip} {side} @{} ", set_name(key, family));
    }
    match &line.ports {
        Ports::All => {}
        Ports::Protocol(protocol) => {
            let _ = write!(text, "meta l4proto {} ", protocol.word());
        }
        Ports::Numbers(protocol, ranges) => {
            let listed: Vec<_> = ranges.iter().map(|range| range_text(*range)).collect();
            let _ = write!(text, "{} dport {{ {} }} ", protocol.word(), listed.join(", "));
        }
        Ports::Named(key) => {
            let Key::Ports { protocol, .. } = key else { return text };
            let _ = write!(text, "{ip} daddr . {} dport @{} ", protocol.word(), set_name(key, family));
        }
    }
    text
}

fn range_text((from, to): (u16, u16)) -> String {
    if from == to { from.to_string() } else { format!("{from}-{to}") }
}

fn write_target(
    verb: &str,
    (direction, address): (Direction, IpAddr),
    to: Option<&Combination>,
    text: &mut String,
) {
    let map = format!("{}{}", direction.word(), Family::of(address).digit());
    let to = to.map(|to| format!(" : jump {}", combination_name(direction, to))).unwrap_or_default();
    let _ = writeln!(text, "{verb} element inet {POLICY_TABLE} {map} {{ {address}{to} }}");
}

fn write_itself(verb: &str, address: IpAddr, text: &mut String) {
    let digit = Family::of(address).digit();
    let _ = writeln!(text, "{verb} element inet {POLICY_TABLE} itself{digit} {{ {address} . {address} }}");
}

fn set_name(key: &Key, family: Family) -> String {
    let kind = match key {
        Key::Pods(_) => "pods",
        Key::Block(_) => "block",
        Key::Ports { .. } => "ports",
    };
    format!("{kind}{}-{:016x}", family.digit(), SipHasher::new().hash(format!("{key:?}").as_bytes()))
}

fn set_type(key: &Key, family: Family) -> String {
    let address = family.address_type();
    match key {
        Key::Pods(_) => format!("type {address};"),
        Key::Block(_) => format!("type {address}; flags interval;"),
        Key::Ports { .. } => format!("type {address} . inet_service;"),
    }
}

/// Readable where it fits.
fn chain_name(direction: Direction, stage: &Stage) -> String {
    let side = side(direction);
    let hash = |what: String| format!("{side}-{:016x}", SipHasher::new().hash(what.as_bytes()));
    match stage {
        Stage::Admin(policies) => format!("admin-{}", hash(format!("{policies:?}"))),
        Stage::Baseline(policies) => format!("baseline-{}", hash(format!("{policies:?}"))),
        Stage::Policy(policy) => {
            let name = format!("{side}/{policy}");
            if name.len() <= LONGEST_NAME { name } else { format!("long-{}", hash(policy.to_string())) }
        }
    }
}

/// All that a stage's lines may count on, whether they do or not.
fn stage_counters(direction: Direction, stage: &Stage) -> Vec<(String, Counted)> {
    let name = chain_name(direction, stage);
    match stage {
        Stage::Policy(policy) => vec![(name, Counted::By(direction, policy.clone(), Outcome::Allowed))],
        Stage::Admin(policies) | Stage::Baseline(policies) => {
            let of = |(number, policy): (usize, &PolicyId)| {
                ACTIONS.map(|(action, outcome)| {
                    let what = Counted::By(direction, policy.clone(), outcome);
                    (tier_counter(&name, number, action), what)
                })
            };
            policies.iter().enumerate().flat_map(of).collect()
        }
    }
}

fn counter_name(direction: Direction, stage: &Stage, line: &Line) -> String {
    let name = chain_name(direction, stage);
    match stage {
        Stage::Policy(_) => name,
        Stage::Admin(policies) | Stage::Baseline(policies) => {
            let number = policies.iter().position(|policy| *policy == line.by);
            tier_counter(&name, number.expect("a tier's lines are its policies'"), line.action)
        }
    }
}

fn tier_counter(chain: &str, number: usize, action: Action) -> String {
    let action = match action {
        Action::Accept => "accept",
        Action::Deny => "deny",
        Action::Pass => "pass",
    };
    format!("{chain}-{number}-{action}")
}

/// Those of the pod's own namespace.
fn own(combination: &Combination) -> impl Iterator<Item = &PolicyId> {
    combination.iter().filter_map(|stage| match stage {
        Stage::Policy(policy) => Some(policy),
        Stage::Admin(_) | Stage::Baseline(_) => None,
    })
}

fn combination_name(direction: Direction, combination: &Combination) -> String {
    let side = side(direction);
    if combination.is_empty() {
        return format!("{side}-open");
    }
    format!("{side}-{:016x}", SipHasher::new().hash(format!("{combination:?}").as_bytes()))
}

fn side(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "in",
        Direction::Egress => "out",
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn digit(self) -> char {
        if self == Self::V4 { '4' } else { '6' }
    }

    fn word(self) -> &'static str {
        if self == Self::V4 { "ip" } else { "ip6" }
    }

    fn address_type(self) -> &'static str {
        if self == Self::V4 { "ipv4_addr" } else { "ipv6_addr" }
    }
}

/// A set with one number in it, by which a transaction is known to hold.
pub const REVISION: &str = "revision";
/// Counts segments of connections that are none (any more).
const LATE: &str = "late";
/// In one line of a script.
const ELEMENTS: usize = 500;
/// Of a chain, in characters; the kernel takes 255.
const LONGEST_NAME: usize = 200;
/// Of a log's prefix; the kernel takes 127.
const LONGEST_PREFIX: usize = 120;
const ACTIONS: [(Action, Outcome); 3] =
    [(Action::Accept, Outcome::Allowed), (Action::Deny, Outcome::Dropped), (Action::Pass, Outcome::Passed)];
const LOG_RATE: &str = "10/second burst 20 packets";
/// Since Linux 6.9 and nft 1.1.1.
const OWNED: &str = "    flags owner, persist\n";
const SKELETON: &str = "\
    set revision { type mark; }
    set itself4 { type ipv4_addr . ipv4_addr; }
    set itself6 { type ipv6_addr . ipv6_addr; }
    map egress4 { type ipv4_addr : verdict; }
    map egress6 { type ipv6_addr : verdict; }
    map ingress4 { type ipv4_addr : verdict; }
    map ingress6 { type ipv6_addr : verdict; }
    counter late { }
    chain egress {
        type filter hook forward priority 0; policy accept;
        ct state established,related accept
        ip saddr . ip daddr @itself4 accept
        ip6 saddr . ip6 daddr @itself6 accept
        ip saddr vmap @egress4
        ip6 saddr vmap @egress6
    }
    chain ingress {
        type filter hook forward priority 1; policy accept;
        ct state established,related accept
        ip saddr . ip daddr @itself4 accept
        ip6 saddr . ip6 daddr @itself6 accept
        ip daddr vmap @ingress4
        ip6 daddr vmap @ingress6
    }
}
";
