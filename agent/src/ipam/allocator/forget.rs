//! Dead peers: their ranges go to the taker, and a dead one that comes back makes room.
//!
//! Why no address gets two owners (`x` has been declared dead, `t` is the taker, `e` the epoch, `R` the ranges):
//!
//! * Who promises owns nothing of `R`, and never uses any of it below `e` again: what still comes to light that `x`, or others
//!   that are dead, gave it goes on to `t`.
//! * `t` takes over once all that it knows of (`members`, on disk) have promised, and know of the same dead and the same living
//!   (`outlook`). So it asks whoever has let somebody in who has not heard of the death, and whom they let in.
//! * It takes nothing over any more once it hears of another death: who died before it promised may have let somebody in. The
//!   operator says it anew, of what is left. From the takeover on `t` has it with epoch `e`, which wins over all of before.
//! * Who comes back does nothing with what it owns before somebody has told it what happened meanwhile (`returning`): it hears of
//!   the death, or `t` hears of it, and waits for it.
//! * Who has been dead itself was not waited for. It is bound by all deaths that it hears of, as if it had promised.
//!
//! Who gets what is given up follows from the last death about it, by epoch and name, for everybody alike.
//!
//! Whoever lives, and is known to nobody that `t` can ask, is not waited for; and by force nobody is: then two may own an address
//! until they hear of each other, and the lower epoch loses.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Allocator;
use crate::{
    ipam::{
        Change, Now,
        death::{self, Death, Notice},
        span::Span,
    },
    mesh::gossip::Item,
    types::{Incarnation, PeerName},
};
use siphasher::sip::SipHasher13;
use std::{
    cmp::Reverse,
    collections::BTreeSet,
    hash::{Hash, Hasher},
};
use tracing::warn;

