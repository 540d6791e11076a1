//! Waiting for a condition, with a deadline.
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;

/// A point in time by which something must have happened.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    pub fn after(within: Duration) -> Self {
        Self(Instant::now() + within)
    }

    pub fn passed(&self) -> bool {
        Instant::now() >= self.0
    }

    /// What is left, and at least a millisecond, because sockets take zero for "for ever".
    ///
    /// # Errors
    /// When nothing is left.
    pub fn left(&self) -> anyhow::Result<Duration> {
        anyhow::ensure!(!self.passed(), "the time is up");
        Ok(self.0.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
    }
}

/// Tries until it works or the time is up.
///
/// # Errors
/// `what` was not reached in time, with the last attempt's error as the cause.
pub fn until<T>(
    what: &str,
    within: Duration,
    mut attempt: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Deadline::after(within);
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if deadline.passed() => {
                return Err(error).with_context(|| format!("{what}: not within {within:?}"));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// A clock that stands still where the machine does, be it suspended or starved: what could not run then is not late.
pub struct Awake(Arc<AtomicU64>);

impl Awake {
    pub fn start() -> Self {
        let micros = Arc::new(AtomicU64::new(0));
        let clock = Arc::downgrade(&micros);
        thread::spawn(move || {
            let mut last = Instant::now();
            while let Some(micros) = clock.upgrade() {
                thread::sleep(PAUSE);
                let passed = last.elapsed().min(4 * PAUSE);
                micros.fetch_add(passed.as_micros() as u64, Ordering::Relaxed);
                last = Instant::now();
            }
        });
        Self(micros)
    }

    pub fn now(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }

    /// As [`until`], by this clock; returns how long it took.
    ///
    /// # Errors
    /// As there.
    pub fn until(
        &self,
        what: &str,
        within: Duration,
        attempt: impl Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let start = self.now();
        loop {
            let (outcome, took) = (attempt(), self.now().saturating_sub(start));
            match outcome {
                Ok(()) => return Ok(took),
                Err(error) if took > within => {
                    return Err(error).with_context(|| format!("{what}: not within {within:?}"));
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

/// Between two attempts: short beside everything that the lab waits for.
const PAUSE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_success_or_with_the_last_error() {
        let mut left = 3;
        let done = until("countdown", Duration::from_secs(5), || {
            left -= 1;
            anyhow::ensure!(left == 0, "{left} left");
            Ok("liftoff")
        });
        assert_eq!(done.unwrap(), "liftoff");
        let error = until::<()>("pig", Duration::from_millis(20), || anyhow::bail!("no wings")).unwrap_err();
        assert_eq!(format!("{error:#}"), "pig: not within 20ms: no wings");
    }
}
