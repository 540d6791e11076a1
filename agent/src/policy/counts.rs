//! What policies have let begin and what they have dropped, added up from counters that come and go with the table.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::model::{Direction, PolicyId};
use prometheus_client::{
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
};
use std::{collections::BTreeMap, fmt};

/// What is counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counted {
    /// First packets of connections that a policy's rules have decided on.
    By(Direction, PolicyId, Outcome),
    /// Dropped for pods that all of these policies isolate, none of which allowed it.
    Unallowed(Direction, Vec<PolicyId>),
    /// Segments of connections that are none (any more).
    Late,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Allowed,
    Dropped,
    /// On to the next tier.
    Passed,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// Since this agent has started.
pub type Counts = BTreeMap<Counted, Count>;

/// Adds up.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// By the kernel's names.
    last: BTreeMap<String, Count>,
    counts: Counts,
}

impl Tally {
    /// Takes in what the kernel's counters show. One that shows less than before has begun anew.
    pub fn take_in(&mut self, shown: BTreeMap<String, (Counted, Count)>) {
        for (name, (what, now)) in &shown {
            let before = self.last.get(name).copied().filter(|before| before.packets <= now.packets);
            let before = before.unwrap_or_default();
            let total = self.counts.entry(what.clone()).or_default();
            total.packets += now.packets - before.packets;
            total.bytes += now.bytes.saturating_sub(before.bytes);
        }
        self.last = shown.into_iter().map(|(name, (_, now))| (name, now)).collect();
    }

    /// Of policies that are gone nothing is told.
    pub fn keep(&mut self, exists: impl Fn(&PolicyId) -> bool) {
        self.counts.retain(|what, _| match what {
            Counted::By(_, policy, _) => exists(policy),
            Counted::Unallowed(_, policies) => policies.iter().all(&exists),
            Counted::Late => true,
        });
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }
}

/// Both directions of a policy together: allowed, and dropped.
pub fn of_policy(counts: &Counts, policy: &PolicyId) -> (Count, Count) {
    let (mut allowed, mut dropped) = (Count::default(), Count::default());
    for (what, count) in counts {
        let sum = match what {
            Counted::By(_, by, Outcome::Allowed) if by == policy => &mut allowed,
            Counted::By(_, by, Outcome::Dropped) if by == policy => &mut dropped,
            Counted::Unallowed(_, by) if by.contains(policy) => &mut dropped,
            _ => continue,
        };
        sum.packets += count.packets;
        sum.bytes += count.bytes;
    }
    (allowed, dropped)
}

/// Shows counts to who scrapes.
pub fn encode(counts: &Counts, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let help = "that network policies decided on: first ones of connections; dropped are those of pods that the policy isolates";
    for (unit, name, _, value) in WAYS {
        let help = format!("{unit} {help}");
        let mut metric = encoder.encode_descriptor(name, &help, None, MetricType::Counter)?;
        for ((direction, policy, outcome), count) in by_policy(counts) {
            let labels = [
                ("namespace", policy.namespace.as_str()),
                ("policy", &policy.name),
                ("direction", direction.word()),
                ("verdict", outcome.word()),
            ];
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, u64>(&value(count), None)?;
        }
    }
    for (unit, _, name, value) in WAYS {
        let (mut forbidden, mut late) = (0, 0);
        for (what, count) in counts {
            match what {
                Counted::By(_, _, Outcome::Allowed | Outcome::Passed) => {}
                Counted::By(..) | Counted::Unallowed(..) => forbidden += value(*count),
                Counted::Late => late += value(*count),
            }
        }
        let help = format!("{unit} dropped for policies' sake: forbidden ones, and those of no connection");
        let mut metric = encoder.encode_descriptor(name, &help, None, MetricType::Counter)?;
        for (reason, number) in [("forbidden", forbidden), ("no_connection", late)] {
            let labels = [("reason", reason)];
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, u64>(&number, None)?;
        }
    }
    Ok(())
}

/// A packet that several policies have not allowed counts for each.
fn by_policy(counts: &Counts) -> BTreeMap<(Direction, &PolicyId, Outcome), Count> {
    let mut sums: BTreeMap<_, Count> = BTreeMap::new();
    for (what, count) in counts {
        let (direction, policies, outcome) = match what {
            Counted::By(direction, policy, outcome) => (direction, std::slice::from_ref(policy), outcome),
            Counted::Unallowed(direction, policies) => (direction, policies.as_slice(), &Outcome::Dropped),
            Counted::Late => continue,
        };
        for policy in policies {
            let sum = sums.entry((*direction, policy, *outcome)).or_default();
            sum.packets += count.packets;
            sum.bytes += count.bytes;
        }
    }
    sums
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Dropped => "dropped",
            Self::Passed => "passed",
        }
    }
}

