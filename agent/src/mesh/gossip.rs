//! What a subject contributes to gossip.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::sync::Arc;

/// One gossiped fact: for each (channel, key) the greatest (rank, body, signature) wins everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub channel: Arc<str>,
    pub key: Vec<u8>,
    pub rank: Vec<u8>,
    pub body: Vec<u8>,
    pub signature: Vec<u8>,
}

/// Why an item is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected(pub &'static str);

/// A subject's part in gossip.
pub trait Gossiper: Send + Sync {
    fn channel(&self) -> &'static str;
    /// Stateless: the item decodes, and its rank and key agree with its body.
    fn check(&self, item: &Item) -> Result<(), Rejected>;
}
