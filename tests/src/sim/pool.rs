//! What the agents of a simulated network know alike, held once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use weft::mesh::{
    gossip::Item,
    peers::PeerRecord,
    pool::{Alone, Pool},
};

/// Each agent has one of these; all lead to the same.
#[derive(Clone, Default)]
pub struct Common(Arc<Mutex<Facts>>);

#[derive(Default)]
struct Facts {
    known: HashMap<Arc<Item>, Option<Arc<PeerRecord>>>,
    /// So many were in use when it was last looked.
    in_use: usize,
}

impl Common {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool for Common {
    fn item(&mut self, item: Item) -> Arc<Item> {
        let mut facts = self.facts();
        if let Some((item, _)) = facts.known.get_key_value(&item) {
            return item.clone();
        }
        facts.forget();
        let item = Arc::new(item);
        facts.known.insert(item.clone(), None);
        item
    }

    fn record(&mut self, item: &Arc<Item>) -> Arc<PeerRecord> {
        match self.facts().known.get_mut(item) {
            Some(record) => record.get_or_insert_with(|| Alone.record(item)).clone(),
            None => Alone.record(item),
        }
    }
}

impl Facts {
    /// Of what nobody knows any more.
    fn forget(&mut self) {
        if self.known.len() > 2 * self.in_use + LEAST {
            self.known.retain(|item, _| Arc::strong_count(item) > 1);
            self.in_use = self.known.len();
        }
    }
}

/// Facts for which it is not looked.
const LEAST: usize = 1000;
