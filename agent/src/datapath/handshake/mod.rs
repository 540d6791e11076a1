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
mod resume;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use gate::Door;
pub use machine::Machine;
pub use peer::PATIENCE;
pub use resume::{Estate, forget};

use crate::{
    datapath::seal::Algorithm,
    types::{DataKey, DataSecret, Incarnation, PeerName},
};
use std::net::SocketAddr;
use zeroize::Zeroizing;

/// Who we are.
pub struct Config {
    pub name: PeerName,
    pub secret: DataSecret,
    /// The secret's other half.
    pub key: DataKey,
    pub incarnation: Incarnation,
    /// What this processor is fast at.
    pub algorithm: Algorithm,
    /// Lanes of all workers, counted from 0.
    pub lanes: u8,
    pub random: Random,
}

/// A peer as its record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: PeerName,
    pub key: DataKey,
    pub incarnation: Incarnation,
    pub endpoint: Option<SocketAddr>,
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

/// Why a handshake message was of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No message of any kind.
    Malformed,
    /// Its sender does not know our public key.
    WrongMac,
    /// Too many at a time.
    Busy,
    /// Made with other keys, or changed on its way.
    Unopened,
    /// The sender proved a key that is no peer's.
    UnknownPeer,
    /// Not newer than one that was taken.
    Replayed,
    /// Answers nothing that we wait for.
    Stray,
}

impl Refusal {
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::WrongMac,
        Self::Busy,
        Self::Unopened,
        Self::UnknownPeer,
        Self::Replayed,
        Self::Stray,
    ];

    /// Its name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "handshake_malformed",
            Self::WrongMac => "handshake_wrong_mac",
            Self::Busy => "handshake_busy",
            Self::Unopened => "handshake_unopened",
            Self::UnknownPeer => "handshake_unknown_peer",
            Self::Replayed => "handshake_replayed",
            Self::Stray => "handshake_stray",
        }
    }
}

/// Fills with random bytes that nobody can guess.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

fn draw<const N: usize>(random: &mut Random) -> Zeroizing<[u8; N]> {
    let mut bytes = Zeroizing::new([0; N]);
    random(&mut *bytes);
    bytes
}
