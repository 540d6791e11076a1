//! Deaths: what an operator says of nodes that will not come back, and who gets their ranges.
//!
//! ```text
//!   weft forget x ──sealed by an operator──▶ Death {x, incarnation, epoch, taker, ranges, known} ──gossip──▶ everybody
//!     everybody: who owns nothing of the ranges promises for good never to use any of it below the epoch
//!     taker:     once all have promised, takes over what is x's of the ranges, and has it with that epoch
//!     x:         if it lives after all, gives what it has to the taker, and asks for space like a joiner
//! ```
//! Promises are on disk before they are told (a digest in the peer record). Why no address gets two owners is in
//! `allocator/forget.rs`.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::deed::Takeover;
use crate::{
    identity::{BadSeal, Checker, OPERATOR},
    mesh::gossip::{Gossiper, Item, Rejected},
    types::{Incarnation, PeerName, Prefix},
};
use prost::Message;
use siphasher::sip::SipHasher13;
use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    sync::Arc,
};
use weft_proto::mesh;

/// A peer is dead, and somebody is to have its ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    pub peer: PeerName,
    /// The last one that is dead.
    pub incarnation: Incarnation,
    pub epoch: u64,
    pub taker: PeerName,
    /// The taker waits for nobody's promise.
    pub forced: bool,
    /// What the taker is to have: the peer's as far as the taker knew then.
    pub ranges: Vec<Prefix>,
    /// The [`digest`] of all deaths that the taker knew before.
    pub known: u64,
}

/// What has been heard of deaths: of each peer as often as it has been forgotten.
#[derive(Debug, Default)]
pub struct Deaths {
    notices: BTreeMap<(PeerName, u64), Notice>,
    all: Arc<Vec<Death>>,
}

#[derive(Clone, Debug)]
pub struct Notice {
    pub death: Death,
    pub item: Item,
    /// This node has promised.
    pub agreed: bool,
}

impl Death {
    pub fn to_body(&self) -> Vec<u8> {
        let Self { peer, incarnation, epoch, taker, forced, ranges, known } = self;
        let (peer, incarnation, taker) = (peer.to_string(), incarnation.0, taker.to_string());
        let ranges = ranges.iter().map(Prefix::to_string).collect();
        let (epoch, forced, known) = (*epoch, *forced, *known);
        mesh::Death { peer, incarnation, epoch, taker, forced, ranges, known }.encode_to_vec()
    }

    /// # Errors
    /// The bytes are not as such a statement is written.
    pub fn from_body(body: &[u8]) -> Result<Self, Rejected> {
        let mesh::Death { peer, incarnation, epoch, taker, forced, ranges, known } =
            mesh::Death::decode(body).map_err(|_| Rejected::Undecodable)?;
        let name = |text: &str| text.parse().map_err(|_| Rejected::Undecodable);
        let (peer, incarnation, taker) = (name(&peer)?, Incarnation(incarnation), name(&taker)?);
        let ranges = ranges.iter().map(|range| range.parse().map_err(|_| Rejected::Undecodable));
        let ranges = ranges.collect::<Result<_, _>>()?;
        let death = Self { peer, incarnation, epoch, taker, forced, ranges, known };
        let is_sound = death.to_body() == body && death.peer != death.taker && death.epoch > 0;
        let within = incarnation <= Incarnation::MAX && epoch <= MAX_EPOCH;
        (is_sound && within).then_some(death).ok_or(Rejected::Invalid("the death is none that can be"))
    }

    /// With the operator's seal, where there are keys.
    pub fn to_item(&self, seal: Vec<u8>) -> Item {
        Item {
            channel: CHANNEL.into(),
            key: [self.peer.as_str().as_bytes(), &[0], &self.epoch.to_be_bytes()].concat(),
            rank: self.taker.as_str().into(),
            body: self.to_body(),
            signature: seal,
        }
    }

    /// # Errors
    /// The body does not decode, or key and rank do not agree with it.
    pub fn from_item(item: &Item) -> Result<Self, Rejected> {
        let death = Self::from_body(&item.body)?;
        let agrees = death.to_item(item.signature.clone()) == *item;
        agrees.then_some(death).ok_or(Rejected::Disagrees)
    }

    /// What it makes others believe.
    pub fn takeover(&self) -> Takeover {
        Takeover { from: self.peer.clone(), epoch: self.epoch, to: self.taker.clone() }
    }
}

