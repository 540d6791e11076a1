//! Which addresses of the own ranges are in use: lowest free address first, freed ones rest before they are used again.
//!
//! ```text
//!   own range   |bridge|pod|resting|pod| free ...        |  free blocks ...      |
//!                                                          ▲ carved off from the top for peers that ask
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::span::{Layout, Span};
use crate::types::{AttachmentKey, Mac, PeerName, PodRef};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

/// Who uses an address of this node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    Bridge,
    Pod(AttachmentKey),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub owner: Owner,
    pub address: IpAddr,
    /// Empty for the bridge.
    pub pod: PodRef,
    /// The pod's; all zero for the bridge.
    pub mac: Mac,
    /// Unix time in milliseconds.
    pub reserved_at: u64,
}

/// How the own ranges are used, in addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub owned: u128,
    pub allocated: u128,
    pub resting: u128,
    /// Can be handed out now.
    pub free: u128,
}

#[derive(Debug)]
pub struct Space {
    layout: Layout,
    own: Vec<Span>,
    taken: BTreeMap<u128, Arc<Allocation>>,
    by_owner: BTreeMap<Owner, u128>,
    resting: BTreeMap<u128, Instant>,
    /// Other peers' live pods on addresses that the ring gives to us.
    foreign: BTreeMap<u128, PeerName>,
    /// No own address below is free; lowered whenever one becomes so.
    lowest: u128,
}

