//! Deaths: what an operator says of nodes that will not come back, and who gets their ranges.
//!
//! ```text
//!   weft forget x ──sealed by an operator──▶ Death {x, incarnation, epoch, taker} ──gossip──▶ everybody
//!     everybody: writes it down, believes tokens of the taker with that epoch, and says so (digest in its record)
//!     taker:     once all who live have said so, takes over what x has below that epoch
//!     x:         if it lives after all, gives what it has to the taker, and asks for space like a joiner
//! ```
//! Why no address gets two owners: before the taker owns anything, all others know of the death, so whomever `x` meets
//! when it comes back tells it. Of two who take at once the greater (epoch, taker) wins, and no other can come to be known
//! by all. Only a forced one does not wait.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::deed::Takeover;
use crate::{
    identity::{BadSeal, Checker, OPERATOR},
    mesh::gossip::{Gossiper, Item, Rejected},
    types::{Incarnation, PeerName},
};
use prost::Message;
use std::{collections::BTreeMap, sync::Arc};
use weft_proto::mesh;

/// A peer is dead, and somebody is to have its ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    pub peer: PeerName,
    /// The last one that is dead.
    pub incarnation: Incarnation,
    pub epoch: u64,
    pub taker: PeerName,
    /// The taker waits for nobody to hear of it.
    pub forced: bool,
}

/// What has been heard of deaths.
#[derive(Debug, Default)]
pub struct Deaths {
    by_peer: BTreeMap<PeerName, Notice>,
    all: Arc<Vec<Death>>,
    digest: u64,
}

#[derive(Clone, Debug)]
struct Notice {
    death: Death,
    item: Item,
    settled: bool,
}

impl Death {
    pub fn to_body(&self) -> Vec<u8> {
        let Self { peer, incarnation, epoch, taker, forced } = self;
        let (peer, incarnation, taker) = (peer.to_string(), incarnation.0, taker.to_string());
        mesh::Death { peer, incarnation, epoch: *epoch, taker, forced: *forced }.encode_to_vec()
    }

    /// # Errors
    /// The bytes are not as such a statement is written.
    pub fn from_body(body: &[u8]) -> Result<Self, Rejected> {
        let mesh::Death { peer, incarnation, epoch, taker, forced } =
            mesh::Death::decode(body).map_err(|_| Rejected::Undecodable)?;
        let name = |text: &str| text.parse().map_err(|_| Rejected::Undecodable);
        let (peer, incarnation, taker) = (name(&peer)?, Incarnation(incarnation), name(&taker)?);
        let death = Self { peer, incarnation, epoch, taker, forced };
        let is_sound = death.to_body() == body && death.peer != death.taker && death.epoch > 0;
        let within = [incarnation.0, epoch].iter().all(|count| *count <= MAX_COUNT);
        (is_sound && within).then_some(death).ok_or(Rejected::Invalid("the death is none that can be"))
    }

    /// With the operator's seal, where there are keys.
    pub fn to_item(&self, seal: Vec<u8>) -> Item {
        Item {
            channel: CHANNEL.into(),
            key: self.peer.as_str().into(),
            rank: [&self.epoch.to_be_bytes(), self.taker.as_str().as_bytes()].concat(),
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
    /// Takes one in that beats what is known of the peer; false where it does not.
    pub fn hear(&mut self, item: Item, settled: bool) -> bool {
        let Ok(death) = Death::from_item(&item) else { return false };
        if self.by_peer.get(&death.peer).is_some_and(|known| !item.beats(&known.item)) {
            return false;
        }
        self.by_peer.insert(death.peer.clone(), Notice { death, item, settled });
        self.all = Arc::new(self.by_peer.values().map(|notice| notice.death.clone()).collect());
        self.digest = self.by_peer.values().fold(0, |digest, notice| digest ^ notice.item.fingerprint());
        true
    }

    /// Those in which this node has yet to do its part.
    pub fn unsettled(&self) -> impl Iterator<Item = &Death> {
        self.by_peer.values().filter(|notice| !notice.settled).map(|notice| &notice.death)
    }

    /// This node has done its part.
    pub fn settle(&mut self, peer: &PeerName) -> Option<Item> {
        let notice = self.by_peer.get_mut(peer)?;
        notice.settled = true;
        Some(notice.item.clone())
    }

    /// Whether that incarnation of a peer is dead.
    pub fn covers(&self, peer: &PeerName, incarnation: Incarnation) -> bool {
        self.by_peer.get(peer).is_some_and(|notice| incarnation <= notice.death.incarnation)
    }

    pub fn of(&self, peer: &PeerName) -> Option<&Death> {
        self.by_peer.get(peer).map(|notice| &notice.death)
    }

    pub fn all(&self) -> &Arc<Vec<Death>> {
        &self.all
    }

    /// The same where the same is known.
    pub fn digest(&self) -> u64 {
        self.digest
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

/// The channel of deaths.
pub const CHANNEL: &str = "deaths";
/// What a death is to who seals it.
pub const SEALED: &str = "death";
/// Epochs and incarnations beyond are forged: they would leave nobody anything to outbid them with.
const MAX_COUNT: u64 = u64::MAX / 4;

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
        Death { peer, incarnation: Incarnation(7), epoch, taker, forced: false }
    }

    #[test]
    fn a_death_reads_back_and_the_greater_counts() {
        let item = death("x", 3, "a").to_item(Vec::new());
        assert_eq!(Death::from_item(&item), Ok(death("x", 3, "a")));
        assert!(item.rank.len() <= MAX_RANK);
        let mut deaths = Deaths::default();
        assert!(deaths.hear(item.clone(), false) && !deaths.hear(item.clone(), false));
        let first = deaths.digest();
        assert!(!deaths.hear(death("x", 2, "z").to_item(Vec::new()), false));
        assert!(deaths.hear(death("x", 3, "b").to_item(Vec::new()), false));
        assert_ne!(deaths.digest(), first);
        assert_eq!(deaths.all().as_slice(), [death("x", 3, "b")]);
        let x = "x".parse().unwrap();
        assert!(deaths.covers(&x, Incarnation(7)) && !deaths.covers(&x, Incarnation(8)));
        deaths.settle(&x);
        assert_eq!(deaths.unsettled().count(), 0);
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let refused = |death: Death| DeathGossip(None).check(&death.to_item(Vec::new())).is_err();
        assert!(!refused(death("x", 1, "a")));
        assert!(refused(death("x", 1, "x")) && refused(death("x", 0, "a")));
        assert!(refused(death("x", u64::MAX, "a")));
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
