//! The deed of a token: how its owner came by the range, so that anybody can check it who knows the seeds.
//!
//! ```text
//!   seeds ──▶ share of s, hand 0 ──grant, sealed by s──▶ a, hand 1 ──grant, sealed by a──▶ b, hand 2
//!                                                                       b's own changes, sealed by b
//! ```
//! A hand-over raises `hands` by one and begins with version 0; the new owner's own changes keep `hands` and raise the
//! version. `hands` comes before the version in the order of tokens: who has given a range away can seal nothing any more
//! that wins over what its heir says. A takeover from a node that is gone is a hand-over that the taker seals itself; it
//! raises the epoch, which comes before all else, and counts where the death has been agreed on ([`Takeover`]).
//!
//! Nothing in a deed can be left out, also where a range comes back to who had it before: without the seals in between,
//! anybody could give it back. So a range can change hands about a hundred times.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    span::{Layout, Span},
    token::Token,
};
use crate::{
    identity::{BadSeal, Checker, Sealer, Signer},
    mesh::gossip::{MAX_SIGNATURE, Rejected},
    types::PeerName,
};
use prost::Message;
use std::{collections::BTreeSet, sync::Arc};
use tokio::sync::watch;
use weft_proto::mesh::{Deed, Grant, Seal};

/// What has been agreed on somebody's death: who takes over the ranges that it has below an epoch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Takeover {
    pub from: PeerName,
    pub epoch: u64,
    pub to: PeerName,
}

/// The takeovers that this node believes, having made sure of each death itself.
pub type Takeovers = watch::Receiver<Arc<BTreeSet<Takeover>>>;

/// Checks deeds.
#[derive(Debug)]
pub struct Registrar {
    layout: Layout,
    checker: Checker,
    /// The seeds' shares; empty until the seeds are known.
    shares: Vec<Token>,
    takeovers: Takeovers,
}

/// What somebody has been shown to own, at some time.
struct Right {
    owner: PeerName,
    span: Span,
    epoch: u64,
    hands: u64,
}

impl Registrar {
    pub fn new(layout: Layout, checker: Checker, takeovers: Takeovers) -> Self {
        Self { layout, checker, shares: Vec::new(), takeovers }
    }

    pub fn set_shares(&mut self, shares: Vec<Token>) {
        self.shares = shares;
    }

    /// # Errors
    /// The token is not its owner's by its deed.
    pub fn check(&mut self, token: &Token) -> Result<(), Rejected> {
        if self.shares.is_empty() {
            // They may be elected at this moment: peers offer the token again and again.
            return Err(Rejected::Invalid("the seeds are not known yet"));
        }
        if (token.hands, token.version) == (0, 0) {
            // Nobody has sealed it: whatever were there instead of a deed would only make it larger.
            let is_share = self.shares.contains(token);
            return is_share.then_some(()).ok_or(Rejected::Forged("it is none of the seeds' shares"));
        }
        let deed = read(&token.signature).ok_or(Rejected::Forged("its deed cannot be read"))?;
        let share =
            self.shares.iter().find(|share| share.span().intersect(token.span()) == Some(token.span()));
        let share = share.ok_or(Rejected::Forged("it lies in no single share of a seed"))?;
        let mut right = Right { owner: share.owner.clone(), span: share.span(), epoch: 0, hands: 0 };
        for grant in &deed.grants {
            let granted = Token::from_body(&grant.token, &self.layout)?;
            if granted.hands <= right.hands {
                return Err(Rejected::Forged("its deed has a hand-over that is none"));
            }
            right = self.step(right, &granted, &grant.token, grant.seal.as_ref())?;
        }
        let body = token.to_body(&self.layout);
        self.step(right, token, &body, deed.seal.as_ref()).map(drop)
    }

