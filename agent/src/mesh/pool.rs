//! Where what an agent knows is kept: by itself, or in common with the other agents of its process, as a simulated network
//! has them. There each fact would be held as often as there are nodes.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{gossip::Item, machine::Mesh, peers::PeerRecord};
use std::sync::Arc;

pub trait Pool: Send {
    /// The item itself, or one just like it that is here already.
    fn item(&mut self, item: Item) -> Arc<Item>;
    /// The record that an item is: one that has been checked.
    fn record(&mut self, item: &Arc<Item>) -> Arc<PeerRecord>;
}

/// Each fact is one's own.
pub struct Alone;

impl Pool for Alone {
    fn item(&mut self, item: Item) -> Arc<Item> {
        item.into()
    }

    fn record(&mut self, item: &Arc<Item>) -> Arc<PeerRecord> {
        PeerRecord::from_item(item).expect("it was checked").into()
    }
}

impl Mesh {
    /// Has its own copy of everything from now on.
    pub fn part(&mut self) {
        self.pool = Box::new(Alone);
        for item in self.replica.entries() {
            *item = Arc::new((**item).clone());
        }
        for record in self.peers.entries() {
            let copy = PeerRecord::from_item(&record.to_item());
            *record = Arc::new(copy.expect("what is written can be read"));
        }
    }
}
