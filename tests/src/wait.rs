//! Waiting for a condition, with a deadline.
use std::{
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
