//! Items by numbers, which are shorter than their channels and keys: what waits on many links is known by them.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::gossip::Item;
use std::{
    ops::{Index, IndexMut},
    sync::Arc,
};

/// The number of a key of a channel in a replica, as long as there is an item of it; then another key may get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ItemId(u32);

pub(super) struct Entry {
    pub item: Arc<Item>,
    /// The item's fingerprint.
    pub hash: u64,
}

#[derive(Default)]
pub(super) struct Slots {
    entries: Vec<Option<Entry>>,
    vacant: Vec<ItemId>,
}

impl ItemId {
    pub const MIN: Self = Self(0);
    pub const MAX: Self = Self(u32::MAX);
}

impl Slots {
    pub fn add(&mut self, entry: Entry) -> ItemId {
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            ItemId(self.entries.len() as u32 - 1)
        });
        self.entries[id.0 as usize] = Some(entry);
        id
    }

    pub fn get(&self, id: ItemId) -> Option<&Entry> {
        self.entries.get(id.0 as usize)?.as_ref()
    }

    pub fn take(&mut self, id: ItemId) -> Option<Entry> {
        let entry = self.entries[id.0 as usize].take()?;
        self.vacant.push(id);
        Some(entry)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut().flatten()
    }
}

impl Index<ItemId> for Slots {
    type Output = Entry;

    fn index(&self, id: ItemId) -> &Entry {
        self.get(id).expect("who has a number has not taken its item")
    }
}

impl IndexMut<ItemId> for Slots {
    fn index_mut(&mut self, id: ItemId) -> &mut Entry {
        self.entries[id.0 as usize].as_mut().expect("who has a number has not taken its item")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_given_again_and_only_when_they_are_free() {
        let entry = |key: u8| Entry { item: Item { key: vec![key], ..Item::default() }.into(), hash: 0 };
        let mut slots = Slots::default();
        let [one, two] = [1, 2].map(|key| slots.add(entry(key)));
        assert_eq!(slots.take(one).map(|entry| entry.item.key.clone()), Some(vec![1]));
        assert!(slots.take(one).is_none() && slots.get(one).is_none());
        assert_eq!((slots.add(entry(3)), slots[two].item.key.as_slice()), (one, &[2][..]));
        assert_ne!(slots.add(entry(4)), one);
    }
}
