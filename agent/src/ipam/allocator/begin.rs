//! Finding out who shares the universe, by vote.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Allocator;
use crate::{
    ipam::{
        Change, Now,
        election::{Election, MOST_NAMES, Patience, Vote},
        ring::Ring,
        seed::SeedPlan,
    },
    mesh::gossip::Item,
};
use tracing::{error, info};

impl Allocator {
    /// This node is one of those that vote; `before` is its vote from before a restart.
    pub(super) fn stand(&mut self, voters: usize, before: Option<Vote>, now: Now) {
        let blocks = self.layout.whole().last / self.layout.unit() + 1;
        let most = usize::try_from(blocks).unwrap_or(usize::MAX).min(MOST_NAMES);
        let is_new = before.is_none();
        let election = Election::new(self.me.clone(), voters, most, before.unwrap_or_default());
        let mut patience = Patience::default();
        patience.renew(&election, now.at);
        self.election = Some((election, patience));
        if is_new {
            self.cast();
        }
    }

    pub(super) fn on_votes<'a>(&mut self, items: impl Iterator<Item = &'a Item>, now: Now) {
        let mut votes = items.filter_map(|item| Vote::from_item(item).ok());
        let Some((election, patience)) = &mut self.election else {
            // Who does not vote believes what a peer says of the list, as it believes its hello.
            if let Some((_, vote)) = votes.find(|(_, vote)| !vote.decided.is_empty())
                && self.seeds.names().is_empty()
            {
                let seeds: SeedPlan = vote.decided.into_iter().collect();
                self.effects.seeds = Some(seeds.clone());
                self.on_seeds(seeds);
            }
            return;
        };
        let mut news = false;
        for (voter, vote) in votes {
            news |= election.hear(&voter, vote);
        }
        if news {
            patience.renew(election, now.at);
            if election.think() {
                self.cast();
            }
            self.count();
        }
    }

    /// Proposes where nobody else does.
    pub(super) fn vote(&mut self, now: Now) {
        let Some((election, patience)) = &mut self.election else { return };
        if patience.is_over(election, now.at) && election.decided().is_none() {
            election.propose();
            self.cast();
        }
        self.count();
    }

    /// Writes this node's vote down, and says it.
    fn cast(&mut self) {
        if let Some((election, _)) = &self.election {
            let item = election.own().to_item(&self.me, self.ring.sealer());
            self.effects.changes.push(Change::Kept { item: item.clone(), settled: true });
            self.effects.publish.push(item);
        }
    }

    /// Begins with the shares of those who were elected. A node alone has nobody to hear from; another one, which may have lost
    /// its disk, waits for what others know of its share.
    fn count(&mut self) {
        let Some((election, _)) = &mut self.election else { return };
        let (_, quorum) = election.turnout();
        let decided = election.decided().filter(|_| self.has_contact || quorum == 1);
        let Some(names) = decided.map(<[_]>::to_vec) else { return };
        election.declare(&names);
        self.cast();
        let seeds: SeedPlan = names.iter().cloned().collect();
        match Ring::genesis(self.layout, seeds.names()) {
            Ok(tokens) => {
                info!(%seeds, "elected: these nodes share the universe");
                self.election = None;
                self.seeds = seeds.clone();
                self.effects.seeds = Some(seeds.clone());
                self.effects.changes.push(Change::Seeds(seeds));
                let fresh: Vec<_> =
                    tokens.into_iter().filter(|token| self.ring.merge(token.clone()).is_some()).collect();
                self.record(fresh);
                self.open();
            }
            Err(why) => error!(%why, "an election of too many"),
        }
    }
}
