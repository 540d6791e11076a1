//! Who was turned away of late, or sent what it may not, for an operator to see: they may be meant to be peers.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

#[derive(Debug, Default)]
pub struct Refusals(BTreeMap<String, (String, Instant)>);

impl Refusals {
    /// `who` did `what`; where there are too many of them, the oldest is forgotten. True if that is news.
    pub fn note(&mut self, who: &str, what: &str, now: Instant) -> bool {
        self.0.retain(|_, (_, at)| now.saturating_duration_since(*at) < SHOWN);
        if self.0.len() >= MOST
            && !self.0.contains_key(who)
            && let Some(oldest) = self.0.iter().min_by_key(|(_, (_, at))| *at).map(|(who, _)| who.clone())
        {
            self.0.remove(&oldest);
        }
        self.0.insert(who.into(), (what.into(), now)).is_none_or(|(before, _)| before != what)
    }

    /// Who, and what it did.
    pub fn list(&self, now: Instant) -> Vec<(String, String)> {
        let recent =
            |(_, (_, at)): &(&String, &(String, Instant))| now.saturating_duration_since(*at) < SHOWN;
        self.0.iter().filter(recent).map(|(who, (what, _))| (who.clone(), what.clone())).collect()
    }
}

const SHOWN: Duration = Duration::from_secs(120);
const MOST: usize = 8;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn the_last_few_are_shown_for_a_while() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        (0..20).for_each(|n| assert!(refusals.note(&format!("192.0.2.{n}"), "why", at(n))));
        assert!(!refusals.note("192.0.2.19", "why", at(19)));
        let shown = refusals.list(at(20));
        assert_eq!((shown.len(), shown[0].0.as_str()), (MOST, "192.0.2.12"));
        assert_eq!(refusals.list(at(19) + SHOWN), []);
    }
}
