//! What the agents of one process know alike, held once: a simulated network would know each fact as often as it has nodes.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{gossip::Item, machine::Mesh, peers::PeerRecord};
use crate::types::{Incarnation, PeerName};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

#[derive(Debug, Default)]
pub struct Pool {
    items: HashSet<Arc<Item>>,
    records: HashMap<(PeerName, Incarnation, u64), Arc<PeerRecord>>,
    /// So many were in use when it was last looked.
    in_use: usize,
}

impl Mesh {
    /// Has in common with others what they know as well. It behaves as before.
    pub fn share(&mut self, pool: &mut Pool) {
        self.replica.entries().filter(is_alone).for_each(|item| pool.share_item(item));
        self.peers.entries().filter(is_alone).for_each(|record| pool.share_record(record));
        pool.tidy();
    }

    /// Has its own copy of everything again.
    pub fn unshare(&mut self) {
        for item in self.replica.entries() {
            *item = Arc::new((**item).clone());
        }
        for record in self.peers.entries() {
            let copy = PeerRecord::from_item(&record.to_item());
            *record = Arc::new(copy.expect("what is written can be read"));
        }
    }
}

impl Pool {
    fn share_item(&mut self, item: &mut Arc<Item>) {
        match self.items.get(item) {
            Some(shared) => *item = shared.clone(),
            None => _ = self.items.insert(item.clone()),
        }
    }

    fn share_record(&mut self, record: &mut Arc<PeerRecord>) {
        let rank = (record.name.clone(), record.incarnation, record.version);
        let shared = self.records.entry(rank).or_insert_with(|| record.clone());
        if shared == record {
            *record = shared.clone();
        }
    }

    /// Forgets what nobody knows any more.
    fn tidy(&mut self) {
        if self.items.len() + self.records.len() > 2 * self.in_use {
            self.items.retain(|item| Arc::strong_count(item) > 1);
            self.records.retain(|_, record| Arc::strong_count(record) > 1);
            self.in_use = self.items.len() + self.records.len();
        }
    }
}

fn is_alone<T>(held: &&mut Arc<T>) -> bool {
    Arc::strong_count(held) == 1
}