    /// What follows from a right by one sealed token.
    fn step(
        &mut self,
        right: Right,
        token: &Token,
        body: &[u8],
        seal: Option<&Seal>,
    ) -> Result<Right, Rejected> {
        let signer =
            seal.ok_or(BadSeal::Unreadable).and_then(|seal| self.checker.signer(SEALED, body, seal))?;
        if right.span.intersect(token.span()) != Some(token.span()) {
            return Err(Rejected::Forged("it reaches beyond what was handed over"));
        }
        let next =
            Right { owner: token.owner.clone(), span: token.span(), epoch: token.epoch, hands: token.hands };
        if token.epoch > right.epoch {
            return self.takeover(&right, token, &signer).map(|()| next);
        }
        let own_change = token.hands == right.hands && token.owner == right.owner && signer.is(&right.owner);
        let handed_on =
            token.hands == right.hands + 1 && signer.is(&right.owner) && token.owner != right.owner;
        if token.epoch < right.epoch || !(own_change && token.version > 0 || handed_on && token.version == 0)
        {
            return Err(Rejected::Forged("it is not sealed by who owned it"));
        }
        Ok(next)
    }
}

impl Registrar {
    fn takeover(&self, right: &Right, token: &Token, taker: &Signer) -> Result<(), Rejected> {
        if token.hands != right.hands + 1 || token.version != 0 || !taker.is(&token.owner) {
            return Err(Rejected::Forged("its epoch is raised by somebody else than a taker"));
        }
        let (from, epoch, to) = (right.owner.clone(), token.epoch, token.owner.clone());
        match self.takeovers.borrow().contains(&Takeover { from, epoch, to }) {
            true => Ok(()),
            // The agreement may be on its way: peers offer the token again and again.
            false => Err(Rejected::Invalid("a takeover that is not known here (yet)")),
        }
    }
}

/// None where there is more, or something else, than a deed has.
fn read(bytes: &[u8]) -> Option<Deed> {
    let deed = Deed::decode(bytes).ok()?;
    (deed.encoded_len() == bytes.len()).then_some(deed)
}

/// The deed of a token that this node makes of one of its own, `parent`; none where there is no room for another hand-over.
pub fn draw_up(token: &Token, parent: &Token, layout: &Layout, sealer: &Sealer) -> Option<Vec<u8>> {
    let Deed { mut grants, seal } = Deed::decode(parent.signature.as_slice()).unwrap_or_default();
    if parent.hands > 0 && parent.version == 0 {
        grants.push(Grant { token: parent.to_body(layout), seal });
    }
    let seal = Some(sealer.seal(SEALED, &token.to_body(layout)));
    let deed = Deed { grants, seal }.encode_to_vec();
    // The heir's own seal comes on top.
    let room = if token.owner == parent.owner { MAX_SIGNATURE } else { MAX_SIGNATURE - MAX_GRANT };
    (deed.len() <= room).then_some(deed)
}

/// The epochs that a token and its former states have.
pub fn epochs(token: &Token, layout: &Layout) -> BTreeSet<u64> {
    let deed = Deed::decode(token.signature.as_slice()).unwrap_or_default();
    let granted = deed.grants.iter().filter_map(|grant| Token::from_body(&grant.token, layout).ok());
    granted.map(|token| token.epoch).chain([token.epoch]).collect()
}

