//! As much of nftables as the text that is rendered needs: scripts change a table, and packets go through it.
//!
//! What the kernel would refuse, such as a set's removal while a rule uses it, panics here.

use super::model::{Direction, Flow, Protocol, Service};
use crate::types::Prefix;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Chains and sets by name; rules and elements are text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    sets: BTreeMap<String, BTreeSet<String>>,
    maps: BTreeMap<String, BTreeMap<String, String>>,
    chains: BTreeMap<String, Vec<String>>,
    counters: BTreeSet<String>,
}

enum End {
    Accept,
    Drop,
    /// Of a chain that nothing in it has decided.
    Return,
}

impl Table {
    /// Takes a script's steps.
    pub fn run(&mut self, script: &str) {
        let script = match script.split_once("table inet weft-policy {\n") {
            Some((_, rest)) => {
                *self = Self::default();
                let (skeleton, steps) = rest.split_once("\n}\n").unwrap();
                self.read(skeleton);
                steps
            }
            None => script,
        };
        script.lines().for_each(|line| self.step(line));
    }

    fn read(&mut self, skeleton: &str) {
        let mut open: Option<String> = None;
        for line in skeleton.lines().map(str::trim) {
            let words: Vec<_> = line.split(' ').collect();
            match (words[0], &open) {
                ("set", None) => drop(self.sets.insert(words[1].into(), BTreeSet::new())),
                ("map", None) => drop(self.maps.insert(words[1].into(), BTreeMap::new())),
                ("flags", None) => {}
                ("counter", None) => drop(self.counters.insert(words[1].into())),
                ("chain", None) => {
                    self.chains.insert(words[1].into(), Vec::new());
                    open = Some(words[1].into());
                }
                ("}", Some(_)) => open = None,
                ("type", Some(_)) => {}
                (_, Some(chain)) => self.chains.get_mut(chain).unwrap().push(line.into()),
                _ => panic!("{line}"),
            }
        }
    }

    fn step(&mut self, line: &str) {
        let (before, rest) = line.split_once(" inet weft-policy ").unwrap();
        let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let name = name.to_string();
        match before {
            "add set" => assert!(self.sets.insert(name, BTreeSet::new()).is_none(), "{line}"),
            "add counter" => drop(self.counters.insert(name)),
            "add chain" => drop(self.chains.entry(name).or_default()),
            "flush chain" => self.chains.get_mut(&name).unwrap().clear(),
            "flush set" => self.sets.get_mut(&name).unwrap().clear(),
            "add rule" => {
                self.check(rest);
                self.chains.get_mut(&name).unwrap().push(rest.into());
            }
            "add element" | "delete element" => {
                let listed = rest.strip_prefix("{ ").unwrap().strip_suffix(" }").unwrap();
                listed.split(", ").for_each(|element| self.element(before, &name, element));
            }
            "delete set" => {
                assert!(!self.uses(&format!("@{name}")), "{line}");
                self.sets.remove(&name).unwrap();
            }
            "delete counter" => {
                assert!(!self.uses(&format!("counter name {name}")) && self.counters.remove(&name), "{line}");
            }
            "delete chain" => {
                let jump = format!("jump {name}");
                let leads = self.maps.values().any(|map| map.values().any(|verdict| *verdict == jump));
                assert!(
                    !leads && !self.uses(&jump) && self.chains.remove(&name).unwrap().is_empty(),
                    "{line}"
                );
            }
            _ => panic!("{line}"),
        }
    }

    fn element(&mut self, verb: &str, name: &str, element: &str) {
        let done = match (self.sets.get_mut(name), verb == "add element") {
            (Some(set), true) => set.insert(element.into()),
            (Some(set), false) => set.remove(element),
            (None, true) => {
                let (key, verdict) = element.split_once(" : ").unwrap();
                self.check(verdict);
                self.maps.get_mut(name).unwrap().insert(key.into(), verdict.into()).is_none()
            }
            (None, false) => self.maps.get_mut(name).unwrap().remove(element).is_some(),
        };
        assert!(done, "{verb} {name} {element}");
    }

    /// Whether a rule names it.
    fn uses(&self, what: &str) -> bool {
        self.chains.values().flatten().any(|rule| format!("{rule} ").contains(&format!("{what} ")))
    }

    /// All that a rule names must be there.
    fn check(&self, rule: &str) {
        let words: Vec<_> = rule.split(' ').collect();
        for pair in words.windows(2) {
            match pair {
                ["jump", chain] => assert!(self.chains.contains_key(*chain), "{rule}"),
                ["name", counter] => assert!(self.counters.contains(*counter), "{rule}"),
                [_, set] if set.starts_with('@') => assert!(self.sets.contains_key(&set[1..]), "{rule}"),
                _ => {}
            }
        }
    }

