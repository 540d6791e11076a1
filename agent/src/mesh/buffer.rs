//! What one link, or one subject, has yet to be told: keys, not messages.
//!
//! A fact that changes ten times while its reader is slow is told once, in its last state. So a slow link merges and
//! never queues, and what it holds is bounded by the number of keys. Keys leave in the order in which they came.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    gossip::Item,
    replica::{ItemKey, Replica},
};
use std::collections::{BTreeMap, HashMap};

#[derive(Debug, Default)]
pub struct SendBuffer {
    turns: HashMap<ItemKey, u64>,
    queue: BTreeMap<u64, ItemKey>,
    next: u64,
}

impl SendBuffer {
    /// Notes that a key changed; a key that waits already keeps its turn.
    pub fn add(&mut self, key: &ItemKey) {
        if !self.turns.contains_key(key) {
            self.turns.insert(key.clone(), self.next);
            self.queue.insert(self.next, key.clone());
            self.next += 1;
        }
    }

    /// Forgets a key: the reader has its newest item already.
    pub fn remove(&mut self, key: &ItemKey) {
        if let Some(turn) = self.turns.remove(key) {
            self.queue.remove(&turn);
            self.give_back();
        }
    }

    /// Takes the newest items of the keys that wait longest, as long as they stay under `bytes` together; one at least.
    pub fn take(&mut self, replica: &Replica, bytes: usize) -> Vec<Item> {
        let mut items = Vec::new();
        let mut size = 0;
        while let Some(entry) = self.queue.first_entry() {
            if let Some(item) = replica.get(entry.get()) {
                size += item.size();
                if size > bytes && !items.is_empty() {
                    break;
                }
                items.push(item.clone());
            }
            self.turns.remove(&entry.remove());
        }
        self.give_back();
        items
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Keys that wait.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// There are many links, and what a storm took on each is not needed after it.
    fn give_back(&mut self) {
        if self.queue.is_empty() && self.turns.capacity() > 2 * CALM {
            self.turns.shrink_to(CALM);
        }
    }
}

/// Keys that wait at a time when little happens.
const CALM: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::replica::Merged;

    fn item(key: u8, rank: u8) -> Item {
        Item { channel: "x".into(), key: vec![key], rank: vec![rank], body: vec![0; 100], ..Item::default() }
    }

    fn merge(replica: &mut Replica, item: Item) -> ItemKey {
        match replica.merge(item) {
            Ok(Merged::New(key)) => key,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_slow_reader_is_told_the_last_state_once() {
        let (mut replica, mut buffer) = (Replica::new(Vec::new()), SendBuffer::default());
        for rank in 0..10 {
            buffer.add(&merge(&mut replica, item(1, rank)));
        }
        assert_eq!(buffer.len(), 1);
        assert_eq!(buffer.take(&replica, 1000), [item(1, 9)]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn batches_are_bounded_and_in_order_of_arrival() {
        let (mut replica, mut buffer) = (Replica::new(Vec::new()), SendBuffer::default());
        let keys: Vec<_> = [3, 1, 2].map(|key| merge(&mut replica, item(key, 0))).into();
        keys.iter().for_each(|key| buffer.add(key));
        buffer.remove(&keys[1]);
        assert_eq!(buffer.take(&replica, 10), [item(3, 0)], "one at least");
        buffer.add(&keys[0]);
        assert_eq!(buffer.take(&replica, 1000), [item(2, 0), item(3, 0)]);
    }
}
