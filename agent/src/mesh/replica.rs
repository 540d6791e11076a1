//! The replicated map: merge, and the comparison of two replicas by digests.
//!
//! ```text
//!   a ──Digest: 64 bucket hashes per channel──▶ b
//!   a ◀──Summary: (key, rank, hash) of b's items in the buckets that differ── b
//!   a ──Items: what is newer here, Summary: keys wanted──▶ b
//!   a ◀──Items: what was wanted── b
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    gossip::{self, Gossiper, Item, Rejected},
    slots::{Entry, ItemId, Slots},
};
use crate::types::PeerName;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use weft_proto::mesh as wire;

/// Everything gossiped, as far as this agent knows it.
pub struct Replica {
    gossipers: Gossipers,
    channels: BTreeMap<Arc<str>, Channel>,
    slots: Slots,
}

type Gossipers = BTreeMap<&'static str, Box<dyn Gossiper>>;

/// What became of an item that is not rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// It is the newest now.
    New(ItemId),
    /// It was here already.
    Same(ItemId),
    /// What is here beats it.
    Older(ItemId),
}

/// What a digest told.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// Nothing differs.
    Alike,
    /// Where the other side differs, it has nothing at all: it lacks these.
    Send(Vec<ItemId>),
    /// What is here, where it has something else.
    Summary(wire::Summary),
}

/// What a summary told: which items the other side lacks, and which it should send.
#[derive(Debug, Default, PartialEq)]
pub struct Difference {
    pub send: Vec<ItemId>,
    pub ask: Option<wire::Summary>,
}

/// A frame that no agent of any version sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Garbage(pub &'static str);

#[derive(Default)]
struct Channel {
    /// With the hashes of their keys, in that order: keys are long and alike.
    items: BTreeSet<(u64, ItemId)>,
    buckets: Buckets,
    bytes: usize,
    /// Rank and key of the items that are farewells.
    farewells: BTreeSet<(Vec<u8>, Vec<u8>)>,
}

struct Buckets([u64; BUCKETS]);

impl Replica {
    pub fn new(gossipers: Vec<Box<dyn Gossiper>>) -> Self {
        Self {
            gossipers: gossipers.into_iter().map(|gossiper| (gossiper.channel(), gossiper)).collect(),
            channels: BTreeMap::new(),
            slots: Slots::default(),
        }
    }

    /// The seeds are known now.
    pub fn seeds(&mut self, seeds: &[PeerName]) {
        self.gossipers.values_mut().for_each(|gossiper| gossiper.seeds(seeds));
    }

    /// Whether an item might enter.
    ///
    /// # Errors
    /// As [`Replica::merge`], but for room.
    pub fn check(&mut self, item: &Item) -> Result<(), Rejected> {
        item.check_bounds()?;
        judge(&mut self.gossipers, item).map(drop)
    }

    /// Takes an item in if it is newer than what is here.
    ///
    /// # Errors
    /// The item is malformed, or there is no room for it.
    pub fn merge(&mut self, item: impl Into<Arc<Item>>) -> Result<Merged, Rejected> {
        let item = item.into();
        item.check_bounds()?;
        if let Some(id) = self.find(&item.channel, &item.key) {
            let held = &self.slots[id].item;
            if *held == item {
                return Ok(Merged::Same(id));
            }
            if held.beats(&item) {
                return Ok(Merged::Older(id));
            }
            let held = held.size();
            let farewell = judge(&mut self.gossipers, &item)?;
            self.room_for(&item, held, false)?;
            let channel = self.channels.get_mut(item.channel.as_str()).expect("it was looked up");
            return Ok(Merged::New(channel.put(item, farewell, &mut self.slots)));
        }
        let farewell = judge(&mut self.gossipers, &item)?;
        self.room_for(&item, 0, true)?;
        let channel = self.channels.entry(item.channel.as_str().into()).or_default();
        if farewell && channel.has_forgotten(&item) {
            return Err(Rejected::Full);
        }
        Ok(Merged::New(channel.put(item, farewell, &mut self.slots)))
    }

    /// The number of an item that is here as it is.
    pub fn holds(&self, item: &Item) -> Option<ItemId> {
        self.find(&item.channel, &item.key).filter(|id| *self.slots[*id].item == *item)
    }

    pub fn find(&self, channel: &str, key: &[u8]) -> Option<ItemId> {
        self.channels.get(channel)?.find(key, &self.slots)
    }

    pub fn get(&self, id: ItemId) -> Option<&Item> {
        self.slots.get(id).map(|entry| &*entry.item)
    }

