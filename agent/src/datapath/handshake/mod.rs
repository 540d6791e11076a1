//! Agreeing on keys: Noise IK over UDP, on first use and again before keys grow old.
//!
//! ```text
//!   workers ── wanted, unknown index, confirmed, datagrams ──▶ Machine ──▶ datagrams
//!   records ── peers ───────────────────────────────────────▶    │  └────▶ Sessions, for the workers
//!                        gate: may it make us work?  noise: keys  └ peer: one peer's sessions and timers
//! ```
//!
//! All of it is pure; [`super::session_task`] has the sockets and the clock.

mod gate;
mod machine;
pub mod message;
mod noise;
mod peer;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use machine::{Config, Datagram, Machine, Peer, Refusal};
pub use peer::PATIENCE;

use zeroize::Zeroizing;

/// Fills with random bytes that nobody can guess.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

fn draw<const N: usize>(random: &mut Random) -> Zeroizing<[u8; N]> {
    let mut bytes = Zeroizing::new([0; N]);
    random(&mut *bytes);
    bytes
}
