//! Which counters of one sending lane have come already: a bitmap that slides (RFC 6479).
//!
//! ```text
//!                    highest - 4032                    highest
//!   … too old ────────────┤ bits: 1 came, 0 may come ───┤ anything newer may come …
//!            blocks of 64 bits, a ring: what the highest counter enters is cleared first
//! ```
//!
//! A counter is checked before its packet is opened and committed after: a forged packet moves nothing.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// The window of one lane.
#[derive(Clone)]
pub struct Window {
    /// One more than the highest counter that came, so that a fresh window has none.
    next: u64,
    blocks: [u64; BLOCKS],
}

/// Why a counter is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// It came before.
    Replayed,
    /// So far behind that nobody knows whether it came.
    TooOld,
}

impl Window {
    pub fn new() -> Self {
        Self { next: 0, blocks: [0; BLOCKS] }
    }

    /// Goes on where another ended, which said `next`: what it had not seen below that is lost.
    pub fn resumed(next: u64) -> Self {
        let mut blocks = [u64::MAX; BLOCKS];
        let (block, bit) = place(next);
        blocks[block] = bit - 1;
        Self { next, blocks }
    }

    /// One more than the highest counter that came.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether a packet of that counter would be news.
    pub fn check(&self, counter: u64) -> Result<(), Stale> {
        if counter >= self.next {
            return Ok(());
        }
        if self.next - counter > WIDTH {
            return Err(Stale::TooOld);
        }
        let (block, bit) = place(counter);
        if self.blocks[block] & bit != 0 { Err(Stale::Replayed) } else { Ok(()) }
    }

    /// Notes that a packet of that counter came and was opened.
    pub fn commit(&mut self, counter: u64) -> Result<(), Stale> {
        self.check(counter)?;
        if counter >= self.next {
            // The highest counter's own block is in use; what lies beyond it, up to the new one's, is entered anew.
            let (entered, left) = (counter / 64 + 1, self.next.div_ceil(64));
            for block in left.max(entered.saturating_sub(BLOCKS as u64))..entered {
                self.blocks[block as usize % BLOCKS] = 0;
            }
            self.next = counter + 1;
        }
        let (block, bit) = place(counter);
        self.blocks[block] |= bit;
        Ok(())
    }

    /// Whether no higher counter has come.
    pub fn is_highest(&self, counter: u64) -> bool {
        counter + 1 == self.next
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

fn place(counter: u64) -> (usize, u64) {
    ((counter / 64) as usize % BLOCKS, 1 << (counter % 64))
}

const BLOCKS: usize = 64;
/// So many counters behind the next one are told apart: all blocks but the one that is being entered.
pub const WIDTH: u64 = 64 * (BLOCKS as u64 - 1);
const _: () = assert!(WIDTH >= 2048 && BLOCKS.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_counter_is_taken_once() {
        let mut window = Window::new();
        for counter in [0, 1, 5, 3, 70, 64, 4000] {
            assert_eq!(window.commit(counter), Ok(()));
            assert_eq!(window.commit(counter), Err(Stale::Replayed));
            assert_eq!(window.check(counter), Err(Stale::Replayed));
        }
        assert_eq!(window.commit(2), Ok(()), "late, but new");
    }

    #[test]
    fn what_is_too_far_behind_is_refused() {
        let mut window = Window::new();
        let highest = 1_000_000;
        window.commit(highest).unwrap();
        assert_eq!(window.check(highest + 1 - WIDTH), Ok(()));
        assert_eq!(window.check(highest - WIDTH), Err(Stale::TooOld));
        assert_eq!(window.check(0), Err(Stale::TooOld));
    }

    #[test]
    fn a_resumed_window_takes_only_what_is_newer_than_all_before() {
        for next in [0, 1, 63, 64, 65, 10_000] {
            let mut window = Window::resumed(next);
            for before in [next.checked_sub(1), next.checked_sub(WIDTH)].into_iter().flatten() {
                assert_eq!(window.check(before), Err(Stale::Replayed), "{before} of {next}");
            }
            for new in [next, next + 2, next + 1, next + 500, next + 2 * WIDTH, next + WIDTH + 1] {
                assert_eq!(window.commit(new), Ok(()), "{new} of {next}");
                assert_eq!(window.commit(new), Err(Stale::Replayed), "{new} of {next}");
            }
        }
    }

    #[test]
    fn a_check_moves_nothing() {
        let window = Window::new();
        window.check(1 << 50).unwrap();
        assert_eq!(window.check(0), Ok(()));
    }

    /// Remembers everything.
    #[derive(Default)]
    struct Naive(BTreeSet<u64>);

    impl Naive {
        fn commit(&mut self, counter: u64) -> Result<(), Stale> {
            let next = self.0.last().map_or(0, |last| last + 1);
            match () {
                () if counter + WIDTH < next => Err(Stale::TooOld),
                () if self.0.insert(counter) => Ok(()),
                () => Err(Stale::Replayed),
            }
        }
    }

    fn steps() -> impl Strategy<Value = Vec<i64>> {
        let near = -200i64..200;
        let about_the_edge = -(WIDTH as i64) - 100..-(WIDTH as i64) + 100;
        let jump = 0i64..3 * WIDTH as i64;
        prop::collection::vec(prop_oneof![8 => near, 2 => about_the_edge, 1 => jump], 1..400)
    }

    proptest! {
        #[test]
        fn the_bitmap_agrees_with_a_set_that_remembers_everything(start in 0u64..20_000, steps in steps()) {
            let (mut window, mut naive) = (Window::new(), Naive::default());
            let mut highest = start;
            for step in steps {
                let counter = highest.saturating_add_signed(step);
                highest = highest.max(counter);
                let checked = window.check(counter);
                let committed = window.commit(counter);
                prop_assert_eq!(checked, committed);
                prop_assert_eq!(committed, naive.commit(counter));
            }
        }
    }
}
