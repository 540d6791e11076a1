//! What is measured, for how long, and in which order.
//!
//! Rounds are interleaved: each visits every path once, so that what disturbs the machine for a while disturbs all alike.
//! Each round begins with another path, so that none always comes first, or always after the same one.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::Duration;

/// How long each measurement takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// Before anything counts.
    pub warm_up: Duration,
    /// Each of the two TCP measurements.
    pub tcp: Duration,
    pub flood: Duration,
    pub exchange: Duration,
    /// One trial of the search for the rate without loss.
    pub trial: Duration,
    pub trials: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub rounds: usize,
    pub times: Times,
}

impl Plan {
    /// So many rounds, with `unit` for one TCP measurement and the rest in proportion.
    pub fn full(rounds: usize, unit: Duration) -> Self {
        let times = Times {
            warm_up: unit / 8,
            tcp: unit,
            flood: unit / 2,
            exchange: unit / 2,
            trial: unit / 6,
            trials: 12,
        };
        Self { rounds, times }
    }

    /// As many rounds, three at most, as `budget` has room for when that many visits make a round.
    pub fn quick(visits: usize, budget: Duration) -> Self {
        let times = Times {
            warm_up: Duration::from_millis(100),
            tcp: Duration::from_millis(400),
            flood: Duration::from_millis(300),
            exchange: Duration::from_millis(200),
            trial: Duration::from_millis(80),
            trials: 8,
        };
        let room = budget.as_millis() / (times.visit() * visits.max(1) as u32).as_millis();
        Self { rounds: room.clamp(1, 3) as usize, times }
    }

    /// The order of a round's visits among `paths` paths.
    pub fn order(round: usize, paths: usize) -> impl Iterator<Item = usize> {
        (0..paths).map(move |step| (round + step) % paths)
    }
}

impl Times {
    /// One path's measurements in one round, but for connecting and for stragglers.
    pub fn visit(&self) -> Duration {
        let trial = self.trial + STRAGGLERS;
        (self.warm_up + self.tcp) * 2 + self.warm_up + self.flood + self.exchange + trial * self.trials as u32
    }
}

/// After each trial, for what is still on its way.
const STRAGGLERS: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_visits_each_path_once_and_begins_with_another() {
        let orders: Vec<Vec<_>> = (0..3).map(|round| Plan::order(round, 3).collect()).collect();
        assert_eq!(orders, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
    }

    #[test]
    fn a_quick_run_keeps_to_its_budget_and_never_has_less_than_a_round() {
        let budget = Duration::from_secs(60);
        for visits in 1..=20 {
            let plan = Plan::quick(visits, budget);
            let took = plan.times.visit() * (visits * plan.rounds) as u32;
            assert!(took <= budget || plan.rounds == 1, "{visits} visits take {took:?}");
        }
        assert_eq!(Plan::quick(2, budget).rounds, 3);
        assert_eq!(Plan::quick(100, budget).rounds, 1);
    }
}
