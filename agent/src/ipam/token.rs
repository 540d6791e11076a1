//! A token: who owns the addresses from `start` to `end`, and how it travels as a gossiped item.
//!
//! ```text
//!   Item  key = start   rank = epoch | hands | version | free | owner   body = Token   signature = Deed (mesh.proto)
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    deed::{Registrar, Takeovers},
    ring::Ring,
    span::{Layout, Span},
};
use crate::{
    identity::Checker,
    mesh::gossip::{Gossiper, Item, Rejected},
    types::PeerName,
};
use prost::Message;
use std::cmp::Ordering;
use weft_proto::mesh;

/// One entry of the ring. Its range is [start, end], as far as no greater token reaches over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub start: u128,
    /// The last offset that was handed over with this token; it only ever shrinks.
    pub end: u128,
    pub owner: PeerName,
    /// Raised when a dead peer's space is taken over.
    pub epoch: u64,
    /// How often the range has been handed over.
    pub hands: u64,
    /// Raised by the owner with each change; 0 as it was handed over.
    pub version: u64,
    /// The owner has whole blocks here to give away.
    pub free: bool,
    /// The deed, as it travels.
    pub signature: Vec<u8>,
}

impl Token {
    pub fn span(&self) -> Span {
        Span { first: self.start, last: self.end }
    }

    /// It is no seed's share as at the start, and nobody has sealed it.
    pub fn lacks_deed(&self) -> bool {
        self.signature.is_empty() && (self.hands, self.version) != (0, 0)
    }

    /// Which of two tokens with one start wins: the same order as that of their items' (rank, body, signature).
    pub fn cmp_rank(&self, other: &Token) -> Ordering {
        let rank = |t: &Token| (t.epoch, t.hands, t.version, t.free);
        rank(self)
            .cmp(&rank(other))
            .then_with(|| self.owner.cmp(&other.owner))
            .then_with(|| self.end.cmp(&other.end))
            .then_with(|| self.signature.cmp(&other.signature))
    }

    pub fn to_item(&self, layout: &Layout) -> Item {
        Item {
            channel: CHANNEL.into(),
            key: layout.to_bytes(self.start),
            rank: self.rank_bytes(),
            body: self.to_body(layout),
            signature: self.signature.clone(),
        }
    }

    pub fn to_body(&self, layout: &Layout) -> Vec<u8> {
        mesh::Token {
            start: layout.to_bytes(self.start),
            end: layout.to_bytes(self.end),
            owner: self.owner.to_string(),
            epoch: self.epoch,
            version: self.version,
            free: self.free,
            hands: self.hands,
        }
        .encode_to_vec()
    }

    /// Reads and checks a token of `layout`'s universe.
    pub fn from_body(body: &[u8], layout: &Layout) -> Result<Self, Rejected> {
        let token = mesh::Token::decode(body).map_err(|_| Rejected::Invalid("token does not decode"))?;
        let offset = |bytes: &[u8]| {
            layout.from_bytes(bytes).ok_or(Rejected::Invalid("token lies outside the universe"))
        };
        let (start, end) = (offset(&token.start)?, offset(&token.end)?);
        if start > end || !start.is_multiple_of(layout.unit()) || !(end + 1).is_multiple_of(layout.unit()) {
            return Err(Rejected::Invalid("token does not cover whole blocks"));
        }
        if [token.epoch, token.hands, token.version].iter().any(|count| *count > MAX_COUNTER) {
            return Err(Rejected::Invalid("token's epoch, hands or version is beyond reach"));
        }
        let owner: PeerName =
            token.owner.parse().map_err(|_| Rejected::Invalid("token's owner is not a name"))?;
        if owner.as_str() != token.owner {
            return Err(Rejected::Invalid("token's owner is not in lower case"));
        }
        let mesh::Token { epoch, hands, version, free, .. } = token;
        Ok(Self { start, end, owner, epoch, hands, version, free, signature: Vec::new() })
    }

    pub fn from_item(item: &Item, layout: &Layout) -> Result<Self, Rejected> {
        let token = Self::from_body(&item.body, layout)?;
        // The deed's seals are over the token, not over the bytes that came: more bytes would win over fewer.
        if item.body != token.to_body(layout) {
            return Err(Rejected::Invalid("token's body is not as its owner writes it"));
        }
        if item.key != layout.to_bytes(token.start) {
            return Err(Rejected::Invalid("token's key is not its start"));
        }
        if item.rank != token.rank_bytes() {
            return Err(Rejected::Invalid("token's rank is not its own"));
        }
        Ok(Self { signature: item.signature.clone(), ..token })
    }