impl Deaths {
    /// Takes one in; false where it, or one that beats it, is known. Of two takers with one epoch the greater counts: none
    /// of them has had all promises.
    pub fn hear(&mut self, item: Item, agreed: bool) -> bool {
        let Ok(death) = Death::from_item(&item) else { return false };
        let key = (death.peer.clone(), death.epoch);
        if self.notices.get(&key).is_some_and(|known| !item.beats(&known.item)) {
            return false;
        }
        self.notices.insert(key, Notice { death, item, agreed });
        self.all = Arc::new(self.notices.values().map(|notice| notice.death.clone()).collect());
        true
    }

    pub fn is_empty(&self) -> bool {
        self.notices.is_empty()
    }

    /// All, in the order of peers and epochs.
    pub fn notices(&self) -> impl Iterator<Item = &Notice> {
        self.notices.values()
    }

    /// Those that were said last: those before are not pursued any more, but promises last.
    pub fn last(&self) -> impl Iterator<Item = &Notice> {
        let last = self.notices().map(|notice| notice.death.epoch).max();
        self.notices().filter(move |notice| Some(notice.death.epoch) == last)
    }

    /// Whether nothing else has become known since a death was said, but what was said with it.
    pub fn is_news(&self, death: &Death) -> bool {
        let said_with = |other: &&Death| other.epoch == death.epoch && other.taker == death.taker;
        digest(self.all.iter().filter(|other| !said_with(other))) == death.known
    }

    /// This node has promised.
    pub fn agree(&mut self, death: &Death) -> Option<Item> {
        let notice = self.notices.get_mut(&(death.peer.clone(), death.epoch))?;
        notice.agreed = true;
        Some(notice.item.clone())
    }

    /// Whether that incarnation of a peer is dead.
    pub fn covers(&self, peer: &PeerName, incarnation: Incarnation) -> bool {
        self.of_peer(peer).any(|death| incarnation <= death.incarnation)
    }

    /// The last of a peer.
    pub fn of(&self, peer: &PeerName) -> Option<&Death> {
        self.of_peer(peer).last()
    }

    pub fn all(&self) -> &Arc<Vec<Death>> {
        &self.all
    }

    fn of_peer(&self, peer: &PeerName) -> impl Iterator<Item = &Death> {
        let all = (peer.clone(), 0)..=(peer.clone(), u64::MAX);
        self.notices.range(all).map(|(_, notice)| &notice.death)
    }
}

/// Lets the mesh refuse what no operator has said; without a checker anybody is one.
#[derive(Debug)]
pub struct DeathGossip(pub Option<Checker>);

impl Gossiper for DeathGossip {
    fn channel(&self) -> &'static str {
        CHANNEL
    }

    fn check(&mut self, item: &Item) -> Result<(), Rejected> {
        Death::from_item(item)?;
        let Some(checker) = &mut self.0 else { return Ok(()) };
        let seal = mesh::Seal::decode(item.signature.as_slice()).map_err(|_| BadSeal::Unreadable)?;
        if seal.encoded_len() != item.signature.len() {
            return Err(BadSeal::Unreadable.into());
        }
        let signer = checker.signer(SEALED, &item.body, &seal)?;
        let is_operator = signer.names.iter().any(|name| name.as_str() == OPERATOR);
        is_operator.then_some(()).ok_or(Rejected::Forged("its seal is no operator's"))
    }
}

/// Some deaths in one number, in whatever order.
pub fn digest<'a>(deaths: impl IntoIterator<Item = &'a Death>) -> u64 {
    let one = |death: &Death| {
        let mut hash = SipHasher13::new();
        death.to_body().hash(&mut hash);
        hash.finish()
    };
    deaths.into_iter().fold(0, |digest, death| digest ^ one(death))
}

