//! Dead peers: their ranges go to the taker, and a dead one that comes back makes room.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Allocator;
use crate::{
    ipam::{Change, Now, death::Death},
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
        let takes = |death: &Death| self.takes(death) && self.lacking(death).is_empty();
        let is_due = |death: &&Death| death.peer == self.me || takes(death);
        let due: Vec<Death> = self.deaths.unsettled().filter(is_due).cloned().collect();
        for death in due {
            let Death { peer, epoch, taker, .. } = &death;
            if *peer == self.me {
                warn!(%taker, epoch, "this node was declared dead: its ranges are the taker's");
                let given = self.ring.give(&self.me, self.layout.whole(), taker);
                self.record(given);
            } else {
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

    /// After a restart only once somebody has told what happened meanwhile.
    fn takes(&self, death: &Death) -> bool {
        death.taker == self.me && (self.has_contact || death.forced)
    }

    fn lacking(&self, death: &Death) -> Vec<PeerName> {
        if death.forced {
            return Vec::new();
        }
        let lacks = |(name, (incarnation, digest)): &(&PeerName, &(_, u64))| {
            *digest != self.deaths.digest() && !self.deaths.covers(name, *incarnation)
        };
        // Right after a start not all peers may be known yet, but the ring is.
        let is_unheard = |owner: &&PeerName| {
            **owner != self.me && !self.heard.contains_key(*owner) && self.deaths.of(owner).is_none()
        };
        let unheard = self.ring.shares(false).into_keys().filter(is_unheard).cloned();
        self.heard.iter().filter(lacks).map(|(name, _)| name.clone()).chain(unheard).collect()
    }
}
