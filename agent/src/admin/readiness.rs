//! Readiness by drop.
//!
//! ```text
//!   Readiness::new                     ─▶ Pending ──drop──┐
//!   .pending("no addresses yet")       ─▶ Pending ──drop──┼─▶ no guard left: ready
//!   .pending("bridge weft is down: …") ─▶ Pending ──drop──┘   (until there is one again)
//! ```
//! Nobody can forget to say that a condition is over, on whatever way out of a function.

use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// Whether ADD would work now, and if not, why. Clones are the same readiness.
#[derive(Clone, Debug)]
pub struct Readiness {
    blocks: Arc<watch::Sender<Blocks>>,
}

/// Something that keeps the agent from being ready, until it is dropped.
#[must_use = "readiness is no longer held back once this is dropped"]
#[derive(Debug)]
pub struct Pending {
    readiness: Readiness,
    id: u64,
}

/// What holds readiness back now.
#[derive(Debug, Default)]
pub struct Blocks {
    next: u64,
    reasons: BTreeMap<u64, String>,
}

impl Readiness {
    /// Not ready as long as the guard that comes with it lives: take the others before it is dropped.
    pub fn new() -> (Self, Pending) {
        let readiness = Self { blocks: Arc::new(watch::Sender::default()) };
        let starting = readiness.pending("starting");
        (readiness, starting)
    }

    /// Holds readiness back for a reason: what failed, on which object, why.
    pub fn pending(&self, reason: impl Into<String>) -> Pending {
        let mut id = 0;
        self.blocks.send_modify(|blocks| {
            id = blocks.next;
            blocks.next += 1;
            blocks.reasons.insert(id, reason.into());
        });
        Pending { readiness: self.clone(), id }
    }

    /// For whoever acts when it changes.
    pub fn subscribe(&self) -> watch::Receiver<Blocks> {
        self.blocks.subscribe()
    }

    /// In the order in which they came up; empty: ready.
    pub fn reasons(&self) -> Vec<String> {
        self.blocks.borrow().reasons.values().cloned().collect()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.readiness.blocks.send_modify(|blocks| {
            blocks.reasons.remove(&self.id);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_guard_is_dropped() {
        let (readiness, starting) = Readiness::new();
        let ring = readiness.pending("no addresses yet");
        assert_eq!(readiness.reasons(), ["starting", "no addresses yet"]);
        drop(starting);
        assert_eq!(readiness.reasons(), ["no addresses yet"]);
        drop(ring);
        assert!(readiness.reasons().is_empty());
        let _again = readiness.clone().pending("bridge is down");
        assert_eq!(readiness.reasons(), ["bridge is down"]);
    }
}