    /// Whether a subject of this agent checks the items of a channel.
    pub fn knows(&self, channel: &str) -> bool {
        self.gossipers.contains_key(channel)
    }

    pub fn items(&self) -> impl Iterator<Item = &Item> + '_ {
        self.channels.values().flat_map(|held| held.items.iter().map(|(_, id)| &*self.slots[*id].item))
    }

    pub(super) fn entries(&mut self) -> impl Iterator<Item = &mut Arc<Item>> {
        self.slots.iter_mut().map(|entry| &mut entry.item)
    }

    /// One hash for each bucket of keys of each channel.
    pub fn digest(&self) -> wire::Digest {
        let channel = |(name, held): (&Arc<str>, &Channel)| wire::digest::Channel {
            channel: name.to_string(),
            buckets: held.buckets.0.to_vec(),
        };
        wire::Digest { channels: self.channels.iter().map(channel).collect() }
    }

    /// Answers a digest with what is here in the buckets that differ, about `MAX_SUMMARY` bytes of them, beginning
    /// with bucket `first`.
    ///
    /// # Errors
    /// The digest is not one of this protocol.
    pub fn answer(&self, theirs: &wire::Digest, first: usize) -> Result<Answer, Garbage> {
        if theirs.channels.len() > MAX_CHANNELS {
            return Err(Garbage("a digest of too many channels"));
        }
        let mut hashes = BTreeMap::new();
        for channel in &theirs.channels {
            if channel.buckets.len() != BUCKETS || channel.channel.len() > gossip::MAX_CHANNEL {
                return Err(Garbage("a digest of another shape"));
            }
            hashes.insert(channel.channel.as_str(), channel.buckets.as_slice());
        }
        let (none, mut room) = (Buckets::default(), MAX_SUMMARY);
        let names: BTreeSet<&str> =
            self.channels.keys().map(|name| &**name).chain(hashes.keys().copied()).collect();
        let buckets =
            |name: &str| (self.channels.get(name).map_or(&none, |held| &held.buckets).0, hashes.get(name));
        let differing = names.iter().filter(|name| {
            let (here, there) = buckets(name);
            there.map_or(here != none.0, |there| here != **there)
        });
        let differing: Vec<_> = differing.copied().collect();
        let has_none =
            |name: &&str| hashes.get(name).is_none_or(|buckets| buckets.iter().all(|hash| *hash == 0));
        if !differing.is_empty() && differing.iter().all(has_none) {
            let lacking = differing.iter().filter_map(|name| self.channels.get(*name));
            return Ok(Answer::Send(lacking.flat_map(|held| &held.items).map(|(_, id)| *id).collect()));
        }
        let (mut channels, mut partial) = (Vec::new(), false);
        for name in differing {
            let ours = self.channels.get(name);
            let here = ours.map_or(&none, |held| &held.buckets);
            let there = hashes.get(name).copied().unwrap_or(&none.0);
            let differ = |bucket: &usize| here.0[*bucket] != there[*bucket];
            let mut entries = vec![Vec::new(); BUCKETS];
            for (key, id) in ours.iter().flat_map(|held| &held.items).filter(|(key, _)| differ(&bucket(*key)))
            {
                let Entry { item, hash } = &self.slots[*id];
                let (name, rank) = (item.key.clone(), item.rank.clone());
                entries[bucket(*key)].push(wire::summary::Entry { key: name, rank, hash: *hash });
            }
            let mut summary = wire::summary::Channel { channel: name.into(), ..Default::default() };
            for bucket in (first..first + BUCKETS).map(|bucket| bucket % BUCKETS).filter(differ) {
                if room == 0 {
                    partial = true;
                    break;
                }
                let bytes: usize =
                    entries[bucket].iter().map(|entry| entry.key.len() + entry.rank.len() + 16).sum();
                room = room.saturating_sub(bytes);
                summary.buckets.push(bucket as u32);
                summary.entries.append(&mut entries[bucket]);
            }
            if !summary.buckets.is_empty() {
                channels.push(summary);
            }
        }
        Ok(match channels.is_empty() {
            true => Answer::Alike,
            false => Answer::Summary(wire::Summary { channels, partial }),
        })
    }

    /// Compares a summary with what is here.
    ///
    /// # Errors
    /// The summary is not one of this protocol.
    pub fn compare(&self, theirs: &wire::Summary) -> Result<Difference, Garbage> {
        if theirs.channels.len() > MAX_CHANNELS {
            return Err(Garbage("a summary of too many channels"));
        }
        let mut difference = Difference::default();
        let mut ask = Vec::new();
        for channel in &theirs.channels {
            if channel.channel.len() > gossip::MAX_CHANNEL
                || channel.buckets.iter().any(|b| *b >= BUCKETS as u32)
            {
                return Err(Garbage("a summary of another shape"));
            }
            let ours = self.channels.get(channel.channel.as_str());
            let find = |key: &[u8]| ours.and_then(|held| held.find(key, &self.slots));
            let mut wanted = Vec::new();
            let mut told = BTreeSet::new();
            for entry in &channel.entries {
                told.insert(entry.key.as_slice());
                let Some(id) = find(&entry.key) else {
                    wanted.push(entry.key.clone());
                    continue;
                };
                let here = &self.slots[id];
                if here.hash == entry.hash {
                    continue;
                }
                if here.item.rank >= entry.rank {
                    difference.send.push(id);
                }
                if here.item.rank <= entry.rank {
                    wanted.push(entry.key.clone());
                }
            }
            let buckets: BTreeSet<_> = channel.buckets.iter().map(|bucket| *bucket as usize).collect();
            for (key, id) in ours.iter().flat_map(|held| &held.items) {
                if buckets.contains(&bucket(*key)) && !told.contains(self.slots[*id].item.key.as_slice()) {
                    difference.send.push(*id);
                }
            }
            difference.send.extend(channel.wanted.iter().filter_map(|key| find(key)));
            if !wanted.is_empty() {
                ask.push(wire::summary::Channel {
                    channel: channel.channel.clone(),
                    wanted,
                    ..Default::default()
                });
            }
        }
        difference.ask =
            (!ask.is_empty()).then_some(wire::Summary { channels: ask, partial: theirs.partial });
        Ok(difference)
    }

    /// Known channels have a bound each, the unknown ones have one together.
    fn room_for(&self, item: &Item, replaced: usize, added: bool) -> Result<(), Rejected> {
        let known = self.gossipers.contains_key(item.channel.as_str());
        let here = self.channels.get(item.channel.as_str());
        let alike = self.channels.iter().filter(|(name, _)| match known {
            true => ***name == *item.channel,
            false => !self.gossipers.contains_key(&***name),
        });
        let (items, bytes) = alike.fold((0, 0), |(n, b), (_, held)| (n + held.items.len(), b + held.bytes));
        let (max_items, max_bytes) = match known {
            true => (MAX_ITEMS, MAX_BYTES),
            false => (MAX_UNKNOWN_ITEMS, MAX_UNKNOWN_BYTES),
        };
        let fits = items + usize::from(added) <= max_items
            && bytes + item.size() - replaced.min(bytes) <= max_bytes
            && (known || here.is_some() || self.channels.len() < MAX_CHANNELS - self.gossipers.len());
        fits.then_some(()).ok_or(Rejected::Full)
    }
}

