//! The deed of a token: how its owner came by the range, so that anybody can check it who knows the seeds.
//!
//! ```text
//!   seeds ──▶ share of s, hand 0 ──grant, sealed by s──▶ a, hand 1 ──grant, sealed by a──▶ b, hand 2
//!                                                                       b's own changes, sealed by b
//! ```
//! A hand-over raises `hands` by one and begins with version 0; the new owner's own changes keep `hands` and raise the
//! version. `hands` comes before the version in the order of tokens: who has given a range away can seal nothing any more
//! that wins over what its heir says. A range that comes back to who had it before needs no more than the seal of who gave
//! it back, so that a deed names everybody once at most, however often space goes round.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    span::{Layout, Span},
    token::Token,
};
use crate::{
    identity::{BadSeal, Checker, Sealer},
    mesh::gossip::Rejected,
    types::PeerName,
};
use prost::Message;
use weft_proto::mesh::{Deed, Grant, Seal};

/// Checks deeds.
#[derive(Debug)]
pub struct Registrar {
    layout: Layout,
    checker: Checker,
    /// The seeds' shares; empty until the seeds are known.
    shares: Vec<Token>,
}

/// What somebody has been shown to own, at some time.
struct Right {
    owner: PeerName,
    span: Span,
    hands: u64,
}

impl Registrar {
    pub fn new(layout: Layout, checker: Checker) -> Self {
        Self { layout, checker, shares: Vec::new() }
    }

    pub fn set_shares(&mut self, shares: Vec<Token>) {
        self.shares = shares;
    }

    /// # Errors
    /// The token is not its owner's by its deed.
    pub fn check(&mut self, token: &Token) -> Result<(), Rejected> {
        if self.shares.is_empty() {
            return Err(Rejected::Forged("the seeds are not known yet"));
        }
        if token.epoch != 0 {
            return Err(Rejected::Forged("nobody may raise a token's epoch"));
        }
        if (token.hands, token.version) == (0, 0) {
            let is_share =
                self.shares.iter().any(|share| Token { signature: Vec::new(), ..token.clone() } == *share);
            return if is_share { Ok(()) } else { Err(Rejected::Forged("it is none of the seeds' shares")) };
        }
        let deed = Deed::decode(token.signature.as_slice())
            .map_err(|_| Rejected::Forged("its deed cannot be read"))?;
        let share =
            self.shares.iter().find(|share| share.span().intersect(token.span()) == Some(token.span()));
        let share = share.ok_or(Rejected::Forged("it lies in no single share of a seed"))?;
        let mut right = Right { owner: share.owner.clone(), span: share.span(), hands: 0 };
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
        let own_change = token.hands == right.hands && token.owner == right.owner && signer.is(&right.owner);
        let handed_on =
            token.hands == right.hands + 1 && signer.is(&right.owner) && token.owner != right.owner;
        let came_back = token.hands > right.hands && token.owner == right.owner && !signer.is(&right.owner);
        if !(own_change && token.version > 0 || (handed_on || came_back) && token.version == 0) {
            return Err(Rejected::Forged("it is not sealed by who owned it"));
        }
        Ok(Right { owner: token.owner.clone(), span: token.span(), hands: token.hands })
    }
}

/// The deed of a token that this node makes of one of its own, `parent`; none where there is no room for another hand-over.
pub fn draw_up(token: &Token, parent: &Token, layout: &Layout, sealer: &Sealer) -> Option<Vec<u8>> {
    let Deed { mut grants, seal } = Deed::decode(parent.signature.as_slice()).unwrap_or_default();
    if parent.hands > 0 && parent.version == 0 {
        grants.push(Grant { token: parent.to_body(layout), seal });
    }
    if token.owner != parent.owner {
        let of_heir =
            |grant: &Grant| Token::from_body(&grant.token, layout).is_ok_and(|t| t.owner == token.owner);
        if let Some(before) = grants.iter().position(of_heir) {
            grants.truncate(before + 1);
        }
        if grants.len() >= MAX_GRANTS {
            return None;
        }
    }
    let seal = Some(sealer.seal(SEALED, &token.to_body(layout)));
    Some(Deed { grants, seal }.encode_to_vec())
}

const SEALED: &str = "token";
/// Hand-overs in a deed, of which each takes about 600 bytes: with more, space would not fit an item.
const MAX_GRANTS: usize = 32;
