//! What is gossiped: items, and what a subject contributes to their channel.
//!
//! ```text
//!   ipam ──publish──▶ ┌ Replica ────────────────────────┐ ◀──Items── links
//!                     │ (channel, key) ▶ greatest item  │
//!   ipam ◀───news──── └──────────────────────────────────┘ ──dirty keys──▶ links
//! ```
//!
//! Everything gossiped is one map. For each (channel, key) the item with the greatest (rank, body, signature), compared
//! as bytes, wins everywhere, so merging is a join (Shapiro et al., 2011, §3.1) whatever a channel is about: also
//! channels that this version does not know are merged and passed on.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{identity::BadSeal, types::PeerName};
use siphasher::sip::SipHasher13;
use std::hash::Hasher;
use weft_proto::mesh as wire;

/// One gossiped fact, relayed verbatim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Item {
    pub channel: String,
    pub key: Vec<u8>,
    pub rank: Vec<u8>,
    pub body: Vec<u8>,
    pub signature: Vec<u8>,
}

/// What a subject contributes to gossip: a channel and the check of its items.
pub trait Gossiper: Send + Sync {
    /// The channel's name, at most [`MAX_CHANNEL`] bytes.
    fn channel(&self) -> &'static str;

    /// Whether an item of this channel may enter: it decodes, its key and rank agree with its body, and who signed it may
    /// say so. It depends on nothing but the item and what all agents of a network have in common, its CAs and its seeds,
    /// so that every agent decides alike. What has been verified may be remembered.
    ///
    /// # Errors
    /// Why not; the item is then dropped and counted by [`Rejected::reason`].
    fn check(&mut self, item: &Item) -> Result<(), Rejected>;

    /// Who shares the universe at the start is known now.
    fn seeds(&mut self, _seeds: &[PeerName]) {}

    /// Whether an item that passed [`check`](Self::check) only says that there is nothing any more. Of those a channel
    /// keeps a number, by rank: the last ones, if ranks grow with time.
    fn is_farewell(&self, _: &Item) -> bool {
        false
    }
}

/// Why an item did not enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Rejected {
    #[error("a field of the item is longer than its bound")]
    TooLong,
    #[error("the body does not decode")]
    Undecodable,
    #[error("key or rank do not agree with the body")]
    Disagrees,
    /// By the subject's own rules.
    #[error("{0}")]
    Invalid(&'static str),
    /// Nobody who may say so has signed it.
    #[error("{0}")]
    Forged(&'static str),
    #[error("the channel holds as many items as it may")]
    Full,
}

impl Rejected {
    /// The reason as a metric's label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::Undecodable => "undecodable",
            Self::Disagrees => "disagrees",
            Self::Invalid(_) => "invalid",
            Self::Forged(_) => "forged",
            Self::Full => "full",
        }
    }
}

impl From<BadSeal> for Rejected {
    fn from(bad: BadSeal) -> Self {
        Self::Forged(match bad {
            BadSeal::Unreadable => "its seal is missing or cannot be read",
            BadSeal::NotTrusted => "its seal is of no CA that this node believes",
            BadSeal::Forged => "its seal does not belong to it",
        })
    }
}

impl Item {
    /// Whether this item wins over another of the same channel and key.
    pub fn beats(&self, other: &Item) -> bool {
        (&self.rank, &self.body, &self.signature) > (&other.rank, &other.body, &other.signature)
    }

    /// # Errors
    /// [`Rejected::TooLong`] if a field exceeds its bound.
    pub fn check_bounds(&self) -> Result<(), Rejected> {
        let fits = self.channel.len() <= MAX_CHANNEL
            && self.key.len() <= MAX_KEY
            && self.rank.len() <= MAX_RANK
            && self.body.len() <= MAX_BODY
            && self.signature.len() <= MAX_SIGNATURE;
        fits.then_some(()).ok_or(Rejected::TooLong)
    }

    /// Bytes that the item takes in memory and on the wire, nearly.
    pub fn size(&self) -> usize {
        self.channel.len() + self.key.len() + self.rank.len() + self.body.len() + self.signature.len() + 16
    }

    /// Hash of the whole item but its channel; the same on every agent.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(0, 0);
        for field in [&self.key, &self.rank, &self.body, &self.signature] {
            hasher.write(&(field.len() as u64).to_be_bytes());
            hasher.write(field);
        }
        hasher.finish()
    }
}

/// Hash of a key or a name; the same on every agent.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(0, 0);
    hasher.write(bytes);
    hasher.finish()
}

impl From<wire::Item> for Item {
    fn from(item: wire::Item) -> Self {
        let wire::Item { channel, key, rank, body, signature } = item;
        Self { channel, key, rank, body, signature }
    }
}

impl From<Item> for wire::Item {
    fn from(item: Item) -> Self {
        let Item { channel, key, rank, body, signature } = item;
        Self { channel, key, rank, body, signature }
    }
}

/// Bytes of a channel's name.
pub const MAX_CHANNEL: usize = 32;
/// Bytes of a key: a peer's name has at most 253.
pub const MAX_KEY: usize = 256;
/// Bytes of a rank: two numbers, a flag and a peer's name have at most 270.
pub const MAX_RANK: usize = 512;
/// Bytes of a body.
pub const MAX_BODY: usize = 64 << 10;
/// Bytes of a signature: of a record about 600, of a token that many for each hand-over.
pub const MAX_SIGNATURE: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_of_greater_rank_beats_and_equal_ones_do_not() {
        let item = |rank: &[u8], body: &[u8]| Item {
            channel: "x".into(),
            rank: rank.into(),
            body: body.into(),
            ..Item::default()
        };
        assert!(item(&[2], b"a").beats(&item(&[1], b"b")));
        assert!(item(&[1], b"b").beats(&item(&[1], b"a")));
        assert!(!item(&[1], b"a").beats(&item(&[1], b"a")));
        assert!(!item(&[1], b"z").beats(&item(&[1, 0], b"a")));
    }

    #[test]
    fn fields_have_bounds() {
        let long = Item { key: vec![0; MAX_KEY + 1], ..Item::default() };
        assert_eq!(long.check_bounds(), Err(Rejected::TooLong));
        assert_eq!(Item { key: vec![0; MAX_KEY], ..Item::default() }.check_bounds(), Ok(()));
    }

    #[test]
    fn fields_do_not_run_into_each_other_in_the_hash() {
        let a = Item { key: b"ab".into(), rank: b"c".into(), ..Item::default() };
        let b = Item { key: b"a".into(), rank: b"bc".into(), ..Item::default() };
        assert_ne!(a.fingerprint(), b.fingerprint());
    }
}