/// The channel of deaths.
pub const CHANNEL: &str = "deaths";
/// What a death is to who seals it.
pub const SEALED: &str = "death";
/// Epochs beyond are forged: they would leave nobody anything to outbid them with.
const MAX_EPOCH: u64 = u64::MAX / 4;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::{
        identity::{Ca, Identity, Sealer, Trust, task::State},
        mesh::gossip::MAX_RANK,
    };
    use proptest::{collection::vec, prelude::*};
    use std::time::{Duration, SystemTime};

    fn death(peer: &str, epoch: u64, taker: &str) -> Death {
        let (peer, taker) = (peer.parse().unwrap(), taker.parse().unwrap());
        let ranges = vec!["10.32.0.0/18".parse().unwrap()];
        Death { peer, incarnation: Incarnation(7), epoch, taker, forced: false, ranges, known: 9 }
    }

    #[test]
    fn a_death_reads_back_and_of_two_takers_the_greater_counts() {
        let item = death("x", 3, "a").to_item(Vec::new());
        assert_eq!(Death::from_item(&item), Ok(death("x", 3, "a")));
        assert!(item.rank.len() <= MAX_RANK);
        let mut deaths = Deaths::default();
        assert!(deaths.hear(item.clone(), false) && !deaths.hear(item.clone(), false));
        assert!(deaths.hear(death("x", 2, "z").to_item(Vec::new()), false));
        assert!(deaths.hear(death("x", 3, "b").to_item(Vec::new()), false));
        assert_eq!(deaths.all().as_slice(), [death("x", 2, "z"), death("x", 3, "b")]);
        let x = "x".parse().unwrap();
        assert_eq!(deaths.of(&x), Some(&death("x", 3, "b")));
        assert_eq!(deaths.last().map(|notice| &notice.death).collect::<Vec<_>>(), [&death("x", 3, "b")]);
        assert!(deaths.covers(&x, Incarnation(7)) && !deaths.covers(&x, Incarnation(8)));
        deaths.agree(&death("x", 3, "b"));
        assert_eq!(deaths.notices().map(|notice| notice.agreed).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn a_death_is_news_until_another_becomes_known() {
        let mut deaths = Deaths::default();
        let hear =
            |deaths: &mut Deaths, death: &Death| assert!(deaths.hear(death.to_item(Vec::new()), false));
        hear(&mut deaths, &death("x", 1, "a"));
        let known = digest(deaths.all().iter());
        let both = ["y", "z"].map(|peer| Death { known, ..death(peer, 2, "a") });
        both.iter().for_each(|death| hear(&mut deaths, death));
        assert!(both.iter().all(|death| deaths.is_news(death)));
        hear(&mut deaths, &death("x", 2, "b"));
        assert!(!both.iter().any(|death| deaths.is_news(death)));
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let refused = |death: Death| DeathGossip(None).check(&death.to_item(Vec::new())).is_err();
        assert!(!refused(death("x", 1, "a")));
        assert!(refused(death("x", 1, "x")) && refused(death("x", 0, "a")));
        assert!(refused(death("x", u64::MAX, "a")));
        let of = |incarnation: u64| Death { incarnation: Incarnation(incarnation), ..death("x", 1, "a") };
        assert!(!refused(of(Incarnation::MAX.0)), "whoever a record can tell of can be forgotten");
        assert!(refused(of(Incarnation::MAX.0 + 1)));
        let item = death("x", 1, "a").to_item(Vec::new());
        let check = |item: Item| DeathGossip(None).check(&item).unwrap_err();
        assert_eq!(check(Item { key: b"y".into(), ..item.clone() }), Rejected::Disagrees);
        assert_eq!(check(Item { rank: vec![9], ..item }), Rejected::Disagrees);
    }

    #[test]
    fn only_an_operator_declares_somebody_dead() {
        let now = SystemTime::now();
        let ca = Ca::create(now).unwrap();
        let current = |name: &str| {
            let issuer = Ca::load(ca.cert.as_bytes(), ca.key.as_bytes()).unwrap();
            let name: PeerName = name.parse().unwrap();
            let leaf = issuer.issue(&name, Duration::from_secs(60), now).unwrap();
            let trust = Trust::from_pem(ca.cert.as_bytes(), None).unwrap();
            let identity =
                Identity::new(name, trust, leaf.cert.as_bytes(), leaf.key.as_bytes(), now).unwrap();
            tokio::sync::watch::channel(State { identity: Arc::new(identity), trouble: None }).1
        };
        let mut gossip = DeathGossip(Some(Checker::new(current("judge"))));
        let death = death("x", 1, "a");
        let mut said_by = |name: &str, kind: &str| {
            let seal = Sealer::new(current(name)).seal(kind, &death.to_body());
            gossip.check(&death.to_item(seal.encode_to_vec())).map_err(|error| error.to_string())
        };
        assert_eq!(said_by(OPERATOR, SEALED), Ok(()));
        assert_eq!(said_by("a", SEALED).unwrap_err(), "its seal is no operator's");
        assert_eq!(said_by(OPERATOR, "token").unwrap_err(), "its seal does not belong to it");
        assert!(gossip.check(&death.to_item(Vec::new())).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body in vec(any::<u8>(), 0..64)) {
            let _ = Death::from_body(&body);
        }
    }
}