/// Whether an item may enter, and then whether it is a farewell.
fn judge(gossipers: &mut Gossipers, item: &Item) -> Result<bool, Rejected> {
    let Some(gossiper) = gossipers.get_mut(item.channel.as_str()) else { return Ok(false) };
    gossiper.check(item)?;
    Ok(gossiper.is_farewell(item))
}

impl Channel {
    /// Takes an item in; of the farewells, but this one, the lowest goes where they are too many.
    fn put(&mut self, item: Arc<Item>, farewell: bool, slots: &mut Slots) -> ItemId {
        let known = self.find(&item.key, slots);
        if let Some(id) = known {
            self.uncount(&slots[id]);
        }
        if farewell {
            if self.farewells.len() >= MAX_FAREWELLS
                && let Some((_, lowest)) = self.farewells.pop_first()
            {
                self.remove(&lowest, slots);
            }
            self.farewells.insert((item.rank.clone(), item.key.clone()));
        }
        let (key, hash) = (gossip::hash(&item.key), item.fingerprint());
        self.bytes += item.size();
        self.buckets.0[bucket(key)] ^= hash;
        let entry = Entry { item, hash };
        if let Some(id) = known {
            slots[id] = entry;
            return id;
        }
        let id = slots.add(entry);
        self.items.insert((key, id));
        id
    }

    fn remove(&mut self, key: &[u8], slots: &mut Slots) {
        let Some(id) = self.find(key, slots) else { return };
        self.items.remove(&(gossip::hash(key), id));
        if let Some(entry) = slots.take(id) {
            self.uncount(&entry);
        }
    }

    fn uncount(&mut self, Entry { item, hash }: &Entry) {
        self.bytes -= item.size();
        self.buckets.0[bucket(gossip::hash(&item.key))] ^= hash;
        self.farewells.remove(&(item.rank.clone(), item.key.clone()));
    }

