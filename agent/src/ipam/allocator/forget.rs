//! Dead peers: their ranges go to the taker, and a dead one that comes back makes room.
//!
//! Why no address gets two owners (`x` has been declared dead, `t` is the taker, `e` the epoch, `R` the ranges):
//!
//! * Who promises owns nothing of `R` then: whoever has been given some of it by `x` does not promise, and says no more
//!   than that; so `t` waits, and the operator has to say it anew, of what is left.
//! * Who has promised never owns any of `R` below `e` again: what still comes to light that `x`, or others that are dead, gave
//!   it goes on to `t` at once.
//! * `t` takes over once all others that it knows of (`members`, on disk) have promised and see the same of `R` as what is
//!   left; whoever is forgotten too need not. From then on `t` has it with epoch `e`, which wins over all of before.
//! * Who comes back does nothing with what it owns before somebody has told it what happened meanwhile (`returning`). It
//!   gives away what has not been taken over; of what it uses by then it promises nothing, so that `t` waits for it.
//!
//! Of two deaths of one peer the later counts: who takes by the earlier no longer sees what the others see.
//! Only by force nobody is waited for: then two may own an address until they hear of each other, and the lower epoch loses.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Allocator;
use crate::{
    ipam::{
        Change, Now,
        death::{Death, Notice},
        span::Span,
    },
    mesh::gossip::Item,
    types::{Incarnation, PeerName},
};
use siphasher::sip::SipHasher13;
use std::{
    collections::BTreeSet,
    hash::{Hash, Hasher},
};
use tracing::{info, warn};

/// What is left of a dead peer's ranges, of those whose last death this node has promised to abide by.
#[derive(Clone, Debug)]
pub(super) struct Estate {
    death: Death,
    left: Vec<Span>,
}

impl Allocator {
    /// An operator has declared peers dead, here.
    pub fn forget(&mut self, deaths: &[Item], now: Now) {
        self.effects.publish.extend_from_slice(deaths);
        self.on_deaths(deaths.iter().cloned());
        // Where nobody lives there is nobody to hear from.
        if self.members.iter().all(|(name, incarnation)| self.deaths.covers(name, *incarnation)) {
            self.returning = false;
        }
        self.settle(now);
    }

    /// What the mesh heard on channel "deaths".
    pub(super) fn on_deaths(&mut self, deaths: impl Iterator<Item = Item>) {
        for item in deaths {
            if self.deaths.hear(item.clone(), false) {
                self.deaths_due = true;
                self.effects.changes.push(Change::Kept { item, settled: false });
            }
        }
    }

    /// Does this node's part in what is known of deaths.
    pub(super) fn settle_deaths(&mut self) {
        if self.deaths.is_empty() || self.assigned {
            return;
        }
        if self.deaths_due || self.ring_changed {
            self.deaths_due = false;
            self.promise();
            self.make_room();
            self.look_again();
        }
        if !self.shares() {
            return;
        }
        let is_due = |(estate, lacking): (&Estate, Vec<_>)| lacking.is_empty().then(|| estate.clone());
        let due: Vec<Estate> = self.takeovers().filter_map(is_due).collect();
        for Estate { death, left } in &due {
            self.inherit(&death.peer, left, death.epoch);
        }
        if !due.is_empty() {
            self.look_again();
            // What could not be taken over stays where it is.
            self.estates.retain(|estate| due.iter().all(|done| done.death != estate.death));
        }
    }

    /// Takeovers that this node has yet to do, and who has not promised so far.
    pub(super) fn takeovers(&self) -> impl Iterator<Item = (&Estate, Vec<PeerName>)> {
        let takes = self.estates.iter().filter(|estate| estate.death.taker == self.me);
        takes.map(|estate| (estate, self.lacking(&estate.death)))
    }

    /// Whom this node has to take over from, and whom it waits for with it.
    pub(super) fn waits(&self) -> Vec<(PeerName, Vec<PeerName>)> {
        let is_stale = |notice: &&Notice| notice.death.taker == self.me && !notice.agreed;
        let stale =
            self.deaths.latest().filter(is_stale).map(|notice| (&notice.death, vec![self.me.clone()]));
        let waits = self.takeovers().map(|(estate, lacking)| (&estate.death, lacking)).chain(stale);
        waits.map(|(death, lacking)| (death.peer.clone(), lacking)).collect()
    }

    /// Whether a range is one that others have promised to leave to this node, which it got without a takeover: it keeps it.
    pub(super) fn is_promised(&self, span: Span) -> bool {
        self.deaths.notices().filter(|notice| notice.agreed).any(|notice| {
            let ranges = self.spans(&notice.death).into_iter().filter_map(|range| range.intersect(span));
            let mut parts = ranges.flat_map(|range| self.ring.within(range));
            parts.any(|(_, token)| token.epoch < notice.death.epoch)
        })
    }

