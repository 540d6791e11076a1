//! The first frame of a link: who speaks, and whether we have to do with each other.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{Incarnation, PeerName, Universe};
use weft_proto::mesh::{Hello, Refusal, refusal::Code};

/// Who we are to those who call or are called.
#[derive(Clone, Debug)]
pub struct Greeting {
    pub name: PeerName,
    /// When this agent was born. The own record's incarnation may be raised beyond it.
    pub incarnation: Incarnation,
    pub software: String,
    pub universe: Universe,
    /// Who shares the universe at the start, sorted; empty where it is not known yet.
    pub seeds: Vec<PeerName>,
}

/// What follows from another's hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Welcome {
        name: PeerName,
        incarnation: Incarnation,
        seeds: Vec<PeerName>,
    },
    /// We have called ourselves.
    Myself,
    /// Another agent runs under our name, and was there before us.
    ElderTwin,
    /// Another agent runs under our name, and came after us.
    YoungerTwin(Refusal),
    Refused(Refusal),
    Garbage(&'static str),
}

impl Greeting {
    pub fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            name: self.name.to_string(),
            incarnation: self.incarnation.0,
            software: self.software.clone(),
            universe: self.universe.to_string(),
            seeds: self.seeds.iter().map(PeerName::to_string).collect(),
        }
    }

    /// Judges the other side, whose certificate names `certified` (`None`: the link is in clear). Refusals are worded for
    /// the operator of the refused agent.
    pub fn judge(&self, theirs: &Hello, certified: Option<&[PeerName]>) -> Verdict {
        let refuse = |code: Code, reason: String| Refusal { code: code.into(), reason };
        let own = &self.name;
        if theirs.protocol != PROTOCOL {
            let reason = format!(
                "agent {own} ({}) speaks protocol {PROTOCOL} and not {}; upgrade the older of the two",
                self.software, theirs.protocol
            );
            return Verdict::Refused(refuse(Code::Protocol, reason));
        }
        let Ok(name) = theirs.name.parse::<PeerName>() else {
            return Verdict::Garbage("a hello without a name");
        };
        let Ok(universe) = theirs.universe.parse::<Universe>() else {
            return Verdict::Garbage("a hello without a universe");
        };
        if certified.is_some_and(|names| !names.contains(&name)) {
            let names: Vec<_> = certified.iter().copied().flatten().map(PeerName::as_str).collect();
            let names = if names.is_empty() { "no node".into() } else { names.join(", ") };
            let reason = format!(
                "an agent says that it is {name}, but its certificate names {names}; it needs one of `weft ca issue {name}`, \
                 or another --name"
            );
            return Verdict::Refused(refuse(Code::Identity, reason));
        }
        let seeds =
            theirs.seeds.iter().take(MAX_SEEDS + 1).map(|seed| seed.parse()).collect::<Result<Vec<_>, _>>();
        let Some(seeds) = seeds.ok().filter(|seeds| seeds.len() <= MAX_SEEDS && seeds.is_sorted()) else {
            return Verdict::Garbage("a hello with seeds that are none");
        };
        let incarnation = Incarnation(theirs.incarnation);
        if name == *own {
            return match incarnation.cmp(&self.incarnation) {
                std::cmp::Ordering::Equal => Verdict::Myself,
                std::cmp::Ordering::Less => Verdict::ElderTwin,
                std::cmp::Ordering::Greater => {
                    let reason = format!(
                        "the name {own} is taken by an agent that was started before; use another --name"
                    );
                    Verdict::YoungerTwin(refuse(Code::NameTaken, reason))
                }
            };
        }
        if universe != self.universe {
            let reason = format!(
                "agent {own} has --universe {}, not {universe}; all agents need the same one",
                self.universe
            );
            return Verdict::Refused(refuse(Code::UniverseDiffers, reason));
        }
        if !self.seeds.is_empty() && !seeds.is_empty() && self.seeds != seeds {
            let list = |seeds: &[PeerName]| seeds.iter().map(PeerName::as_str).collect::<Vec<_>>().join(",");
            let reason = format!(
                "agent {own} has --ipam-seed {}, not {}; all agents that have one need the list that the network began with",
                list(&self.seeds),
                list(&seeds)
            );
            return Verdict::Refused(refuse(Code::SeedDiffers, reason));
        }
        Verdict::Welcome { name, incarnation, seeds }
    }
}

