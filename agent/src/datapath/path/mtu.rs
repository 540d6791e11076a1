//! How large packets may be on one way: a search by probes of several sizes at once (after RFC 8899).
//!
//! ```text
//!   floor ───────── known ─ · · · · · · · ─ ceiling ─────── wanted
//!           pass            tried evenly      lost
//! ```
//!
//! What is wanted is believed until probes of that size are lost twice while smaller ones are answered; then the largest
//! that was answered holds at once, and the rest is narrowed down. Every ten seconds a narrow way is tried for more.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use arrayvec::ArrayVec;
use std::time::{Duration, Instant};

/// Sizes to probe at once; 0 for a probe without padding.
pub type Sizes = ArrayVec<u16, VOLLEY>;

/// The search on one way. All sizes are inner packets', in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    floor: u16,
    wanted: u16,
    /// Packets of that size pass, as far as we know.
    known: u16,
    /// Packets of that size are lost, as far as we know; above `wanted` if none are.
    ceiling: u16,
    /// A probe of the known size was answered.
    proven: bool,
    /// Rounds in which the known size was lost.
    doubts: u32,
    /// When to try for more.
    raise: Option<Instant>,
    told: u16,
}

impl Search {
    /// Begins with `assumed`, which has yet to be proven.
    pub fn new(floor: u16, wanted: u16, assumed: u16) -> Self {
        let known = assumed.clamp(floor.min(wanted), wanted);
        let ceiling = wanted.saturating_add(1);
        Self { floor, wanted, known, ceiling, proven: false, doubts: 0, raise: None, told: known }
    }

    /// The largest size that passes. It falls at once and rises when it is certain by how much.
    pub fn mtu(&self) -> u16 {
        self.told
    }

    /// Whether there is something to find out, also without traffic.
    pub fn is_open(&self) -> bool {
        !self.proven || self.doubts > 0 || self.is_narrowing()
    }

    /// When a narrow way is to be tried for more.
    pub fn raise(&self) -> Option<Instant> {
        self.raise
    }

    /// What to probe now; `full` where packets of the known size are on their way, too.
    pub fn sizes(&mut self, full: bool, now: Instant) -> Sizes {
        if self.raise.is_some_and(|at| at <= now) {
            self.raise = None;
            self.ceiling = self.wanted.saturating_add(1);
        }
        let mut sizes = Sizes::new();
        if self.doubts > 0 {
            sizes.push(0);
            sizes.extend(evenly(self.floor.saturating_sub(1), self.known, VOLLEY - 2));
            sizes.push(self.known);
        } else if self.proven && self.is_narrowing() {
            // The known one tells a narrow way from one that loses everything.
            sizes.push(self.known);
            sizes.extend(evenly(self.known, self.ceiling - 1, VOLLEY - 2));
            sizes.push(self.ceiling - 1);
        } else if full || !self.proven {
            sizes.push(self.known);
        } else {
            sizes.push(0);
        }
        sizes
    }

    /// Takes the outcome of one round: the largest size that was answered, none if nothing was, and the smallest above
    /// it that was not.
    pub fn outcome(&mut self, answered: Option<u16>, lost: Option<u16>, now: Instant) {
        match (answered, lost) {
            // Perhaps it was all too large: then something smaller tells.
            (None, _) => self.doubts = self.doubts.max(1),
            (Some(answered), lost) if answered >= self.known => {
                (self.known, self.proven, self.doubts) = (answered, true, 0);
                self.ceiling = lost.unwrap_or(self.ceiling).max(self.known.saturating_add(1));
            }
            (Some(answered), Some(lost)) if lost <= self.known => {
                self.doubts += 1;
                if self.doubts > PATIENCE {
                    self.known = answered.clamp(self.floor.min(self.wanted), self.known);
                    self.ceiling = lost.max(self.known.saturating_add(1));
                    (self.proven, self.doubts) = (true, 0);
                }
            }
            // A probe without padding.
            (Some(_), _) => {}
        }
        if self.proven && self.doubts == 0 && !self.is_narrowing() && self.known < self.wanted {
            self.raise.get_or_insert(now + RAISE);
        }
        if self.known < self.told || !self.is_narrowing() {
            self.told = self.known;
        }
    }

    /// Nobody knows how large a gap there is between what passes and what is lost.
    fn is_narrowing(&self) -> bool {
        self.ceiling.saturating_sub(self.known) > 1
    }
}

/// Up to `count` sizes between two, without them; the largest first.
fn evenly(low: u16, high: u16, count: usize) -> impl Iterator<Item = u16> {
    let between = high.saturating_sub(low).saturating_sub(1);
    let count = between.min(count as u16);
    let gap = u32::from(between) + 1;
    // Where all fit, all are tried.
    (1..=count).rev().map(move |n| low + (u32::from(n) * gap / (u32::from(count) + 1)) as u16)
}