impl Space {
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            own: Vec::new(),
            taken: BTreeMap::new(),
            by_owner: BTreeMap::new(),
            resting: BTreeMap::new(),
            foreign: BTreeMap::new(),
            lowest: 0,
        }
    }

    /// Sets the ranges to allocate from; allocations outside of them stay.
    pub fn set_own(&mut self, own: Vec<Span>) {
        self.own = own;
        self.lowest = 0;
    }

    pub fn own(&self) -> &[Span] {
        &self.own
    }

    pub fn set_foreign(&mut self, foreign: BTreeMap<u128, PeerName>) {
        if foreign != self.foreign {
            self.foreign = foreign;
            self.lowest = 0;
        }
    }

    pub fn is_own(&self, offset: u128) -> bool {
        let after = self.own.partition_point(|span| span.first <= offset);
        after > 0 && self.own[after - 1].contains(offset)
    }

    pub fn find(&self, owner: &Owner) -> Option<&Arc<Allocation>> {
        self.taken.get(self.by_owner.get(owner)?)
    }

    pub fn at(&self, offset: u128) -> Option<&Arc<Allocation>> {
        self.taken.get(&offset)
    }

    /// Own addresses that a peer holds and nobody has here.
    pub fn conceded(&self) -> impl Iterator<Item = u128> + '_ {
        self.foreign.keys().copied().filter(|offset| self.is_own(*offset) && self.at(*offset).is_none())
    }

    pub fn foreign(&self, offset: u128) -> Option<&PeerName> {
        self.foreign.get(&offset)
    }

    /// How many pods have an address.
    pub fn pods(&self) -> usize {
        self.by_owner.len() - usize::from(self.by_owner.contains_key(&Owner::Bridge))
    }

    pub fn allocations(&self) -> impl Iterator<Item = (u128, &Arc<Allocation>)> {
        self.taken.iter().map(|(offset, allocation)| (*offset, allocation))
    }

    /// The lowest free own address, within `limits` unless that is empty.
    pub fn lowest_free(&mut self, limits: &[Span]) -> Option<u128> {
        if limits.is_empty() {
            let found = self.lowest_from(self.lowest, None);
            self.lowest = found.unwrap_or(u128::MAX);
            return found;
        }
        limits.iter().filter_map(|limit| self.lowest_from(limit.first, Some(*limit))).min()
    }

    /// Takes an address for an owner that has none. The address need not be an own one: a pod may live on an address
    /// that this node has lost.
    pub fn insert(&mut self, offset: u128, allocation: impl Into<Arc<Allocation>>) {
        let allocation = allocation.into();
        self.resting.remove(&offset);
        self.by_owner.insert(allocation.owner.clone(), offset);
        self.taken.insert(offset, allocation);
    }

    /// Changes what is known about an owner's pod.
    pub fn get_mut(&mut self, owner: &Owner) -> Option<&mut Allocation> {
        self.taken.get_mut(self.by_owner.get(owner)?).map(Arc::make_mut)
    }

    pub fn remove(&mut self, owner: &Owner) -> Option<(u128, Arc<Allocation>)> {
        let offset = self.by_owner.remove(owner)?;
        self.lowest = self.lowest.min(offset);
        Some((offset, self.taken.remove(&offset).expect("an owner's address is taken")))
    }

    /// Keeps a freed address out of use until then.
    pub fn rest(&mut self, offset: u128, until: Instant) {
        self.resting.insert(offset, until);
    }

    /// Ends the rest of what has rested; returns their offsets.
    pub fn wake(&mut self, now: Instant) -> Vec<u128> {
        let rested: Vec<u128> =
            self.resting.extract_if(.., |_, until| *until <= now).map(|(o, _)| o).collect();
        self.lowest = rested.first().map_or(self.lowest, |first| self.lowest.min(*first));
        rested
    }

    pub fn forget_resting(&mut self) -> Vec<u128> {
        std::mem::take(&mut self.resting).into_keys().collect()
    }

    pub fn is_resting(&self, offset: u128) -> bool {
        self.resting.contains_key(&offset)
    }

    pub fn next_wake(&self) -> Option<Instant> {
        self.resting.values().min().copied()
    }

    pub fn resting(&self) -> impl Iterator<Item = u128> {
        self.resting.keys().copied()
    }

    pub fn counts(&self) -> Counts {
        let own = |offset: &&u128| self.is_own(**offset);
        let owned: u128 = self.own.iter().map(|span| span.size()).sum();
        let allocated = self.taken.keys().filter(own).count() as u128;
        let resting = self.resting.keys().filter(own).count() as u128;
        let last = self.layout.whole().last;
        let unusable = [0, last].iter().filter(|o| self.layout.reserved(**o)).filter(own).count() as u128;
        let alone = |offset: &&u128| !self.taken.contains_key(*offset) && !self.resting.contains_key(*offset);
        let usable = |offset: &&u128| !self.layout.reserved(**offset);
        let foreign = self.foreign.keys().filter(own).filter(alone).filter(usable).count() as u128;
        Counts { owned, allocated, resting, free: owned - allocated - resting - unusable - foreign }
    }

    /// Whether an own range has a whole block without any use.
    pub fn has_surplus(&self, range: Span) -> bool {
        !self.free_blocks(range).is_empty()
    }

    /// Whole blocks without any use, in all own ranges.
    pub fn surplus(&self) -> u128 {
        self.own.iter().flat_map(|span| self.free_blocks(*span)).map(|run| run.size()).sum::<u128>()
            / self.layout.unit()
    }

    /// Up to `blocks` free blocks for a peer, as few aligned pieces as can be, from the top. They stay ours till
    /// [`set_own`](Self::set_own) says otherwise.
    pub fn carve(&self, blocks: u128) -> Vec<Span> {
        let unit = self.layout.unit();
        let mut runs: Vec<Span> = self.own.iter().flat_map(|span| self.free_blocks(*span)).collect();
        let (mut left, mut carved) = (blocks, Vec::new());
        let mut size = left.checked_ilog2().map_or(0, |bits| unit << bits);
        while left > 0 && size >= unit && carved.len() < MAX_PIECES {
            // The topmost aligned piece of this size, in the topmost run that holds one.
            let found = runs.iter().enumerate().rev().find_map(|(at, run)| {
                let first = ((run.last + 1) / size).checked_sub(1)? * size;
                (first >= run.first).then_some((at, Span { first, last: first + size - 1 }))
            });
            let Some((at, piece)) = found else {
                size /= 2;
                continue;
            };
            let run = runs.remove(at);
            let rest = [(run.first, piece.first), (piece.last + 1, run.last + 1)];
            let rest = rest.into_iter().filter(|(from, to)| from < to);
            runs.splice(at..at, rest.map(|(from, to)| Span { first: from, last: to - 1 }));
            left -= size / unit;
            carved.push(piece);
            while size > left * unit {
                size /= 2;
            }
        }
        carved
    }

    fn is_free(&self, offset: u128) -> bool {
        !self.in_use(offset) && !self.layout.reserved(offset)
    }

    fn in_use(&self, offset: u128) -> bool {
        self.taken.contains_key(&offset)
            || self.resting.contains_key(&offset)
            || self.foreign.contains_key(&offset)
    }

    fn lowest_from(&self, from: u128, limit: Option<Span>) -> Option<u128> {
        let limit = limit.unwrap_or(self.layout.whole());
        let parts = self.own.iter().filter_map(|span| span.intersect(limit));
        // At most one step more than there are addresses in use.
        parts.filter(|part| part.last >= from).find_map(|part| {
            let mut offsets = part.first.max(from)..=part.last;
            offsets.find(|offset| self.is_free(*offset))
        })
    }

    /// The runs of whole blocks without any use in a range.
    pub fn free_blocks(&self, range: Span) -> Vec<Span> {
        let unit = self.layout.unit();
        let offsets = range.first..=range.last;
        let used = self.taken.range(offsets.clone()).map(|(offset, _)| offset);
        let used = used.chain(self.resting.range(offsets.clone()).map(|(offset, _)| offset));
        let used = used.chain(self.foreign.range(offsets).map(|(offset, _)| offset)).copied();
        // A block of one address that no pod gets is of no use to a peer.
        let ends = [range.first, range.last].into_iter();
        let ends = ends.filter(|offset| unit == 1 && self.layout.reserved(*offset));
        let used: BTreeSet<u128> = used.chain(ends).map(|offset| offset / unit).collect();

        let (first, end) = (range.first.div_ceil(unit), (range.last + 1) / unit);
        let mut runs = Vec::new();
        let mut from = first;
        for stop in used.into_iter().chain([end]) {
            if from < stop.min(end) {
                runs.push(Span { first: from * unit, last: stop.min(end) * unit - 1 });
            }
            from = from.max(stop + 1);
        }
        runs
    }
}