/// Version of the exchange on links.
pub const PROTOCOL: u32 = 1;
/// As many as a universe has blocks.
const MAX_SEEDS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting(name: &str, incarnation: u64) -> Greeting {
        Greeting {
            name: name.parse().unwrap(),
            incarnation: Incarnation(incarnation),
            software: "weft 0.1.0".into(),
            universe: "10.32.0.0/12".parse().unwrap(),
            seeds: vec!["s".parse().unwrap(), "t".parse().unwrap()],
        }
    }

    fn refused(verdict: Verdict) -> (Code, String) {
        match verdict {
            Verdict::Refused(refusal) | Verdict::YoungerTwin(refusal) => (refusal.code(), refusal.reason),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn agents_of_one_network_welcome_each_other() {
        let hello = greeting("b", 7).hello();
        let welcome = |seeds: &[PeerName]| {
            let name = "b".parse().unwrap();
            Verdict::Welcome { name, incarnation: Incarnation(7), seeds: seeds.into() }
        };
        let seeds = greeting("a", 1).seeds;
        assert_eq!(greeting("a", 1).judge(&hello, None), welcome(&seeds));
        assert_eq!(
            greeting("a", 1).judge(&hello, Some(&["x".parse().unwrap(), "b".parse().unwrap()])),
            welcome(&seeds)
        );
        assert_eq!(greeting("a", 1).judge(&Hello { seeds: Vec::new(), ..hello.clone() }, None), welcome(&[]));
    }

    #[test]
    fn differences_are_refused_with_a_reason_that_names_the_flag() {
        let (a, hello) = (greeting("a", 1), greeting("b", 7).hello());
        let (code, reason) =
            refused(a.judge(&Hello { universe: "10.0.0.0/8".into(), ..hello.clone() }, None));
        assert_eq!(code, Code::UniverseDiffers);
        assert_eq!(
            reason,
            "agent a has --universe 10.32.0.0/12, not 10.0.0.0/8; all agents need the same one"
        );
        let (code, reason) = refused(a.judge(&Hello { seeds: vec!["u".into()], ..hello.clone() }, None));
        assert!(code == Code::SeedDiffers && reason.contains("--ipam-seed"), "{reason}");
        let (code, reason) = refused(a.judge(&Hello { protocol: 2, ..hello }, None));
        assert!(code == Code::Protocol && reason.contains("not 2"), "{reason}");
    }

    #[test]
    fn of_two_with_one_name_the_elder_is_known_to_both() {
        let (elder, younger) = (greeting("a", 1), greeting("a", 2));
        assert_eq!(elder.judge(&elder.hello(), None), Verdict::Myself);
        assert_eq!(younger.judge(&elder.hello(), None), Verdict::ElderTwin);
        assert_eq!(refused(elder.judge(&younger.hello(), None)).0, Code::NameTaken);
    }

    #[test]
    fn a_name_that_the_certificate_does_not_have_is_refused() {
        let (a, names) = (greeting("a", 1), ["b".parse().unwrap()]);
        for claimed in ["c", "a"] {
            let (code, reason) = refused(a.judge(&greeting(claimed, 0).hello(), Some(&names)));
            assert_eq!(code, Code::Identity);
            assert!(reason.contains(&format!("it is {claimed}, but its certificate names b")), "{reason}");
        }
        let (_, reason) = refused(a.judge(&greeting("b", 1).hello(), Some(&[])));
        assert!(reason.contains("names no node"), "{reason}");
    }

    #[test]
    fn a_hello_of_nobody_is_garbage() {
        let a = greeting("a", 1);
        for hello in [
            Hello { name: "-".into(), ..a.hello() },
            Hello { universe: "10.32.0.1/12".into(), ..greeting("b", 1).hello() },
            Hello { seeds: vec!["a".into(); 5000], ..greeting("b", 1).hello() },
            Hello { seeds: vec!["t".into(), "s".into()], ..greeting("b", 1).hello() },
        ] {
            assert!(matches!(a.judge(&hello, None), Verdict::Garbage(_)), "{hello:?}");
        }
    }
}