    fn promise(&mut self) {
        let due: Vec<Death> = self.deaths.latest().filter(|n| !n.agreed).map(|n| n.death.clone()).collect();
        for death in due {
            let agrees = if death.peer == self.me { self.give_way(&death) } else { self.concurs(&death) };
            let agreed = if agrees { self.deaths.agree(&death) } else { None };
            let change = agreed.map(|item| Change::Kept { item, settled: true });
            self.effects.changes.extend(change);
        }
    }

    /// This node has been declared dead: what has not been taken over yet goes to the taker, but blocks with pods, which stay
    /// its own as long as they run. True once there is nothing left.
    fn give_way(&mut self, death: &Death) -> bool {
        if !self.shares() {
            return false;
        }
        let taker = self.heir_of(death);
        let mut left = self.left_to(death, &self.me);
        if self.space.pods() > 0 {
            left = left.into_iter().flat_map(|span| self.space.free_blocks(span)).collect();
        }
        for span in left {
            warn!(%taker, epoch = death.epoch, "this node was declared dead: its ranges are the taker's");
            let given = self.ring.give(&self.me, span, &taker);
            self.record(given);
        }
        self.left_to(death, &self.me).is_empty()
    }

    /// What somebody has of a dead peer's ranges, and nobody has taken over.
    fn left_to(&self, death: &Death, owner: &PeerName) -> Vec<Span> {
        let parts = self.spans(death).into_iter().flat_map(|span| self.ring.within(span));
        let its = parts.filter(|(_, token)| token.owner == *owner && token.epoch < death.epoch);
        its.map(|(span, _)| span).collect()
    }

    /// The ranges are the dead one's as far as is known here, or have been taken over.
    fn concurs(&self, death: &Death) -> bool {
        self.spans(death).into_iter().all(|span| {
            let is_its = |token_owner: &PeerName, epoch| *token_owner == death.peer || epoch >= death.epoch;
            let its = self.ring.within(span).filter(|(_, token)| is_its(&token.owner, token.epoch));
            its.map(|(range, _)| range.size()).sum::<u128>() == span.size()
        })
    }

    /// Gives away what has come to this node in spite of a promise.
    fn make_room(&mut self) {
        if !self.shares() {
            return;
        }
        // Who has been dead itself was not waited for. The last death about a range is the one that counts.
        let was_dead = self.deaths.of(&self.me).is_some();
        let is_due = |notice: &&Notice| notice.agreed || was_dead && notice.death.peer != self.me;
        let mut promises: Vec<&Notice> = self.deaths.notices().filter(is_due).collect();
        promises.sort_by_key(|notice| std::cmp::Reverse(notice.death.epoch));
        let mut gone: Vec<(Span, PeerName)> = Vec::new();
        for Notice { death, .. } in promises {
            let heir = self.heir_of(death);
            gone.extend(self.left_to(death, &self.me).into_iter().map(|span| (span, heir.clone())));
        }
        gone.retain(|(_, heir)| *heir != self.me);
        for (span, heir) in gone {
            let given = self.ring.give(&self.me, span, &heir);
            for range in given.iter().flat_map(|token| self.layout.prefixes(token.span())) {
                info!(taker = %heir, %range, "passed on what a dead peer gave");
            }
            self.record(given);
        }
    }

    fn look_again(&mut self) {
        let estate = |notice: &Notice| {
            let death = notice.death.clone();
            let left = self.left_to(&death, &death.peer);
            (!left.is_empty()).then_some(Estate { death, left })
        };
        let agreed = self.deaths.latest().filter(|notice| notice.agreed);
        self.estates = agreed.filter_map(estate).collect();
        self.deaths_digest = self.estates.iter().fold(0, |digest, estate| digest ^ estate.fingerprint());
    }

    /// The taker; where it has been declared dead itself, its taker.
    fn heir_of(&self, death: &Death) -> PeerName {
        let (mut heir, mut asked) = (&death.taker, BTreeSet::from([&death.peer]));
        while let Some(next) = self.deaths.of(heir)
            && asked.insert(heir)
            && !asked.contains(&next.taker)
            && *heir != self.me
        {
            heir = &next.taker;
        }
        heir.clone()
    }

    fn lacking(&self, death: &Death) -> Vec<PeerName> {
        let lacks = |(name, incarnation): &(&PeerName, &Incarnation)| {
            self.heard.get(*name) != Some(&self.deaths_digest) && !self.deaths.covers(name, **incarnation)
        };
        let lacks = self.members.iter().filter(lacks).map(|(name, _)| name.clone());
        if death.forced { Vec::new() } else { lacks.collect() }
    }

    fn spans(&self, death: &Death) -> Vec<Span> {
        death.ranges.iter().filter_map(|range| self.layout.span(*range)).collect()
    }
}

impl Estate {
    fn fingerprint(&self) -> u64 {
        let mut hash = SipHasher13::new();
        (self.death.to_body(), &self.left).hash(&mut hash);
        hash.finish()
    }
}
