//! Whether a worker looks for more after work, or sleeps at once.
//!
//! Looking saves the wake-up, which costs more time than a small packet's whole way. Bulk gains nothing by it: what
//! piles up meanwhile makes larger batches, and the time is other threads'.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{ops::AddAssign, time::Duration};

/// What a batch moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) datagrams: usize,
    pub(super) bytes: usize,
}

pub(super) struct Pace {
    linger: Duration,
    recent: Load,
}

impl Pace {
    /// Looks for more for `linger` at most.
    pub(super) fn new(linger: Duration) -> Self {
        Self { linger, recent: Load::default() }
    }

    pub(super) fn worked(&mut self, load: Load) {
        self.recent += load;
        while self.recent.datagrams > MEMORY {
            self.recent = Load { datagrams: self.recent.datagrams / 2, bytes: self.recent.bytes / 2 };
        }
    }

    /// How long to look for more.
    pub(super) fn linger(&self) -> Duration {
        let bulk = self.recent.bytes > self.recent.datagrams * LARGE;
        if bulk { Duration::ZERO } else { self.linger }
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.datagrams += other.datagrams;
        self.bytes += other.bytes;
    }
}

/// Datagrams that are remembered; the older ones count ever less.
const MEMORY: usize = 256;
/// Bytes of a datagram above which, on the average, it is bulk.
const LARGE: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_micros(100);

    fn after(loads: impl IntoIterator<Item = (usize, usize)>) -> Duration {
        let mut pace = Pace::new(LINGER);
        loads.into_iter().for_each(|(datagrams, bytes)| pace.worked(Load { datagrams, bytes }));
        pace.linger()
    }

    #[test]
    fn looks_for_more_small_packets_and_not_for_more_bulk() {
        assert_eq!(after([]), LINGER);
        assert_eq!(after([(64, 64 * 100)]), LINGER, "a flood");
        assert_eq!(after([(47, 65_536)]), Duration::ZERO);
        assert_eq!(after([(47, 65_536), (1, 60), (1, 60)]), Duration::ZERO, "acknowledgements between");
    }

    #[test]
    fn bulk_is_forgotten_after_some_hundred_small_packets() {
        let bulk = std::iter::repeat_n((1000, 1_440_000), 1000);
        assert_eq!(after(bulk.chain(std::iter::repeat_n((1, 60), 400))), LINGER);
    }
}
