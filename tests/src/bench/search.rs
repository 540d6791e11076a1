//! The greatest rate that hardly loses anything, found by trying: up by steps while all is well, then by halves.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// Rates are in datagrams per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// The greatest that went through.
    passed: f64,
    /// The smallest that did not.
    failed: Option<f64>,
    next: f64,
    /// The next one has failed once: on a busy machine a moment's pause is enough for that.
    doubted: bool,
}

impl Search {
    /// Begins with a guess.
    pub fn new(guess: f64) -> Self {
        Self { passed: 0.0, failed: None, next: guess.max(LEAST), doubted: false }
    }

    /// The rate to try next; none when it is known well enough.
    pub fn next(&self) -> Option<f64> {
        let known = self.failed.is_some_and(|failed| failed - self.passed <= failed * FINE);
        (!known).then_some(self.next)
    }

    /// Takes a trial's outcome: the rate at which was really sent, and the share that was lost. A rate fails when it fails
    /// twice.
    pub fn judge(&mut self, rate: f64, loss: f64) {
        let passes = loss <= TOLERATED;
        if !passes && !self.doubted {
            self.doubted = true;
            return;
        }
        self.doubted = false;
        if passes {
            self.passed = self.passed.max(rate);
            // A sender that can't reach the rate won't reach a greater one.
            if rate < self.next * REACHED {
                self.failed = Some(self.passed);
            }
        } else {
            self.failed = Some(self.failed.map_or(rate, |failed| failed.min(rate)));
        }
        self.next = match self.failed {
            Some(failed) => (self.passed + failed) / 2.0,
            None => self.passed * STEP,
        };
    }

    /// The greatest rate that went through so far; zero when none did.
    pub fn best(&self) -> f64 {
        self.passed
    }
}

/// Share of datagrams that may be lost.
const TOLERATED: f64 = 0.001;
/// A rate is known when the smallest that failed is no more than this share above the greatest that passed.
const FINE: f64 = 0.03;
/// A sender that reaches this share of the rate has reached it.
const REACHED: f64 = 0.95;
const STEP: f64 = 1.25;
/// Where to begin when there is nothing to go by.
const LEAST: f64 = 1000.0;

#[cfg(test)]
mod tests {
    use super::*;

    /// A path that loses whatever is above its capacity, behind a sender with a limit.
    fn found(guess: f64, capacity: f64, limit: f64) -> (f64, usize) {
        let mut search = Search::new(guess);
        let mut trials = 0;
        while let Some(rate) = search.next() {
            let sent = rate.min(limit);
            search.judge(sent, (1.0 - capacity / sent).max(0.0));
            trials += 1;
            assert!(trials < 30, "{search:?}");
        }
        (search.best(), trials)
    }

    #[test]
    fn the_capacity_is_found_from_below_and_from_above() {
        for guess in [10e3, 90e3, 300e3] {
            let (rate, trials) = found(guess, 100e3, 1e6);
            assert!((97e3..=100.1e3).contains(&rate), "{rate} from {guess}");
            assert!(guess < 20e3 || trials <= 14, "{trials} trials from {guess}");
        }
    }

    #[test]
    fn one_bad_trial_does_not_count() {
        let mut search = Search::new(100e3);
        search.judge(100e3, 0.2);
        assert_eq!(search.next(), Some(100e3));
        search.judge(100e3, 0.0);
        assert_eq!(search.best(), 100e3);
        assert_eq!(search.next(), Some(125e3));
    }

    #[test]
    fn a_sender_at_its_limit_ends_the_search() {
        let (rate, trials) = found(100e3, 1e6, 120e3);
        assert!((120e3..=125e3).contains(&rate) && trials < 5, "{rate} after {trials}");
    }

    #[test]
    fn a_path_that_always_loses_has_no_rate() {
        let mut search = Search::new(50e3);
        for _ in 0..10 {
            let rate = search.next().unwrap();
            search.judge(rate, 0.5);
        }
        assert_eq!(search.best(), 0.0);
    }
}
