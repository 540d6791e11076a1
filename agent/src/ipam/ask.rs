//! Whom to ask for space, and when: one peer at a time, with back-off.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::PeerName;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub struct Asker {
    asked: Option<(PeerName, Instant)>,
    tries: u32,
}

impl Asker {
    /// Call when space is needed and anything changed, or at [`next_wake`](Self::next_wake). `candidates`: best first.
    /// Returns whom to ask now.
    pub fn seek(&mut self, candidates: &[PeerName], now: Instant) -> Option<PeerName> {
        if let Some((peer, until)) = &self.asked
            && now < *until
            && candidates.contains(peer)
        {
            return None;
        }
        let turn = self.tries as usize % candidates.len().max(1);
        self.asked = None;
        let peer = candidates.get(turn)?.clone();
        let wait = FIRST_WAIT.saturating_mul(1 << self.tries.min(16)).min(LONGEST_WAIT);
        self.asked = Some((peer.clone(), now + wait));
        self.tries += 1;
        Some(peer)
    }

    /// There is space: the next need starts afresh.
    pub fn satisfied(&mut self) {
        *self = Self::default();
    }

    pub fn asked(&self) -> Option<&PeerName> {
        self.asked.as_ref().map(|(peer, _)| peer)
    }

    pub fn next_wake(&self) -> Option<Instant> {
        self.asked.as_ref().map(|(_, until)| *until)
    }
}

/// A giver answers within a round trip; a lost message costs this much.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_asked_in_turn_with_growing_pauses() {
        let (a, b): (PeerName, PeerName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let both = [a.clone(), b.clone()];
        let (mut asker, start) = (Asker::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(asker.seek(&[], at(0)), None);
        assert_eq!(asker.seek(&both, at(0)), Some(a.clone()));
        assert_eq!(asker.seek(&both, at(499)), None);
        assert_eq!(asker.seek(&both, at(500)), Some(b.clone()));
        assert_eq!(asker.next_wake(), Some(at(1500)));
        assert_eq!(
            asker.seek(std::slice::from_ref(&a), at(600)),
            Some(a),
            "who has nothing left is not waited for"
        );
    }
}