    fn find(&self, key: &[u8], slots: &Slots) -> Option<ItemId> {
        let hash = gossip::hash(key);
        let mut alike = self.items.range((hash, ItemId::MIN)..=(hash, ItemId::MAX));
        alike.find(|(_, id)| slots[*id].item.key == key).map(|(_, id)| *id)
    }

    /// A farewell below all that are here, where they are as many as may be.
    fn has_forgotten(&self, farewell: &Item) -> bool {
        let lowest = self.farewells.first().filter(|_| self.farewells.len() >= MAX_FAREWELLS);
        lowest.is_some_and(|(rank, key)| (&farewell.rank, &farewell.key) < (rank, key))
    }
}

/// Of a key, by its hash.
fn bucket(hash: u64) -> usize {
    (hash % BUCKETS as u64) as usize
}

impl Default for Buckets {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

/// Buckets of keys of a channel in a digest.
pub const BUCKETS: usize = 64;
/// Channels, known and unknown together.
const MAX_CHANNELS: usize = 64;
/// Items of a known channel: some times the peers and ranges of the largest network.
const MAX_ITEMS: usize = 1 << 16;
/// Farewells of a channel. Whoever was cut off while more peers than that left brings the first of them back.
const MAX_FAREWELLS: usize = 4096;
/// Bytes of a known channel's items.
const MAX_BYTES: usize = 64 << 20;
/// Items of all unknown channels together.
const MAX_UNKNOWN_ITEMS: usize = 4096;
/// Bytes of all unknown channels' items together.
const MAX_UNKNOWN_BYTES: usize = 8 << 20;
/// Bytes of keys and ranks in one summary, not counting the end of its last bucket; what differs beyond is compared in
/// the next round.
const MAX_SUMMARY: usize = 512 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use prost::Message;

    struct Even;

    impl Gossiper for Even {
        fn channel(&self) -> &'static str {
            "even"
        }

        fn check(&mut self, item: &Item) -> Result<(), Rejected> {
            item.body.len().is_multiple_of(2).then_some(()).ok_or(Rejected::Undecodable)
        }