/// A unit, what it is called by policy and of all drops, and where it is.
type Way = (&'static str, &'static str, &'static str, fn(Count) -> u64);

const WAYS: [Way; 2] = [
    ("Packets", "weft_policy_packets", "weft_policy_dropped_packets", |count| count.packets),
    ("Bytes of packets", "weft_policy_bytes", "weft_policy_dropped_bytes", |count| count.bytes),
];

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::{collector::Collector, encoding::text, registry::Registry};

    #[derive(Debug)]
    struct Shown(Counts);

    impl Collector for Shown {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
            encode(&self.0, encoder)
        }
    }

    fn id(name: &str) -> PolicyId {
        PolicyId { namespace: "x".into(), name: name.into() }
    }

    fn shown(name: &str, what: Counted, packets: u64) -> (String, (Counted, Count)) {
        (name.into(), (what, Count { packets, bytes: packets * 60 }))
    }

    #[test]
    fn counts_go_on_when_the_table_is_made_anew_and_policies_that_are_gone_have_none() {
        let what = || Counted::By(Direction::Ingress, id("a"), Outcome::Allowed);
        let mut tally = Tally::default();
        for packets in [5, 7, 2, 2] {
            tally.take_in([shown("in/x/a", what(), packets)].into());
        }
        assert_eq!(tally.counts()[&what()], Count { packets: 9, bytes: 540 });
        tally.take_in(BTreeMap::new());
        tally.take_in([shown("in/x/a", what(), 1)].into());
        assert_eq!(tally.counts()[&what()].packets, 10);
        tally.keep(|policy| *policy != id("a"));
        assert!(tally.counts().is_empty());
    }

    #[test]
    fn a_scrape_shows_each_policy_and_what_was_dropped() {
        let both = vec![id("a"), id("b")];
        let mut tally = Tally::default();
        tally.take_in(
            [
                shown("in/x/a", Counted::By(Direction::Ingress, id("a"), Outcome::Allowed), 3),
                shown("in-1", Counted::Unallowed(Direction::Ingress, both), 4),
                shown("in-2", Counted::Unallowed(Direction::Ingress, vec![id("b")]), 1),
                shown("late", Counted::Late, 2),
            ]
            .into(),
        );
        assert_eq!(of_policy(tally.counts(), &id("b")), (Count::default(), Count { packets: 5, bytes: 300 }));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Shown(tally.counts().clone())));
        let mut page = String::new();
        text::encode(&mut page, &registry).unwrap();
        insta::assert_snapshot!(page, @r#"
# HELP weft_policy_packets Packets that network policies decided on: first ones of connections; dropped are those of pods that the policy isolates
# TYPE weft_policy_packets counter
weft_policy_packets_total{namespace="x",policy="a",direction="ingress",verdict="allowed"} 3
weft_policy_packets_total{namespace="x",policy="a",direction="ingress",verdict="dropped"} 4
weft_policy_packets_total{namespace="x",policy="b",direction="ingress",verdict="dropped"} 5
# HELP weft_policy_bytes Bytes of packets that network policies decided on: first ones of connections; dropped are those of pods that the policy isolates
# TYPE weft_policy_bytes counter
weft_policy_bytes_total{namespace="x",policy="a",direction="ingress",verdict="allowed"} 180
weft_policy_bytes_total{namespace="x",policy="a",direction="ingress",verdict="dropped"} 240
weft_policy_bytes_total{namespace="x",policy="b",direction="ingress",verdict="dropped"} 300
# HELP weft_policy_dropped_packets Packets dropped for policies' sake: forbidden ones, and those of no connection
# TYPE weft_policy_dropped_packets counter
weft_policy_dropped_packets_total{reason="forbidden"} 5
weft_policy_dropped_packets_total{reason="no_connection"} 2
# HELP weft_policy_dropped_bytes Bytes of packets dropped for policies' sake: forbidden ones, and those of no connection
# TYPE weft_policy_dropped_bytes counter
weft_policy_dropped_bytes_total{reason="forbidden"} 300
weft_policy_dropped_bytes_total{reason="no_connection"} 120
# EOF
"#);
    }
}
