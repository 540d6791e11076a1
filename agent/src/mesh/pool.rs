//! Where what an agent knows is kept: by itself, or in common with the other agents of its process, as a simulated network
//! has them. There each fact would be held as often as there are nodes.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{gossip::Item, peers::PeerRecord};
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
