//! Life by ticking: each loop that must go round touches its heartbeat.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// The loops that must go round for the agent to be alive. Clones are the same list.
#[derive(Clone, Debug)]
pub struct Heartbeats {
    /// What ticks are counted from.
    start: Instant,
    beats: Arc<watch::Sender<Vec<Arc<Beat>>>>,
}

/// One loop's pulse. Dropped without [`Heartbeat::finish`] (its loop panicked or returned) it counts as stalled.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    beat: Arc<Beat>,
}

/// A loop that does not go round any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    pub name: String,
    /// Since its last tick; none: it has ended.
    pub silent: Option<Duration>,
}

#[derive(Debug)]
struct Beat {
    name: String,
    /// Milliseconds from the start to the last tick, or one of the two constants below.
    last: AtomicU64,
}

impl Heartbeats {
    pub fn new(now: Instant) -> Self {
        Self { start: now, beats: Arc::new(watch::Sender::default()) }
    }

    /// A loop is to tick from now on, at least every [`STALLED_AFTER`] / 2 also when it has nothing to do.
    pub fn register(&self, name: impl Into<String>, now: Instant) -> Heartbeat {
        let beat = Arc::new(Beat { name: name.into(), last: AtomicU64::new(0) });
        let heartbeat = Heartbeat { start: self.start, beat: beat.clone() };
        heartbeat.tick(now);
        self.beats.send_modify(|beats| beats.push(beat));
        heartbeat
    }

    /// Loops that have ended or not ticked for [`STALLED_AFTER`]; empty: alive.
    pub fn stalled(&self, now: Instant) -> Vec<Stall> {
        let beats = self.beats.borrow();
        let stalls = beats.iter().filter_map(|beat| {
            let silent = match beat.last.load(Ordering::Relaxed) {
                FINISHED => return None,
                DROPPED => None,
                last => {
                    let since_start = now.saturating_duration_since(self.start);
                    Some(since_start.saturating_sub(Duration::from_millis(last)))
                        .filter(|silent| *silent >= STALLED_AFTER)
                        .map(Some)?
                }
            };
            Some(Stall { name: beat.name.clone(), silent })
        });
        stalls.collect()
    }
}

impl Heartbeat {
    pub fn tick(&self, now: Instant) {
        let last = now.saturating_duration_since(self.start).as_millis();
        self.beat.last.store(u64::try_from(last).unwrap_or(DROPPED - 1), Ordering::Relaxed);
    }

    /// The loop ends as it should.
    pub fn finish(self) {
        self.beat.last.store(FINISHED, Ordering::Relaxed);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        if self.beat.last.load(Ordering::Relaxed) != FINISHED {
            self.beat.last.store(DROPPED, Ordering::Relaxed);
        }
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.silent {
            Some(silent) => write!(f, "{} has not ticked for {} s", self.name, silent.as_secs()),
            None => write!(f, "{} has ended", self.name),
        }
    }
}

/// A loop that is silent for so long is stuck: many times what the slowest of them needs.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);

const FINISHED: u64 = u64::MAX;
const DROPPED: u64 = u64::MAX - 1;

#[cfg(test)]
mod tests {
    // Where virtual time begins.
    #![allow(clippy::disallowed_methods)]
    use super::*;

    #[test]
    fn a_loop_that_does_not_tick_is_named() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let beats = Heartbeats::new(start);
        let (mesh, links) = (beats.register("mesh", at(0)), beats.register("links", at(0)));
        assert_eq!(beats.stalled(at(9)), []);
        mesh.tick(at(9));
        let stalled = beats.stalled(at(12));
        assert_eq!(stalled, [Stall { name: "links".into(), silent: Some(Duration::from_secs(12)) }]);
        assert_eq!(stalled[0].to_string(), "links has not ticked for 12 s");
        links.tick(at(12));
        assert_eq!(beats.stalled(at(18)), []);
    }

    #[test]
    fn a_loop_that_ended_is_stalled_unless_it_said_so() {
        let now = Instant::now();
        let beats = Heartbeats::new(now);
        beats.register("mesh", now).finish();
        drop(beats.register("data-0", now));
        let names: Vec<_> = beats.stalled(now).iter().map(Stall::to_string).collect();
        assert_eq!(names, ["data-0 has ended"]);
    }
}