/// A grant is a few CIDRs: each is a route on every node.
const MAX_PIECES: usize = 4;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn pod(n: u128) -> Owner {
        Owner::Pod(AttachmentKey::new(&format!("c{n}"), "eth0").unwrap())
    }

    fn space(universe: &str, own: &[(u128, u128)]) -> Space {
        let mut space = Space::new(Layout::new(universe.parse().unwrap()));
        space.set_own(own.iter().map(|(first, last)| Span { first: *first, last: *last }).collect());
        space
    }

    fn take(space: &mut Space, offset: u128) {
        let address = space.layout.address(offset);
        let (pod, mac) = (PodRef::default(), Mac::default());
        let owner = super::tests::pod(offset);
        space.insert(offset, Allocation { owner, address, pod, mac, reserved_at: 0 });
    }

    #[test]
    fn the_lowest_free_address_is_taken_first_and_never_a_reserved_one() {
        let mut space = space("10.32.0.0/29", &[(0, 2), (6, 7)]);
        for expected in [Some(1), Some(2), Some(6), None] {
            let found = space.lowest_free(&[]);
            assert_eq!(found, expected);
            if let Some(offset) = found {
                take(&mut space, offset);
            }
        }
        assert_eq!(space.counts(), Counts { owned: 5, allocated: 3, resting: 0, free: 0 });
        space.remove(&pod(2)).unwrap();
        assert_eq!(space.lowest_free(&[]), Some(2));
    }

    #[test]
    fn a_freed_address_rests() {
        let now = Instant::now();
        let mut space = space("10.32.0.0/29", &[(0, 3)]);
        take(&mut space, 1);
        space.remove(&pod(1)).unwrap();
        space.rest(1, now + Duration::from_secs(30));
        assert_eq!(space.lowest_free(&[]), Some(2));
        assert_eq!(space.next_wake(), Some(now + Duration::from_secs(30)));
        assert!(space.wake(now + Duration::from_secs(29)).is_empty());
        assert_eq!(space.wake(now + Duration::from_secs(30)), [1]);
        assert_eq!(space.lowest_free(&[]), Some(1));
    }

    #[test]
    fn limits_and_foreign_addresses_are_kept() {
        let mut space = space("10.32.0.0/16", &[(256, 1023)]);
        assert_eq!(space.lowest_free(&[Span { first: 600, last: 700 }]), Some(600));
        assert_eq!(space.lowest_free(&[Span { first: 0, last: 255 }]), None);
        space.set_foreign([(256, "b".parse().unwrap())].into());
        assert_eq!(space.lowest_free(&[]), Some(257));
        assert_eq!(space.surplus(), 2);
    }

    #[test]
    fn a_peer_that_claims_to_hold_what_nobody_can_have_costs_no_address() {
        let mut space = space("10.32.0.0/29", &[(0, 7)]);
        space.set_foreign([0, 1, 7].map(|offset| (offset, "b".parse().unwrap())).into());
        (1..=6).for_each(|offset| take(&mut space, offset));
        assert_eq!(space.counts(), Counts { owned: 8, allocated: 6, resting: 0, free: 0 });
    }

    #[test]
    fn the_upper_half_is_carved_off_in_aligned_blocks() {
        let mut space = space("10.32.0.0/12", &[(0, (1 << 20) - 1)]);
        take(&mut space, 1);
        assert_eq!(space.surplus(), 4095);
        assert_eq!(space.carve(2048), [Span { first: 1 << 19, last: (1 << 20) - 1 }]);
        let blocks: Vec<u128> = space.carve(6).iter().map(|span| span.size() / 256).collect();
        assert_eq!(blocks, [4, 2]);
        assert_eq!(space.carve(1), [Span { first: 4095 * 256, last: (1 << 20) - 1 }]);
        assert!(space.carve(0).is_empty());
    }

    proptest! {
        #[test]
        fn what_is_carved_is_whole_free_and_not_more_than_asked(
            used in prop::collection::btree_set(0u128..4096, 0..40), first in 0u128..8, blocks in 0u128..32,
        ) {
            let mut space = space("10.32.0.0/16", &[(first * 256, 3071), (3328, 4095)]);
            for offset in &used {
                take(&mut space, *offset);
            }
            let carved = space.carve(blocks);
            let size: u128 = carved.iter().map(|span| span.size()).sum();
            prop_assert!(size <= blocks * 256);
            prop_assert!(size > 0 || blocks == 0 || space.surplus() == 0);
            for span in &carved {
                prop_assert!(span.aligned().count() == 1 && span.size() % 256 == 0);
                prop_assert!(space.own.iter().any(|own| own.intersect(*span) == Some(*span)));
                prop_assert!(used.range(span.first..=span.last).next().is_none());
            }
            for (n, a) in carved.iter().enumerate() {
                prop_assert!(carved[n + 1..].iter().all(|b| a.intersect(*b).is_none()));
            }
        }
    }
}