const SEALED: &str = "token";
/// Bytes of a hand-over in a deed at most, with intermediate certificates; about 600 without.
const MAX_GRANT: usize = 4 << 10;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::{
        identity::{
            Ca, Identity, Issued, Trust,
            task::{Current, State},
        },
        ipam::ring::Ring,
    };
    use std::{
        sync::{Arc, LazyLock},
        time::{Duration, SystemTime},
    };
    use tokio::sync::watch;

    static CA: LazyLock<Issued> = LazyLock::new(|| Ca::create(SystemTime::now()).unwrap());

    fn current(name: &str) -> Current {
        let (name, now): (PeerName, _) = (name.parse().unwrap(), SystemTime::now());
        let ca = Ca::load(CA.cert.as_bytes(), CA.key.as_bytes()).unwrap();
        let leaf = ca.issue(&name, Duration::from_secs(600), now).unwrap();
        let trust = Trust::from_pem(CA.cert.as_bytes(), None).unwrap();
        let identity = Identity::new(name, trust, leaf.cert.as_bytes(), leaf.key.as_bytes(), now).unwrap();
        watch::channel(State { identity: Arc::new(identity), trouble: None }).1
    }

    fn layout() -> Layout {
        Layout::new("10.32.0.0/16".parse().unwrap())
    }

    /// The ring of a seed `s` and of those whom space goes to, each with its own seals.
    struct Scene {
        tokens: Vec<Token>,
        registrar: Registrar,
        takeovers: watch::Sender<Arc<BTreeSet<Takeover>>>,
    }

    impl Scene {
        fn new() -> Self {
            let shares = Ring::genesis(layout(), &["s".parse().unwrap()]).unwrap();
            let (takeovers, believed) = watch::channel(Arc::default());
            let mut registrar = Registrar::new(layout(), Checker::new(current("judge")), believed);
            registrar.set_shares(shares.clone());
            Self { tokens: shares, registrar, takeovers }
        }

        fn ring_of(&self, name: &str) -> Ring {
            let mut ring = Ring::new(layout(), Some(Sealer::new(current(name))));
            self.tokens.iter().for_each(|token| _ = ring.merge(token.clone()));
            ring
        }

        fn agree(&self, from: &str, epoch: u64, to: &str) {
            let takeover = Takeover { from: from.parse().unwrap(), epoch, to: to.parse().unwrap() };
            self.takeovers.send_modify(|agreed| _ = Arc::make_mut(agreed).insert(takeover));
        }

        /// `from` hands a span over, and `to` takes it over; all that is said on the way is as it should be.
        fn hand(&mut self, from: &str, span: Span, to: &str) -> Vec<Token> {
            let (giver, heir): (PeerName, PeerName) = (from.parse().unwrap(), to.parse().unwrap());
            let given = self.ring_of(from).give(&giver, span, &heir);
            let mut ring = self.ring_of(to);
            given.iter().for_each(|token| _ = ring.merge(token.clone()));
            let taken = ring.flag(&ring.owned(&heir), |_| true);
            for token in given.iter().chain(&taken) {
                self.registrar.check(token).unwrap_or_else(|rejected| panic!("{rejected}: {token:?}"));
            }
            self.tokens = ring.tokens().cloned().collect();
            given
        }

        fn deed_of(&self, owner: &str) -> Deed {
            let token = self.tokens.iter().find(|token| token.owner.as_str() == owner).unwrap();
            Deed::decode(token.signature.as_slice()).unwrap()
        }
    }

    fn blocks(first: u128, last: u128) -> Span {
        Span { first: first * 256, last: last * 256 + 255 }
    }

    #[test]
    fn each_hand_over_adds_to_the_deed() {
        let mut scene = Scene::new();
        scene.hand("s", blocks(128, 255), "a");
        scene.hand("a", blocks(192, 255), "b");
        assert_eq!((scene.deed_of("a").grants.len(), scene.deed_of("b").grants.len()), (1, 2));
        scene.hand("b", blocks(224, 255), "a");
        let back = scene.tokens.iter().find(|token| token.start == 224 * 256).unwrap();
        assert_eq!((back.hands, back.version, back.owner.as_str()), (3, 1, "a"));
    }

    #[test]
    fn who_has_handed_over_too_often_keeps_the_rest() {
        let mut scene = Scene::new();
        scene.hand("s", blocks(0, 255), "a");
        let mut hands = 1;
        let (mut from, mut to) = ("a", "b");
        while !scene.hand(from, blocks(0, 255), to).is_empty() {
            (from, to) = (to, from);
            hands += 1;
        }
        assert!(hands > 80, "{hands}");
        let last = &scene.tokens[0];
        assert_eq!((last.hands, last.owner.as_str()), (hands, from));
        assert!(last.signature.len() <= MAX_SIGNATURE);
    }

    #[test]
    fn a_deed_holds_nothing_else() {
        let mut scene = Scene::new();
        scene.hand("s", blocks(128, 255), "a");
        let mut token = scene.tokens.iter().find(|token| token.owner.as_str() == "a").unwrap().clone();
        assert_eq!(scene.registrar.check(&token), Ok(()));
        // A field that is not known: number 15, of two bytes.
        token.signature.extend([0x7a, 2, 0, 0]);
        assert_eq!(scene.registrar.check(&token).unwrap_err().to_string(), "its deed cannot be read");
    }

    #[test]
    fn a_dead_nodes_ranges_go_to_who_was_agreed_on_and_on_from_there() {
        let mut scene = Scene::new();
        scene.hand("s", blocks(128, 255), "dead");
        scene.hand("dead", blocks(192, 255), "c");
        let (dead, taker): (PeerName, PeerName) = ("dead".parse().unwrap(), "t".parse().unwrap());
        let taken = scene.ring_of("t").take_over(&dead, &[layout().whole()], 1, &taker);
        assert_eq!(taken.iter().map(Token::span).collect::<Vec<_>>(), [blocks(128, 191)]);
        let check =
            |scene: &mut Scene, token: &Token| scene.registrar.check(token).map_err(|e| e.to_string());
        assert_eq!(check(&mut scene, &taken[0]).unwrap_err(), "a takeover that is not known here (yet)");
        for (from, epoch, to) in [("dead", 1, "c"), ("dead", 2, "t"), ("s", 1, "t")] {
            scene.agree(from, epoch, to);
            assert!(check(&mut scene, &taken[0]).is_err(), "{from} {epoch} {to}");
        }
        scene.agree("dead", 1, "t");
        check(&mut scene, &taken[0]).unwrap();
        // Somebody else seals the same.
        let forged = scene.ring_of("c").take_over(&dead, &[layout().whole()], 1, &taker);
        assert_eq!(
            check(&mut scene, &forged[0]).unwrap_err(),
            "its epoch is raised by somebody else than a taker"
        );
        // The dead one is not dead, and changes and gives away what it had: that loses, and the taker's heirs are believed.
        let late = scene.ring_of("dead").give(&dead, blocks(160, 191), &"x".parse().unwrap());
        let mut ring = scene.ring_of("t");
        ring.take_over(&dead, &[layout().whole()], 1, &taker);
        late.into_iter().for_each(|token| _ = ring.merge(token));
        assert_eq!(ring.owned_by(&taker), [blocks(128, 191)]);
        scene.tokens = ring.tokens().filter(|token| token.owner.as_str() != "x").cloned().collect();
        scene.hand("t", blocks(144, 151), "s");
        // And once more, of the taker.
        scene.agree("t", 5, "c");
        let again = scene.ring_of("c").take_over(&taker, &[layout().whole()], 5, &"c".parse().unwrap());
        assert!(!again.is_empty());
        again.iter().for_each(|token| check(&mut scene, token).unwrap());
    }

    #[test]
    fn a_share_has_no_deed() {
        let mut scene = Scene::new();
        let share = scene.tokens[0].clone();
        assert_eq!(scene.registrar.check(&share), Ok(()));
        let larger = Token { signature: vec![0; 9], ..share };
        let refused = scene.registrar.check(&larger).unwrap_err();
        assert_eq!(refused.to_string(), "it is none of the seeds' shares");
    }

    #[test]
    fn nothing_is_believed_before_the_seeds_are_known() {
        let scene = Scene::new();
        let none = watch::channel(Arc::default()).1;
        let mut ignorant = Registrar::new(layout(), Checker::new(current("judge")), none);
        let refused = ignorant.check(&scene.tokens[0]).unwrap_err();
        assert_eq!(refused.to_string(), "the seeds are not known yet");
    }
}