/// What is left of a dead peer's ranges, of those that were declared dead last.
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
            self.ring_changed = true;
            self.make_room();
            self.promise();
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

    /// Whom this node has to take over from, and whom it waits for with it: itself, where that has to be said again.
    pub(super) fn waits(&self) -> Vec<(PeerName, Vec<PeerName>)> {
        let pending: Vec<_> =
            self.takeovers().map(|(estate, lacking)| (estate.death.peer.clone(), lacking)).collect();
        let is_left = |death: &&Death| {
            let is_last = self.deaths.of(&death.peer) == Some(*death);
            let is_pending = pending.iter().any(|(peer, _)| *peer == death.peer);
            death.taker == self.me && is_last && !is_pending && !self.left_to(death, &death.peer).is_empty()
        };
        let left = self.deaths.all().iter().filter(is_left);
        let void: Vec<_> = left.map(|death| (death.peer.clone(), vec![self.me.clone()])).collect();
        pending.into_iter().chain(void).collect()
    }

    /// Who lives as far as was known before the start, and has not been heard of since: takers have to know of them.
    pub(super) fn absent(&self) -> Vec<(PeerName, Incarnation)> {
        let is_absent = |(name, incarnation): &(&PeerName, &Incarnation)| {
            self.heard.get(*name).is_none_or(|(heard, _)| heard < *incarnation)
        };
        let absent = self.living().filter(is_absent).map(|(name, incarnation)| (name.clone(), *incarnation));
        if self.estates.is_empty() { Vec::new() } else { absent.collect() }
    }

    /// Whether a range is one that others have promised to leave to this node, which it got without a takeover: it keeps it.
    pub(super) fn is_promised(&self, span: Span) -> bool {
        self.deaths.notices().filter(|notice| notice.agreed).any(|notice| {
            let ranges = self.spans(&notice.death).into_iter().filter_map(|range| range.intersect(span));
            let mut parts = ranges.flat_map(|range| self.ring.within(range));
            parts.any(|(_, token)| token.epoch < notice.death.epoch)
        })
    }

    /// Its own ranges but for those that it is bound to leave alone.
    pub(super) fn usable(&self) -> Vec<Span> {
        let bound = self.bound();
        self.owned.spans().into_iter().flat_map(|span| span.without(&bound)).collect()
    }

    /// Takeovers that this node has yet to do, and who has not promised so far.
    fn takeovers(&self) -> impl Iterator<Item = (&Estate, Vec<PeerName>)> {
        let is_due = |death: &Death| death.forced || self.deaths_digest != 0 && self.deaths.is_news(death);
        let takes =
            self.estates.iter().filter(move |estate| estate.death.taker == self.me && is_due(&estate.death));
        takes.map(|estate| (estate, self.lacking(&estate.death)))
    }

    /// What it owns, and has promised to leave alone, or may not have been waited for with, since it has been dead itself.
    fn bound(&self) -> Vec<Span> {
        let was_dead = self.deaths.of(&self.me).is_some();
        let is_binding = |notice: &&Notice| notice.death.taker != self.me && (notice.agreed || was_dead);
        let mut bound: Vec<Span> = Vec::new();
        for Notice { death, .. } in self.deaths.notices().filter(is_binding) {
            let more: Vec<_> =
                self.left_to(death, &self.me).into_iter().flat_map(|span| span.without(&bound)).collect();
            bound.extend(more);
        }
        bound
    }

    /// Gives away what it may not use, but blocks with pods, which stay its own as long as they run. Who gets it follows from
    /// the last death about a range, also where it says stay: else two would pass it to each other for ever.
    fn make_room(&mut self) {
        if !self.shares() {
            return;
        }
        let mut bound = self.bound();
        let mut deaths: Vec<&Death> = self.deaths.all().iter().collect();
        deaths.sort_by_key(|death| Reverse(order(death)));
        let mut gone: Vec<(Span, PeerName)> = Vec::new();
        for death in deaths {
            let named = self.left_to(death, &self.me);
            let heir = self.heir_of(death);
            let its = bound.iter().flat_map(|span| named.iter().filter_map(|named| named.intersect(*span)));
            gone.extend(its.map(|span| (span, heir.clone())));
            bound = bound.into_iter().flat_map(|span| span.without(&named)).collect();
        }
        gone.retain(|(_, heir)| *heir != self.me);
        for (span, heir) in gone {
            let free = if self.space.pods() > 0 { self.space.free_blocks(span) } else { vec![span] };
            for span in free {
                let given = self.ring.give(&self.me, span, &heir);
                for range in given.iter().flat_map(|token| self.layout.prefixes(token.span())) {
                    warn!(taker = %heir, %range, "gave up a range that was a dead peer's, or that this node had when it was declared dead");
                }
                self.record(given);
            }
        }
    }

    fn promise(&mut self) {
        let owns_none = |death: &Death| death.taker == self.me || self.left_to(death, &self.me).is_empty();
        let open = self.deaths.last().filter(|notice| !notice.agreed);
        let due: Vec<Death> = open.map(|notice| notice.death.clone()).filter(owns_none).collect();
        for death in due {
            let agreed = self.deaths.agree(&death).map(|item| Change::Kept { item, settled: true });
            self.effects.changes.extend(agreed);
        }
    }

    fn look_again(&mut self) {
        let estate = |notice: &Notice| {
            let death = notice.death.clone();
            let left = self.left_to(&death, &death.peer);
            (!left.is_empty()).then_some(Estate { death, left })
        };
        self.estates = self.deaths.last().filter_map(estate).collect();
        let promises = !self.estates.is_empty() && self.deaths.last().all(|notice| notice.agreed);
        self.deaths_digest = if promises { self.outlook() } else { 0 };
    }

    /// Who is dead and who lives, as far as this node knows.
    fn outlook(&self) -> u64 {
        let names: BTreeSet<&PeerName> = self.living().map(|(name, _)| name).chain([&self.me]).collect();
        let mut hash = SipHasher13::new();
        (death::digest(self.deaths.all().iter()), names).hash(&mut hash);
        hash.finish().max(1)
    }

    fn living(&self) -> impl Iterator<Item = (&PeerName, &Incarnation)> {
        self.members.iter().filter(|(name, incarnation)| !self.deaths.covers(name, **incarnation))
    }

    /// What somebody has of a dead peer's ranges, and nobody has taken over.
    fn left_to(&self, death: &Death, owner: &PeerName) -> Vec<Span> {
        let parts = self.spans(death).into_iter().flat_map(|span| self.ring.within(span));
        let its = parts.filter(|(_, token)| token.owner == *owner && token.epoch < death.epoch);
        its.map(|(span, _)| span).collect()
    }

    /// The taker; where it has been declared dead later itself, its taker.
    fn heir_of(&self, death: &Death) -> PeerName {
        let mut last = death;
        while let Some(next) = self.deaths.of(&last.taker).filter(|next| order(next) > order(last)) {
            last = next;
        }
        last.taker.clone()
    }

    fn lacking(&self, death: &Death) -> Vec<PeerName> {
        let lacks =
            |name: &PeerName| self.heard.get(name).is_none_or(|(_, said)| *said != self.deaths_digest);
        let lacks = self.living().map(|(name, _)| name.clone()).filter(lacks);
        if death.forced { Vec::new() } else { lacks.collect() }
    }

    fn spans(&self, death: &Death) -> Vec<Span> {
        death.ranges.iter().filter_map(|range| self.layout.span(*range)).collect()
    }
}

/// Of two deaths the greater was said later, as far as anybody can tell.
fn order(death: &Death) -> (u64, &PeerName) {
    (death.epoch, &death.peer)
}