    fn rank_bytes(&self) -> Vec<u8> {
        let mut rank = Vec::with_capacity(25 + self.owner.as_str().len());
        rank.extend(self.epoch.to_be_bytes());
        rank.extend(self.hands.to_be_bytes());
        rank.extend(self.version.to_be_bytes());
        rank.push(self.free.into());
        rank.extend(self.owner.as_str().as_bytes());
        rank
    }
}

/// Lets the mesh refuse what is not a token of this universe, and with a checker what is not its owner's by its deed.
pub struct RingGossiper {
    layout: Layout,
    registrar: Option<Registrar>,
}

impl RingGossiper {
    pub fn new(layout: Layout, checker: Option<(Checker, Takeovers)>) -> Self {
        Self {
            layout,
            registrar: checker.map(|(checker, takeovers)| Registrar::new(layout, checker, takeovers)),
        }
    }
}

impl Gossiper for RingGossiper {
    fn channel(&self) -> &'static str {
        CHANNEL
    }

    fn check(&mut self, item: &Item) -> Result<(), Rejected> {
        let token = Token::from_item(item, &self.layout)?;
        self.registrar.as_mut().map_or(Ok(()), |registrar| registrar.check(&token))
    }

    fn seeds(&mut self, seeds: &[PeerName]) {
        // A list that is too long makes no ring: then nobody can have a token.
        if let (Some(registrar), Ok(shares)) = (&mut self.registrar, Ring::genesis(self.layout, seeds)) {
            registrar.set_shares(shares);
        }
    }
}

/// The ring's channel, for items and unicasts.
pub const CHANNEL: &str = "ring";

/// Counters beyond this are forged: they would leave the owner nothing to outbid them with.
const MAX_COUNTER: u64 = u64::MAX / 2;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn layout() -> Layout {
        Layout::new("10.32.0.0/16".parse().unwrap())
    }

    fn tokens() -> impl Strategy<Value = Token> {
        let counts = (0..3u64, 0..3u64, 0..3u64);
        (0u128..256, 0u128..256, counts, any::<bool>(), "[a-c]{1,2}", vec(any::<u8>(), 0..2)).prop_map(
            |(a, b, (epoch, hands, version), free, owner, signature)| Token {
                start: a.min(b) * 256,
                end: a.max(b) * 256 + 255,
                owner: owner.parse().unwrap(),
                epoch,
                hands,
                version,
                free,
                signature,
            },
        )
    }

    proptest! {
        #[test]
        fn a_token_reads_back(token in tokens()) {
            let item = token.to_item(&layout());
            prop_assert!(RingGossiper::new(layout(), None).check(&item).is_ok());
            prop_assert_eq!(Token::from_item(&item, &layout()).ok(), Some(token));
        }

        #[test]
        fn tokens_and_their_items_are_ordered_alike(a in tokens(), b in tokens()) {
            let b = Token { start: a.start, end: b.end.max(a.start + 255), ..b };
            let (x, y) = (a.to_item(&layout()), b.to_item(&layout()));
            let items = (&x.rank, &x.body, &x.signature).cmp(&(&y.rank, &y.body, &y.signature));
            prop_assert_eq!(a.cmp_rank(&b), items);
        }

        #[test]
        fn any_bytes_are_read_or_refused(body in vec(any::<u8>(), 0..64)) {
            let _ = Token::from_body(&body, &layout());
        }
    }

    #[test]
    fn what_is_not_a_token_of_this_universe_is_refused() {
        let good = Token {
            start: 256,
            end: 511,
            owner: "a".parse().unwrap(),
            epoch: 0,
            hands: 0,
            version: 1,
            free: true,
            signature: Vec::new(),
        };
        let check = |item: Item| RingGossiper::new(layout(), None).check(&item).unwrap_err().to_string();
        let item = good.to_item(&layout());
        assert_eq!(check(Item { key: vec![10, 32, 0, 0], ..item.clone() }), "token's key is not its start");
        assert_eq!(check(Item { rank: vec![0; 17], ..item.clone() }), "token's rank is not its own");
        // A field that is not known: number 15, of one byte.
        let longer = Item { body: [&item.body[..], &[0x7a, 1, 0]].concat(), ..item.clone() };
        assert_eq!(check(longer), "token's body is not as its owner writes it");
        assert_eq!(check(Item { body: vec![255; 9], ..item }), "token does not decode");
        let misaligned = Token { start: 257, ..good.clone() };
        assert_eq!(check(misaligned.to_item(&layout())), "token does not cover whole blocks");
        let forged = Token { version: u64::MAX, ..good.clone() };
        assert_eq!(check(forged.to_item(&layout())), "token's epoch, hands or version is beyond reach");
        let elsewhere = Layout::new("10.48.0.0/16".parse().unwrap());
        assert_eq!(check(good.to_item(&elsewhere)), "token lies outside the universe");
    }
}
