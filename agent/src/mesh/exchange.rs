//! Gossip and unicasts over the links.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    gossip::{Item, MAX_BODY, MAX_CHANNEL, Rejected},
    link::{Link, LinkId},
    machine::{FRESH, Mesh, Output},
    peers::{self, PeerRecord},
    replica::{Answer, BUCKETS, Merged},
    routes::{HOP_LIMIT, Routes},
    slots::ItemId,
};
use crate::types::PeerName;
use prost::Message;
use rand::RngExt;
use std::{sync::Arc, time::Instant};
use tracing::warn;
use weft_proto::mesh::{Digest, Items, Summary, Unicast, frame::Body};

impl Mesh {
    pub(super) fn items_frame(&mut self, id: LinkId, frame: Items, now: Instant) {
        for item in frame.items {
            self.counters.items_in += 1;
            self.merge(item.into(), Some(id), now);
        }
        if frame.complete
            && let Some(link) = self.links.get_mut(&id)
        {
            link.told_all();
        }
    }

    /// Takes an item in, from a link or from a subject of this agent, and tells those who don't have it.
    pub(super) fn merge(&mut self, item: Item, from: Option<LinkId>, now: Instant) {
        match self.is_own(&item) {
            true => self.own_item(item, from, now),
            false => self.merge_checked(item, from, now),
        }
    }

    pub(super) fn merge_checked(&mut self, item: Item, from: Option<LinkId>, now: Instant) {
        // Most of what comes is here already.
        if let Some(id) = self.replica.holds(&item) {
            return self.with_link(from, |link| link.buffer.remove(id));
        }
        let item = self.pool.item(item);
        match self.replica.merge(item.clone()) {
            Ok(Merged::New(id)) => {
                self.counters.items_merged += 1;
                self.fresh_until = now + FRESH;
                self.spread(id, from);
                if item.channel == peers::CHANNEL {
                    let record = self.pool.record(&item);
                    self.peer_changed(record, now);
                } else if from.is_some() && self.replica.knows(&item.channel) {
                    self.news.entry(item.channel.clone()).or_default().add(id);
                }
            }
            Ok(Merged::Same(id)) => self.with_link(from, |link| link.buffer.remove(id)),
            Ok(Merged::Older(id)) => self.with_link(from, |link| link.buffer.add(id)),
            Err(rejected) => self.reject(&item.channel, &item.key, rejected, from, now),
        }
    }

    /// Everyone is to be told of an item but the one who told it.
    pub(super) fn spread(&mut self, item: ItemId, from: Option<LinkId>) {
        for (id, link) in self.links.iter_mut().filter(|(_, link)| link.peer.is_some()) {
            match from == Some(*id) {
                true => link.buffer.remove(item),
                false => link.buffer.add(item),
            }
        }
    }

    /// An item is dropped and counted. Who sends what others have not said is named: agents pass on only what they have
    /// checked.
    pub(super) fn reject(
        &mut self,
        channel: &str,
        key: &[u8],
        rejected: Rejected,
        from: Option<LinkId>,
        now: Instant,
    ) {
        *self.counters.items_rejected.entry(rejected.reason()).or_default() += 1;
        let Some(link) = from.and_then(|id| self.links.get(&id)) else { return };
        if let (Rejected::Forged(why), Some(peer)) = (rejected, link.name()) {
            let key: String = match std::str::from_utf8(key) {
                Ok(text) if text.chars().all(|c| c.is_ascii_graphic()) => text.into(),
                _ => key.iter().map(|byte| byte.to_string()).collect::<Vec<_>>().join("."),
            };
            let (who, what) = (format!("peer {peer}"), format!("sent item {key} of {channel}: {why}"));
            if self.refusals.note(&who, &what, now) {
                warn!(%peer, channel, key, why, "a forged item is dropped");
            }
        }
    }

    pub(super) fn with_link(&mut self, id: Option<LinkId>, change: impl FnOnce(&mut Link)) {
        if let Some(link) = id.and_then(|id| self.links.get_mut(&id)) {
            change(link);
        }
    }

    /// Sends a digest over each new link that we called for.
    pub(super) fn begin_exchanges(&mut self) {
        let new: Vec<_> =
            self.links.iter_mut().filter_map(|(id, link)| link.begins().then_some(*id)).collect();
        for id in new {
            let digest = self.replica.digest();
            self.send_calmly(id, Body::Digest(digest));
        }
    }

    /// Sends a digest to a random neighbour; every other time to one that has not told all, if there are such.
    pub(super) fn compare(&mut self) {
        let calm = || self.links.iter().filter(|(_, link)| link.is_calm());
        let told = self.rng.random() || calm().all(|(_, link)| link.synced);
        let calm: Vec<_> = calm().filter(|(_, link)| told || !link.synced).map(|(id, _)| *id).collect();
        if !calm.is_empty() {
            let id = calm[self.rng.random_range(0..calm.len())];
            let digest = self.replica.digest();
            self.send_calmly(id, Body::Digest(digest));
        }
    }