        fn is_farewell(&self, item: &Item) -> bool {
            item.body == b"adieu!"
        }
    }

    fn replica(items: &[Item]) -> Replica {
        let mut replica = Replica::new(vec![Box::new(Even)]);
        for item in items {
            let _ = replica.merge(item.clone());
        }
        replica
    }

    fn contents(replica: &Replica) -> Vec<Item> {
        replica.items().cloned().collect()
    }

    /// Runs the exchange that `from` begins with a digest; returns whether anything differed.
    fn exchange(from: &mut Replica, to: &mut Replica, first: usize) -> bool {
        let (send, summary) = match to.answer(&from.digest(), first).unwrap() {
            Answer::Alike => return false,
            Answer::Send(keys) => (keys, wire::Summary::default()),
            Answer::Summary(summary) => (Vec::new(), summary),
        };
        let there = from.compare(&summary).unwrap();
        let asked = to.compare(&there.ask.unwrap_or_default()).unwrap();
        assert_eq!(asked.ask, None);
        let to_send: Vec<_> = there.send.iter().filter_map(|id| from.get(*id).cloned()).collect();
        let to_return: Vec<_> =
            asked.send.iter().chain(&send).filter_map(|id| to.get(*id).cloned()).collect();
        to_send.into_iter().for_each(|item| _ = to.merge(item));
        to_return.into_iter().for_each(|item| _ = from.merge(item));
        true
    }

    fn any_item() -> impl Strategy<Value = Item> {
        let fields =
            (0..3usize, vec(0..6u8, 1..3), vec(0..3u8, 0..3), vec(any::<u8>(), 0..4), vec(0..2u8, 0..2));
        fields.prop_map(|(channel, key, rank, body, signature)| Item {
            channel: ["even", "peers", "names"][channel].into(),
            key,
            rank,
            body,
            signature,
        })
    }

    proptest! {
        #[test]
        fn merge_is_a_join(items in vec(any_item(), 0..40), seed in any::<u64>()) {
            let once = replica(&items);
            let mut shuffled = items.clone();
            let key = |item: &Item| item.fingerprint().wrapping_mul(seed | 1);
            shuffled.sort_by_key(key);
            prop_assert_eq!(contents(&once), contents(&replica(&shuffled)), "commutative");
            shuffled.extend(items.clone());
            prop_assert_eq!(contents(&once), contents(&replica(&shuffled)), "idempotent");
            let (left, right) = items.split_at(items.len() / 2);
            let mut joined = replica(left);
            contents(&replica(right)).into_iter().for_each(|item| _ = joined.merge(item));
            prop_assert_eq!(contents(&once), contents(&joined), "associative");
        }

        #[test]
        fn digests_make_any_two_replicas_equal(a in vec(any_item(), 0..40), b in vec(any_item(), 0..40), first in 0..BUCKETS) {
            let (mut a, mut b) = (replica(&a), replica(&b));
            exchange(&mut a, &mut b, first);
            prop_assert_eq!(contents(&a), contents(&b));
            prop_assert_eq!(a.digest(), b.digest());
            prop_assert!(!exchange(&mut a, &mut b, first));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..200), items in vec(any_item(), 0..10)) {
            let mut replica = replica(&items);
            if let Ok(frame) = wire::Frame::decode(bytes.as_slice()) {
                drop(frame);
            }
            if let Ok(digest) = wire::Digest::decode(bytes.as_slice()) {
                let _ = replica.answer(&digest, 0);
            }
            if let Ok(summary) = wire::Summary::decode(bytes.as_slice()) {
                let _ = replica.compare(&summary);
            }
            if let Ok(item) = wire::Item::decode(bytes.as_slice()) {
                prop_assert_eq!(Item::from(wire::Item::from(Item::from(item.clone()))), Item::from(item.clone()));
                let _ = replica.merge(Item::from(item));
            }
        }
    }

    #[test]
    fn what_its_subject_rejects_does_not_enter() {
        let odd = Item { channel: "even".into(), body: vec![1], ..Item::default() };
        assert_eq!(replica(&[]).merge(odd), Err(Rejected::Undecodable));
    }

    #[test]
    fn of_the_farewells_the_last_are_kept() {
        let farewell = |n: u32| Item {
            channel: "even".into(),
            key: n.to_be_bytes().into(),
            rank: n.to_be_bytes().into(),
            body: b"adieu!".into(),
            ..Item::default()
        };
        let here = Item { body: b"here".into(), rank: vec![], ..farewell(2) };
        let last = MAX_FAREWELLS as u32 + 2;
        let upwards: Vec<_> = [here.clone()].into_iter().chain((0..last).map(farewell)).collect();
        let downwards: Vec<_> = upwards.iter().rev().cloned().collect();
        let (one, two) = (replica(&upwards), replica(&downwards));
        assert_eq!(contents(&one), contents(&two));
        assert_eq!(one.digest(), two.digest());
        assert_eq!(one.items().count(), MAX_FAREWELLS);
        let get = |replica: &Replica, n: u32| {
            replica.find("even", &n.to_be_bytes()).and_then(|id| replica.get(id)).cloned()
        };
        assert_eq!((get(&one, 1), get(&one, 2)), (None, Some(farewell(2))));

        let mut replica = one;
        assert_eq!(replica.merge(farewell(1)), Err(Rejected::Full));
        let returned = Item { rank: vec![255], ..here };
        assert!(matches!(replica.merge(returned), Ok(Merged::New(_))));
        assert!(matches!(replica.merge(farewell(1)), Ok(Merged::New(_))), "there is room again");
    }

    #[test]
    fn unknown_channels_are_bounded_together() {
        let mut replica = replica(&[]);
        let item = |channel: u8, n: u32| Item {
            channel: format!("unknown-{channel}"),
            key: n.to_be_bytes().into(),
            ..Item::default()
        };
        let taken =
            (0..MAX_UNKNOWN_ITEMS as u32 + 100).filter(|n| replica.merge(item(*n as u8 % 8, *n)).is_ok());
        assert_eq!(taken.count(), MAX_UNKNOWN_ITEMS);
        let newer = Item { rank: vec![1], ..item(0, 0) };
        assert!(matches!(replica.merge(newer), Ok(Merged::New(_))), "a change of what is here needs no room");
        let known = Item { channel: "even".into(), ..Item::default() };
        assert!(replica.merge(known).is_ok());

        let mut channels = super::tests::replica(&[]);
        let taken = (0..200u8).filter(|n| channels.merge(item(*n, 0)).is_ok());
        assert_eq!(taken.count(), MAX_CHANNELS - 1);
        assert_eq!(channels.digest().channels.len(), MAX_CHANNELS - 1);
    }

    #[test]
    fn a_digest_of_another_shape_is_garbage() {
        let channel = wire::digest::Channel { channel: "even".into(), buckets: vec![0; 3] };
        assert!(replica(&[]).answer(&wire::Digest { channels: vec![channel] }, 0).is_err());
        let channel = wire::summary::Channel { buckets: vec![64], ..Default::default() };
        assert!(replica(&[]).compare(&wire::Summary { channels: vec![channel], partial: false }).is_err());
    }
}
