//! Who owns which address: the ring says which node, the space of a node says which pod.
//!
//! ```text
//!             items ┌───────────────── Allocator ─────────────────┐ items to publish
//!   mesh ──────────▶│  ring ─ own ranges ─▶ space ─ lowest free   │──────────▶ mesh
//!   requests for    │   ▲                     │                   │ requests for space
//!   space           │   └── give, flag ◀──────┘                   │
//!                   └──▲──────────────────────────────────────┬───┘
//!         reserve, release, activated (cni)                changes ─▶ store, before any answer
//! ```
//!
//! Everything here is pure but [`task`], which owns the [`Allocator`] and writes its changes down.
//! What was changed is not to be believed before it is written: take [`Allocator::effects`] after each call, store the
//! changes, and only then publish, send and answer.

mod allocator;
mod ask;
pub mod death;
pub mod deed;
pub mod election;
mod error;
pub mod record;
pub mod ring;
pub mod seed;
#[cfg(test)]
mod sim;
pub mod space;
pub mod span;
pub mod task;
#[cfg(test)]
mod tests;
pub mod token;

pub use allocator::Allocator;
pub use error::{IpamError, WaitingFor};
pub use space::{Allocation, Counts, Owner};

use crate::{
    identity::Sealer,
    mesh::gossip::Item,
    types::{AttachmentKey, Incarnation, Mac, PeerName, PodRef, Prefix, Universe, VethAlias},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

#[derive(Clone, Debug)]
pub struct Config {
    pub name: PeerName,
    pub universe: Universe,
    pub seeds: seed::SeedPlan,
    /// What to do as long as nobody knows the seeds.
    pub seeding: Seeding,
    /// With what this node seals its tokens; without it they have no deeds.
    pub sealer: Option<Sealer>,
    /// There are peers that may know more than this node does: those that it was given to start with (`--peer`).
    pub has_bootstrap: bool,
    /// Somebody else says who owns what, and this is the beginning: there is no ring then.
    pub assigned: Option<Assigned>,
}

/// A node's part in finding out who shares the universe at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seeding {
    /// They are given, or it waits to be told.
    #[default]
    Given,
    /// It is one of so many that vote.
    Consensus(usize),
    /// It never owns anything.
    Observer,
}

/// Which ranges somebody else than the ring has given to whom.
pub type Assigned = Vec<(PeerName, Prefix)>;

/// What the state file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// The ring has been confirmed by a peer, or this node is the only seed: own ranges may be used.
    pub in_force: bool,
    /// By their starts.
    pub tokens: BTreeMap<u128, Arc<token::Token>>,
    /// Items of other channels that are to last, and whether this node has done its part in it.
    pub kept: Vec<(Item, bool)>,
    /// Peers that belonged to the network.
    pub members: BTreeMap<PeerName, Incarnation>,
    pub allocations: Vec<Allocation>,
    pub resting: Vec<IpAddr>,
}

/// What is found on the node at start.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The host's ends of our pods' veths.
    pub veths: Vec<VethAlias>,
    /// Of the pods' ends, as far as the kernel knows them.
    pub macs: BTreeMap<IpAddr, Mac>,
    /// The bridge's address.
    pub bridge: Option<IpAddr>,
    /// There was no boot marker: pods without a veth are gone.
    pub rebooted: bool,
    /// Nobody can have declared this node dead since it ran last: an agent has just handed over to this one, or a cluster says
    /// who is dead.
    pub continues: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub at: Instant,
    /// Unix time in milliseconds: only recorded, never computed with.
    pub unix_ms: u64,
}

/// An address for a pod.
#[derive(Clone, Debug)]
pub struct Request {
    pub key: AttachmentKey,
    pub pod: PodRef,
    /// Addresses that the caller insists on.
    pub wanted: Vec<IpAddr>,
    /// Prefixes that the address must come from; empty: any.
    pub ranges: Vec<Prefix>,
    /// A MAC address that the caller insists on; otherwise it is derived from the key.
    pub mac: Option<Mac>,
}

/// A peer whose record is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPeer {
    pub name: PeerName,
    /// Space is asked only from whom messages are likely to reach.
    pub reachable: bool,
    /// Addresses that it serves though the ring gives them to another.
    pub held: Vec<IpAddr>,
    pub incarnation: Incarnation,
    /// Of what it has promised to leave to who takes over from the dead.
    pub deaths_digest: u64,
    /// Whom it knew before it started, and has not heard of since.
    pub absent: Vec<(PeerName, Incarnation)>,
    /// For good: nobody waits for it.
    pub left: bool,
}

impl KnownPeer {
    /// One that is no more.
    pub fn gone(name: PeerName) -> Self {
        let (reachable, held, incarnation, deaths_digest, absent) = Default::default();
        Self { name, reachable, held, incarnation, deaths_digest, absent, left: true }
    }
}

/// One entry of the state file that is to be put, or removed where there is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    InForce,
    /// Who shared the universe at the start; what is configured later counts no more.
    Seeds(seed::SeedPlan),
    Token(Arc<token::Token>),
    /// Of another channel than the ring's.
    Kept {
        item: Item,
        settled: bool,
    },
    /// A peer belongs to the network, or does no more.
    Member(PeerName, Option<Incarnation>),
    Allocation(IpAddr, Option<Arc<Allocation>>),
    /// With the Unix time in milliseconds at which it was freed.
    Resting(IpAddr, Option<u64>),
}

/// What is to be done after a call: store, then publish and send.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// Who shares the universe, for the mesh to know before anything else.
    pub seeds: Option<seed::SeedPlan>,
    pub changes: Vec<Change>,
    pub publish: Vec<Item>,
    /// Messages on channel "ring" for one peer each.
    pub unicasts: Vec<(PeerName, Vec<u8>)>,
}

/// What others may know: a snapshot of what has been written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The routing table: all known ranges and their owners, own ones included.
    pub ranges: Arc<Vec<(Prefix, PeerName)>>,
    /// Own ranges in use; empty until the ring is in force.
    pub own: Vec<Prefix>,
    pub bridge: Option<IpAddr>,
    /// All of this node's, the bridge's included, held ones too.
    pub allocations: BTreeMap<IpAddr, Arc<Allocation>>,
    /// Pods whose attachment has not been activated yet.
    pub reserved: BTreeSet<AttachmentKey>,
    /// Addresses in use here though the ring gives them to another: to be published in the peer record.
    pub held: Vec<IpAddr>,
    /// Addresses of own ranges that peers hold and that are not in use here: to be published too.
    pub conceded: BTreeSet<IpAddr>,
    pub resting: BTreeSet<IpAddr>,
    pub counts: Counts,
    /// The greatest of all tokens.
    pub epoch: u64,
    /// Set while this node cannot hand out addresses though it should.
    pub waiting_for: Option<WaitingFor>,
    pub deaths: Arc<Vec<death::Death>>,
    pub deaths_digest: u64,
    /// Who lives as far as was known before the start, and has not been heard of since, while ranges are to be taken over.
    pub absent: Vec<(PeerName, Incarnation)>,
    /// Whose ranges this node is to take over, and who has not agreed yet.
    pub takeovers: Vec<(PeerName, Vec<PeerName>)>,
    /// All that are known to belong to the network, also from before a restart.
    pub members: Arc<BTreeMap<PeerName, Incarnation>>,
}