/// Probes of one round.
pub const VOLLEY: usize = 10;
/// Rounds in which a size may be lost while smaller ones are answered.
const PATIENCE: u32 = 2;
/// How long a narrow way is left alone.
const RAISE: Duration = Duration::from_secs(10);

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Probes over a way that takes so much, until it has found out; how many rounds that took.
    fn settle(search: &mut Search, takes: u16, now: Instant) -> usize {
        for round in 0..50 {
            if !search.is_open() {
                return round;
            }
            go(search, takes, now);
        }
        panic!("{search:?} does not end");
    }

    fn go(search: &mut Search, takes: u16, now: Instant) {
        let sizes = search.sizes(true, now);
        assert!(!sizes.is_empty() && sizes.iter().all(|size| *size <= search.wanted));
        let answered = sizes.iter().copied().filter(|size| *size <= takes).max();
        let lost = sizes.iter().copied().filter(|size| *size > takes).min();
        search.outcome(answered, lost, now);
    }

    #[test]
    fn a_way_that_shrinks_is_noticed_in_three_rounds() {
        let now = Instant::now();
        let mut search = Search::new(576, 1440, 1440);
        assert_eq!((settle(&mut search, 9000, now), search.mtu()), (1, 1440));
        for _ in 0..2 {
            go(&mut search, 1240, now);
            assert_eq!(search.mtu(), 1440, "it may be by chance");
        }
        go(&mut search, 1240, now);
        assert!((1100..=1240).contains(&search.mtu()), "{search:?}");
        assert!(settle(&mut search, 1240, now) <= 4);
        assert_eq!(search.mtu(), 1240);
    }

    #[test]
    fn a_narrow_way_is_tried_for_more() {
        let now = Instant::now();
        let mut search = Search::new(576, 8940, 8940);
        settle(&mut search, 1440, now);
        assert_eq!(search.mtu(), 1440);
        let raise = search.raise().unwrap();
        assert_eq!(search.sizes(false, now)[..], [0]);
        go(&mut search, 8940, raise);
        settle(&mut search, 8940, raise);
        assert_eq!((search.mtu(), search.raise()), (8940, None));
    }

    #[test]
    fn a_way_that_loses_everything_says_nothing_of_sizes() {
        let now = Instant::now();
        let mut search = Search::new(576, 1440, 1440);
        settle(&mut search, 1440, now);
        for _ in 0..20 {
            let sizes = search.sizes(true, now);
            search.outcome(None, sizes.iter().copied().min(), now);
        }
        assert_eq!(search.mtu(), 1440);
        assert_eq!((settle(&mut search, 1440, now), search.mtu()), (1, 1440));
    }

    #[test]
    fn a_relayed_way_begins_with_less_and_finds_more() {
        let now = Instant::now();
        let mut search = Search::new(576, 1440, 1428);
        assert_eq!(search.mtu(), 1428);
        settle(&mut search, 1440, now);
        assert_eq!(search.mtu(), 1440);
        let mut search = Search::new(576, 1440, 1428);
        settle(&mut search, 1428, now);
        assert_eq!(search.mtu(), 1428);
    }

    proptest! {
        #[test]
        fn every_size_is_found(wanted in 576u16..9000, takes in 576u16..=9500, later in 576u16..=9500) {
            let mut now = Instant::now();
            let mut search = Search::new(576, wanted, wanted);
            let rounds = settle(&mut search, takes, now);
            prop_assert_eq!(search.mtu(), takes.min(wanted));
            prop_assert!(rounds <= 9, "{rounds}");
            // And again when it changes.
            go(&mut search, later, now);
            settle(&mut search, later, now);
            if let Some(raise) = search.raise() {
                now = raise;
                go(&mut search, later, now);
            }
            settle(&mut search, later, now);
            prop_assert_eq!(search.mtu(), later.min(wanted));
        }

        #[test]
        fn whatever_is_said_stays_within_bounds(rounds in prop::collection::vec(any::<(Option<u16>, Option<u16>)>(), 0..40)) {
            let now = Instant::now();
            let mut search = Search::new(576, 1440, 1440);
            for (answered, lost) in rounds {
                let sizes = search.sizes(true, now);
                let pick = |n: Option<u16>| n.map(|n| sizes[usize::from(n) % sizes.len()]);
                search.outcome(pick(answered), pick(lost), now);
                prop_assert!((576..=1440).contains(&search.mtu()) && search.known < search.ceiling);
            }
        }
    }
}
