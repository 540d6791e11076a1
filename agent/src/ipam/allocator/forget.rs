//! Dead peers: their ranges go to the taker, and a dead one that comes back makes room.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Allocator;
use crate::{
    ipam::{Change, Now, death::Death, ranges_digest},
    mesh::gossip::Item,
    types::PeerName,
};
use tracing::warn;

impl Allocator {
    /// An operator has declared peers dead, here.
    pub fn forget(&mut self, deaths: &[Item], now: Now) {
        self.effects.publish.extend_from_slice(deaths);
        self.on_deaths(deaths.iter().cloned());
        self.settle(now);
    }

    /// What the mesh heard on channel "deaths".
    pub(super) fn on_deaths(&mut self, deaths: impl Iterator<Item = Item>) {
        for item in deaths {
            if self.deaths.hear(item.clone(), false) {
                self.has_contact = true;
                self.effects.changes.push(Change::Kept { item, settled: false });
            }
        }
    }

    /// Does this node's part in what is known of deaths: taking over, or giving up what was its own.
    pub(super) fn settle_deaths(&mut self) {
        if !self.shares() {
            return;
        }
        let may = |death: &Death| death.forced || self.knows_peers && self.lacking(death).is_empty();
        let takes = |death: &Death| self.takes(death) && may(death);
        let is_due = |death: &&Death| death.peer == self.me || takes(death);
        let due: Vec<Death> = self.deaths.unsettled().filter(is_due).cloned().collect();
        for death in due {
            let Death { peer, epoch, taker, .. } = &death;
            if *peer == self.me {
                warn!(%taker, epoch, "this node was declared dead: its ranges are the taker's");
                let given = self.ring.give(&self.me, self.layout.whole(), taker);
                self.record(given);
            } else if !self.is_back(&death) {
                self.inherit(peer, *epoch);
            }
            if let Some(item) = self.deaths.settle(peer) {
                self.effects.changes.push(Change::Kept { item, settled: true });
            }
        }
    }

    /// Takeovers that this node has yet to do, and who has not heard of the death so far.
    pub(super) fn takeovers(&self) -> Vec<(PeerName, Vec<PeerName>)> {
        let takes = self.deaths.unsettled().filter(|death| self.takes(death));
        takes.map(|death| (death.peer.clone(), self.lacking(death))).collect()
    }

    /// Whether it is known to have come back: then it gives what it has by itself, and what it has since is its own.
    fn is_back(&self, death: &Death) -> bool {
        self.heard.get(&death.peer).is_some_and(|(incarnation, ..)| *incarnation > death.incarnation)
    }

    /// Whether a peer is dead as far as is known here.
    pub(super) fn is_dead(&self, peer: &PeerName) -> bool {
        self.deaths.of(peer).is_some_and(|death| !self.is_back(death))
    }

    /// After a restart only once somebody has told what happened meanwhile.
    fn takes(&self, death: &Death) -> bool {
        death.taker == self.me && (self.has_contact || death.forced)
    }

    fn lacking(&self, death: &Death) -> Vec<PeerName> {
        if death.forced {
            return Vec::new();
        }
        // What it owned when it heard of the death is known here: the dead one may have given it something just before.
        let is_known = |name: &PeerName, ranges: u64| {
            let own = self.ring.owned_by(name).into_iter().flat_map(|span| self.layout.prefixes(span));
            ranges_digest(&own.collect::<Vec<_>>()) == ranges
        };
        let lacks = |(name, (incarnation, ranges, deaths)): &(&PeerName, &(_, u64, u64))| {
            let agrees = *deaths == self.deaths.digest() && is_known(name, *ranges);
            !agrees && !self.deaths.covers(name, *incarnation)
        };
        // Right after a start not all peers may be known yet, but the ring is.
        let is_unheard = |owner: &&PeerName| {
            **owner != self.me && !self.heard.contains_key(*owner) && self.deaths.of(owner).is_none()
        };
        let unheard = self.ring.shares(false).into_keys().filter(is_unheard).cloned();
        self.heard.iter().filter(lacks).map(|(name, _)| name.clone()).chain(unheard).collect()
    }
}
