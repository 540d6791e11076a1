//! What one link, or one subject, has yet to be told: numbers of items, not messages.
//!
//! A fact that changes ten times while its reader is slow is told once, in its last state. So a slow link merges and
//! never queues, and what it holds is bounded by the number of items. They leave in the order in which they came.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{gossip::Item, replica::Replica, slots::ItemId};
use std::collections::{HashMap, VecDeque};

#[derive(Debug, Default)]
pub struct SendBuffer {
    queue: VecDeque<ItemId>,
    /// Of those in the queue, whether they are still to be told.
    wanted: HashMap<ItemId, bool>,
    waiting: usize,
}

impl SendBuffer {
    /// Notes that an item changed; one that waits already keeps its turn.
    pub fn add(&mut self, item: ItemId) {
        let wanted = self.wanted.entry(item).or_insert_with(|| {
            self.queue.push_back(item);
            false
        });
        self.waiting += usize::from(!*wanted);
        *wanted = true;
    }

    /// Forgets an item: the reader has its newest state already.
    pub fn remove(&mut self, item: ItemId) {
        if let Some(wanted) = self.wanted.get_mut(&item) {
            self.waiting -= usize::from(*wanted);
            *wanted = false;
            self.give_back();
        }
    }

    /// Takes the newest state of the items that wait longest, as long as they stay under `bytes` together; one at least.
    pub fn take(&mut self, replica: &Replica, bytes: usize) -> Vec<Item> {
        let mut items = Vec::new();
        let mut size = 0;
        while let Some(id) = self.queue.front() {
            let wanted = self.wanted[id];
            if wanted && let Some(item) = replica.get(*id) {
                size += item.size();
                if size > bytes && !items.is_empty() {
                    break;
                }
                items.push(item.clone());
            }
            self.waiting -= usize::from(wanted);
            self.wanted.remove(id);
            self.queue.pop_front();
        }
        self.give_back();
        items
    }

    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Items that wait.
    pub fn len(&self) -> usize {
        self.waiting
    }

    /// There are many links, and what a storm took on each is not needed after it.
    fn give_back(&mut self) {
        if self.is_empty() {
            self.queue.clear();
            self.wanted.clear();
            if self.queue.capacity() > 2 * CALM {
                self.queue.shrink_to(CALM);
                self.wanted.shrink_to(CALM);
            }
        }
    }
}

/// Items that wait at a time when little happens.
const CALM: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::replica::Merged;

    fn item(key: u8, rank: u8) -> Item {
        Item { channel: "x".into(), key: vec![key], rank: vec![rank], body: vec![0; 100], ..Item::default() }
    }

    fn merge(replica: &mut Replica, item: Item) -> ItemId {
        match replica.merge(item) {
            Ok(Merged::New(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_slow_reader_is_told_the_last_state_once() {
        let (mut replica, mut buffer) = (Replica::new(Vec::new()), SendBuffer::default());
        for rank in 0..10 {
            buffer.add(merge(&mut replica, item(1, rank)));
        }
        assert_eq!(buffer.len(), 1);
        assert_eq!(buffer.take(&replica, 1000), [item(1, 9)]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn batches_are_bounded_and_in_order_of_arrival() {
        let (mut replica, mut buffer) = (Replica::new(Vec::new()), SendBuffer::default());
        let ids = [3, 1, 2].map(|key| merge(&mut replica, item(key, 0)));
        ids.into_iter().for_each(|id| buffer.add(id));
        buffer.remove(ids[1]);
        assert_eq!(buffer.take(&replica, 10), [item(3, 0)], "one at least");
        buffer.add(ids[0]);
        assert_eq!(buffer.take(&replica, 1000), [item(2, 0), item(3, 0)]);
    }

    #[test]
    fn what_is_wanted_again_before_its_turn_keeps_it() {
        let (mut replica, mut buffer) = (Replica::new(Vec::new()), SendBuffer::default());
        let ids = [1, 2].map(|key| merge(&mut replica, item(key, 0)));
        ids.into_iter().for_each(|id| buffer.add(id));
        buffer.remove(ids[0]);
        assert_eq!(buffer.len(), 1);
        buffer.add(ids[0]);
        assert_eq!(buffer.take(&replica, 1000), [item(1, 0), item(2, 0)]);
        assert!(buffer.is_empty());
    }
}