    pub(super) fn digest_frame(
        &mut self,
        id: LinkId,
        digest: &Digest,
        now: Instant,
    ) -> Result<(), &'static str> {
        if !self.links.get_mut(&id).is_some_and(|link| link.may_compare(now)) {
            *self.counters.frames_dropped.entry("too_often").or_default() += 1;
            return Ok(());
        }
        let first = self.rng.random_range(0..BUCKETS);
        let answer = self.replica.answer(digest, first).map_err(|garbage| garbage.0)?;
        if answer != Answer::Alike {
            self.fresh_until = now + FRESH;
        }
        let answer = match answer {
            Answer::Summary(summary) => Body::Summary(summary),
            Answer::Send(items) => {
                self.with_link(Some(id), |link| {
                    items.into_iter().for_each(|item| link.buffer.add(item));
                    link.synced = true;
                    link.tells_all();
                });
                return Ok(());
            }
            Answer::Alike => {
                self.with_link(Some(id), Link::told_all);
                Body::Items(Items { items: Vec::new(), complete: true })
            }
        };
        self.send_calmly(id, answer);
        Ok(())
    }

    pub(super) fn summary_frame(
        &mut self,
        id: LinkId,
        summary: &Summary,
        now: Instant,
    ) -> Result<(), &'static str> {
        let difference = self.replica.compare(summary).map_err(|garbage| garbage.0)?;
        self.fresh_until = now + FRESH;
        self.with_link(Some(id), |link| {
            difference.send.iter().for_each(|item| link.buffer.add(*item));
            if !summary.partial {
                link.tells_all();
                link.synced |=
                    difference.ask.is_none() && summary.channels.iter().all(|c| c.wanted.is_empty());
            }
        });
        if let Some(ask) = difference.ask {
            self.send_calmly(id, Body::Summary(ask));
        }
        Ok(())
    }

    /// A unicast from this agent.
    pub(super) fn unicast(&mut self, to: PeerName, channel: String, body: Vec<u8>) {
        let (source, destination) = (self.greeting.name.to_string(), to.to_string());
        if channel.len() > MAX_CHANNEL || body.len() > MAX_BODY {
            self.drop_unicast("too_long");
            return;
        }
        let unsealed = Unicast { source, destination, channel, body, ..Unicast::default() };
        let seal = self.sealer.as_ref().map(|sealer| sealer.seal(SEALED, &unsealed.encode_to_vec()));
        self.forward(&to, Unicast { hop_limit: HOP_LIMIT, seal, ..unsealed }, None);
    }

    pub(super) fn unicast_frame(&mut self, unicast: Unicast, via: &PeerName) -> Result<(), &'static str> {
        let (Ok(_), Ok(destination)) = (unicast.source.parse::<PeerName>(), unicast.destination.parse())
        else {
            return Err("a unicast without names");
        };
        if unicast.channel.len() > MAX_CHANNEL || unicast.body.len() > MAX_BODY {
            self.drop_unicast("too_long");
            return Ok(());
        }
        let hop_limit = unicast.hop_limit.min(HOP_LIMIT);
        if hop_limit == 0 {
            self.drop_unicast("hop_limit");
            return Ok(());
        }
        self.forward(&destination, Unicast { hop_limit, ..unicast }, Some(via));
        Ok(())
    }

    fn forward(&mut self, to: &PeerName, mut unicast: Unicast, via: Option<&PeerName>) {
        if *to == self.greeting.name {
            match self.is_sealed(&mut unicast) {
                Some(from) => {
                    self.counters.unicasts_delivered += 1;
                    self.output(Output::Unicast { from, channel: unicast.channel, body: unicast.body });
                }
                None => self.drop_unicast("forged"),
            }
            return;
        }
        unicast.hop_limit -= 1;
        if self.routes.is_none() {
            self.routes = Some(Routes::new(&self.peers, self.dialer.linked()));
        }
        let next = self.routes.as_ref().and_then(|routes| routes.next_hop(to));
        let link = next.filter(|next| Some(*next) != via).and_then(|next| {
            let is_next = |(_, link): &(&LinkId, &Link)| link.name() == Some(next);
            self.links.iter().rev().find(is_next).map(|(id, _)| *id)
        });
        match link {
            None => self.drop_unicast("no_route"),
            Some(id) => match self.send(id, Body::Unicast(unicast)) {
                true if via.is_some() => self.counters.unicasts_relayed += 1,
                true => {}
                false => self.drop_unicast("no_room"),
            },
        }
    }

    /// Who has sent it, if that is so.
    fn is_sealed(&mut self, unicast: &mut Unicast) -> Option<PeerName> {
        let from = unicast.source.parse().ok()?;
        let Some(checker) = &mut self.checker else { return Some(from) };
        let seal = unicast.seal.take()?;
        let unsealed = Unicast { hop_limit: 0, ..unicast.clone() };
        let signer = checker.signer(SEALED, &unsealed.encode_to_vec(), &seal).ok()?;
        signer.is(&from).then_some(from)
    }

    fn drop_unicast(&mut self, reason: &'static str) {
        *self.counters.unicasts_dropped.entry(reason).or_default() += 1;
    }

    fn peer_changed(&mut self, record: Arc<PeerRecord>, now: Instant) {
        let is_dead = self.forgotten.get(&record.name).is_some_and(|last| record.incarnation <= *last);
        match record.left || is_dead {
            true => self.dialer.gone(&record.name),
            false => self.dialer.heard(&record.name, now, &mut self.rng),
        }
        if is_dead {
            return;
        }
        self.peers.insert(record);
        self.routes = None;
        self.output(Output::PeersChanged);
    }
}

/// What a unicast is to who seals it.
const SEALED: &str = "unicast";