    pub fn has_counters(&self, names: &[String]) -> bool {
        self.counters.iter().eq(names)
    }

    /// Whether one end lets through the packet that begins a flow, or one that goes on without having begun.
    pub fn passes(&self, direction: Direction, flow: &Flow, begins: bool) -> bool {
        !matches!(self.walk(direction.word(), flow, begins), End::Drop)
    }

    fn walk(&self, chain: &str, flow: &Flow, begins: bool) -> End {
        for rule in &self.chains[chain] {
            match self.rule(rule, flow, begins) {
                None => {}
                Some(End::Return) => return End::Return,
                Some(end) => return end,
            }
        }
        End::Return
    }

    /// None: on to the next one.
    fn rule(&self, rule: &str, flow: &Flow, begins: bool) -> Option<End> {
        let protocol = match flow.to {
            Service::Port(protocol, _) => protocol.word(),
            Service::Other => "icmp",
        };
        let words: Vec<_> = rule.split(' ').collect();
        let mut rest = &words[..];
        loop {
            let (matches, taken) = match rest {
                ["ct", "state", "established,related", ..] => (false, 3),
                ["tcp", "flags", "&", "(fin", "|", "syn", "|", "rst", "|", "ack)", "!=", "syn", ..] => {
                    (protocol == Protocol::Tcp.word() && !begins, 12)
                }
                [ip @ ("ip" | "ip6"), "saddr", ".", other, "daddr", set, ..] if ip == other => (
                    self.has(set, ip, flow.source, |it| {
                        it == format!("{} . {}", flow.source, flow.destination)
                    }),
                    6,
                ),
                [ip @ ("ip" | "ip6"), side @ ("saddr" | "daddr"), "vmap", map, ..] => {
                    let address = end(flow, side);
                    let verdict = self.maps[&map[1..]].get(&address.to_string());
                    let verdict = verdict.filter(|_| is_of(ip, address))?;
                    return match self.walk(verdict.strip_prefix("jump ").unwrap(), flow, begins) {
                        End::Return => None,
                        end => Some(end),
                    };
                }
                [ip @ ("ip" | "ip6"), "daddr", ".", of, "dport", set, ..] => {
                    let wanted = format!("{} . {}", flow.destination, port(flow));
                    (protocol == *of && self.has(set, ip, flow.destination, |it| it == wanted), 6)
                }
                [ip @ ("ip" | "ip6"), side @ ("saddr" | "daddr"), set, ..] => {
                    let address = end(flow, side);
                    let inside = |it: &str| match it.parse::<Prefix>() {
                        Ok(prefix) => prefix.contains(&address),
                        Err(_) => it == address.to_string(),
                    };
                    (self.has(set, ip, address, inside), 3)
                }
                ["meta", "l4proto", of, ..] => (protocol == *of, 3),
                [of @ ("tcp" | "udp" | "sctp"), "dport", "{", ..] => {
                    let close = rest.iter().position(|word| *word == "}").unwrap();
                    let inside = rest[3..close].iter().any(|range| {
                        let range = range.trim_end_matches(',');
                        let (from, to) = range.split_once('-').unwrap_or((range, range));
                        (from.parse().unwrap()..=to.parse().unwrap()).contains(&port(flow))
                    });
                    (protocol == *of && inside, close + 1)
                }
                ["counter", "name", _, ..] => (true, 3),
                ["limit", "rate", ..] => return None,
                ["jump", chain] => {
                    return match self.walk(chain, flow, begins) {
                        End::Return => None,
                        end => Some(end),
                    };
                }
                ["accept"] => return Some(End::Accept),
                ["drop"] => return Some(End::Drop),
                ["return"] => return Some(End::Return),
                _ => panic!("{rule}"),
            };
            if !matches {
                return None;
            }
            rest = &rest[taken..];
        }
    }

    fn has(&self, set: &str, ip: &str, address: IpAddr, is: impl Fn(&str) -> bool) -> bool {
        is_of(ip, address) && self.sets[&set[1..]].iter().any(|element| is(element))
    }
}

fn is_of(ip: &str, address: IpAddr) -> bool {
    (ip == "ip") == address.is_ipv4()
}

fn end(flow: &Flow, side: &str) -> IpAddr {
    if side == "saddr" { flow.source } else { flow.destination }
}

fn port(flow: &Flow) -> u16 {
    match flow.to {
        Service::Port(_, port) => port,
        Service::Other => 0,
    }
}
