//! What an operator should see, as Events on the Node; never a flood.
//!
//! ```text
//!   finding ──new──▶ an Event is made ──the same reason again──▶ counted, told at most every five minutes
//!                                      ──ten minutes of silence──▶ the next is a new Event
//! ```
//! There are a handful of reasons, so the number of calls is bounded whatever happens.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Why an Event is made; its name is the Event's `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NetworkReady,
    NetworkNotReady,
    PeerUnreachable,
    AddressSpaceLow,
    AddressDispute,
    MtuChanged,
}

/// One thing to be told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    pub reason: Reason,
    pub note: String,
}

/// A call to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Post {
    /// Tells the Events of one agent apart.
    pub number: u64,
    pub finding: Finding,
    pub count: u32,
    /// There is such an Event already: its count and note change.
    pub again: bool,
}

/// Decides what is told of what is found.
#[derive(Debug, Default)]
pub struct Aggregator {
    series: BTreeMap<Reason, Series>,
    numbers: u64,
    /// What was found last.
    standing: BTreeSet<Finding>,
}

#[derive(Debug)]
struct Series {
    number: u64,
    note: String,
    count: u32,
    told: u32,
    told_at: Instant,
    last: Instant,
}

impl Reason {
    pub fn is_normal(self) -> bool {
        matches!(self, Self::NetworkReady | Self::MtuChanged)
    }
}

impl Aggregator {
    /// Takes in all that is so now; what was so before is not news.
    pub fn observe(&mut self, findings: BTreeSet<Finding>, now: Instant) -> Vec<Post> {
        let news: Vec<Finding> = findings.difference(&self.standing).cloned().collect();
        self.standing = findings;
        let mut posts: Vec<Post> = news.into_iter().filter_map(|finding| self.note(finding, now)).collect();
        posts.extend(self.due(now));
        posts
    }

    /// Takes in one thing that has happened.
    pub fn note(&mut self, finding: Finding, now: Instant) -> Option<Post> {
        if let Some(series) = self.series.get_mut(&finding.reason)
            && now.saturating_duration_since(series.last) < SILENCE
        {
            (series.count, series.last, series.note) = (series.count + 1, now, finding.note);
            return None;
        }
        self.numbers += 1;
        let (number, note) = (self.numbers, finding.note.clone());
        let series = Series { number, note, count: 1, told: 1, told_at: now, last: now };
        self.series.insert(finding.reason, series);
        Some(Post { number, finding, count: 1, again: false })
    }

    /// Counts that are to be told. Call again about every minute.
    fn due(&mut self, now: Instant) -> Vec<Post> {
        let untold = |series: &Series| {
            series.count > series.told && now.saturating_duration_since(series.told_at) >= AGAIN
        };
        let due = self.series.iter_mut().filter(|(_, series)| untold(series));
        due.map(|(reason, series)| {
            (series.told, series.told_at) = (series.count, now);
            let finding = Finding { reason: *reason, note: series.note.clone() };
            Post { number: series.number, finding, count: series.count, again: true }
        })
        .collect()
    }
}

/// How long nothing must have happened until the next is a new Event.
const SILENCE: Duration = Duration::from_secs(600);
/// How often a count is told.
const AGAIN: Duration = Duration::from_secs(300);

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use super::*;

    fn finding(reason: Reason, note: &str) -> Finding {
        Finding { reason, note: note.into() }
    }

    #[test]
    fn what_goes_on_is_told_once_and_what_flaps_is_counted() {
        let (start, mut events) = (Instant::now(), Aggregator::default());
        let down = || BTreeSet::from([finding(Reason::PeerUnreachable, "b")]);
        let mut posts = Vec::new();
        // Up and down, every second, for half an hour.
        for second in 0..1800 {
            let found = if second % 2 == 0 { down() } else { BTreeSet::new() };
            posts.extend(events.observe(found, start + Duration::from_secs(second)));
        }
        assert_eq!(
            posts.iter().map(|post| post.again).collect::<Vec<_>>(),
            [false, true, true, true, true, true]
        );
        assert!(posts.iter().all(|post| post.number == 1) && posts.last().unwrap().count > 700);

        let mut steady = Aggregator::default();
        let told: usize =
            (0..1800).map(|second| steady.observe(down(), start + Duration::from_secs(second)).len()).sum();
        assert_eq!(told, 1);
    }

    #[test]
    fn after_a_silence_it_is_a_new_event_and_another_reason_always_is() {
        let (start, mut events) = (Instant::now(), Aggregator::default());
        let mut note = |reason, at| events.note(finding(reason, "x"), start + at).map(|post| post.number);
        assert_eq!(note(Reason::AddressDispute, Duration::ZERO), Some(1));
        assert_eq!(note(Reason::AddressDispute, SILENCE / 2), None);
        assert_eq!(note(Reason::MtuChanged, SILENCE / 2), Some(2));
        assert_eq!(note(Reason::AddressDispute, SILENCE * 2), Some(3));
    }
}
