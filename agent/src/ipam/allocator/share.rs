//! Space between nodes: asking for it, giving it to who asks, and leaving it behind.
//!
//! ```text
//!   asker                                       giver
//!     │ ── SpaceRequest {count, urgent} ──────▶ │ carves free blocks off the top, at most half
//!     │ ◀───────── tokens, by gossip ────────── │ (an answer that is lost heals with the next digest)
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Allocator;
use crate::{
    ipam::{Change, Now, space::Owner, span::Span},
    mesh::gossip::Item,
    types::PeerName,
};
use prost::Message;
use std::{cmp::Reverse, collections::BTreeSet};
use tracing::{debug, info};
use weft_proto::mesh::SpaceRequest;

impl Allocator {
    /// A peer asks for space on channel "ring".
    pub fn on_unicast(&mut self, from: &PeerName, body: &[u8], now: Now) {
        let Ok(request) = SpaceRequest::decode(body) else {
            debug!(peer = %from, "dropped a request for space that does not decode");
            return;
        };
        if !self.shares() || *from == self.me {
            return;
        }
        // Who has free blocks does not need more: the request is a copy, or our answer to it was lost.
        let has: Vec<Item> = {
            let has = self.ring.tokens().filter(|token| token.owner == *from && token.free);
            has.map(|token| token.to_item(&self.layout)).collect()
        };
        if !has.is_empty() {
            self.effects.publish.extend(has);
            return;
        }
        let surplus = self.space.surplus();
        let most = if request.urgent { surplus.div_ceil(2) } else { surplus / 2 };
        let blocks = u128::from(request.count).div_ceil(self.layout.unit()).clamp(1, most.max(1)).min(most);
        let mut carved = self.space.carve(blocks);
        carved.retain(|span| !self.is_promised(*span));
        for span in carved {
            let changed = self.ring.give(&self.me, span, from);
            for token in changed.iter().filter(|token| token.owner == *from) {
                for range in self.layout.prefixes(token.span()) {
                    info!(peer = %from, %range, "gave space");
                }
            }
            self.record(changed);
        }
        self.settle(now);
    }

    /// Takes over what a peer had that is gone, as has been agreed on.
    pub fn take_over(&mut self, from: &PeerName, epoch: u64, now: Now) {
        if self.shares() && *from != self.me {
            self.inherit(from, &[self.layout.whole()], epoch);
            self.settle(now);
        }
    }

    pub(super) fn inherit(&mut self, from: &PeerName, within: &[Span], epoch: u64) {
        let changed = self.ring.take_over(from, within, epoch, &self.me);
        for range in changed.iter().flat_map(|token| self.layout.prefixes(token.span())) {
            info!(peer = %from, %range, epoch, "took over space");
        }
        self.record(changed);
    }

    /// The takeovers that the ring refers to, by epoch.
    pub fn epochs(&self) -> BTreeSet<u64> {
        self.ring.epochs()
    }

    /// Hands everything to a peer, for good. The caller knows that no pod lives here.
    pub fn leave(&mut self, to: &PeerName, now: Now) {
        if !self.assigned {
            let changed = self.ring.give(&self.me, self.layout.whole(), to);
            self.record(changed);
        }
        self.left = true;
        let owners: Vec<Owner> = self.space.allocations().map(|(_, a)| a.owner.clone()).collect();
        for owner in owners {
            self.free(&owner, now);
        }
        let rested: Vec<u128> = self.space.forget_resting();
        self.effects
            .changes
            .extend(rested.into_iter().map(|o| Change::Resting(self.layout.address(o), None)));
        self.settle(now);
        info!(heir = %to, "handed all addresses over");
    }

    /// Who should have this node's addresses when it leaves: the reachable peer that owns the least. Nobody where there
    /// is nothing to give.
    pub fn heir(&self) -> Option<PeerName> {
        if self.space.own().is_empty() || self.assigned {
            return None;
        }
        let shares = self.ring.shares(false);
        // Who owns nothing may want nothing: it comes last.
        self.peers.iter().min_by_key(|peer| shares.get(peer).copied().unwrap_or(u128::MAX)).cloned()
    }

    /// Asks a peer for space where it is needed.
    pub(super) fn seek(&mut self, now: Now) {
        let free = self.space.counts().free;
        self.demand = self.demand.filter(|until| now.at < *until && free == 0);
        let urgent = self.space.find(&Owner::Bridge).is_none() || self.demand.is_some();
        // Before it runs dry, an owner of blocks that are worth it asks those who have more than they need.
        if self.observes || !self.shares() || !(urgent || free < self.layout.unit() / 4) {
            return self.asker.satisfied();
        }
        let givers = self.givers();
        let reachable: Vec<PeerName> = givers.into_iter().filter(|peer| self.peers.contains(peer)).collect();
        if let Some(peer) = self.asker.seek(&reachable, now.at) {
            debug!(%peer, urgent, "asking for space");
            let request = SpaceRequest { count: self.wish(), urgent };
            self.effects.unicasts.push((peer, request.encode_to_vec()));
        }
    }

    /// Peers with blocks to give, those with most first.
    pub(super) fn givers(&self) -> Vec<PeerName> {
        let mut shares: Vec<_> =
            self.ring.shares(true).into_iter().filter(|(peer, _)| **peer != self.me).collect();
        shares.sort_by_key(|(_, size)| Reverse(*size));
        shares.into_iter().map(|(peer, _)| peer.clone()).collect()
    }

    /// How many addresses to ask for: half of an equal share, in blocks, so that a crowd of joiners leaves some to each.
    fn wish(&self) -> u64 {
        let (size, nodes) = (self.layout.whole().last + 1, self.peers.len() as u128 + 1);
        let blocks = (size / self.layout.unit() / (2 * nodes)).max(1);
        u64::try_from((1 << blocks.ilog2()) * self.layout.unit()).unwrap_or(u64::MAX)
    }
}
