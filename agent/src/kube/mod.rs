//! Kubernetes: who the nodes are, which pods live here, what the cluster has agreed on; and what the node tells of itself.
//!
//! ```text
//!   API server ──list, watch──▶ task ──▶ index ──▶ View ──▶ run: peers to call, orphans, takeovers
//!        │                                 └─▶ cache, for starts while the server cannot be reached
//!        ├── ConfigMap weft-seed ◀──▶ board   who shares the universe at the start, whose space was taken over
//!        ├── Secret weft-ca ────────▶ keys ──▶ files of --ca-dir, which identity watches
//!        └── Node, Events ◀────────── report  ready, and what an operator should see
//! ```
//! The manifests ship ConfigMap and Secret empty, so that nobody needs the right to create any: who is first fills them, by
//! an update that fails if another was faster ([`board`], [`keys`]). Pure files do the thinking; [`client`], [`join`] and
//! [`task`] do the talking. Nothing is ever torn down because the server does not answer: what it said last goes on counting.

pub mod board;
pub mod cache;
pub mod client;
mod convert;
pub mod events;
pub mod index;
pub mod join;
pub mod keys;
pub mod orphans;
pub mod peers;
pub mod policies;
mod report;
pub mod task;
mod watches;

pub use convert::{node, pod};
pub use index::View;

use crate::types::{Endpoint, PeerName, Prefix};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What a Node object says that concerns us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: PeerName,
    /// Tells a node from a later one of the same name.
    pub uid: Uid,
    /// Where its agent listens: by annotation, else its internal addresses, else its external ones.
    pub endpoints: Vec<Endpoint>,
    /// Network addresses; empty where the cluster allocates none.
    pub pod_cidrs: Vec<Prefix>,
    /// It carries the taint that keeps pods away until its agent is ready.
    pub tainted: bool,
    /// Its condition says that its network works.
    pub network_available: bool,
}

/// What a Pod object says that concerns us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    /// All UIDs that a runtime may know it by: that of a static pod is not that of the object which mirrors it.
    pub uids: BTreeSet<Uid>,
}

/// `metadata.uid`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uid(pub String);

/// Keeps pods off a node until its agent is ready, where the cluster's nodes are registered with it.
pub const TAINT: &str = "weft.dev/agent-not-ready";
/// On a Node: where its agent is reached, instead of the node's addresses. `ADDR[:PORT]`, separated by commas.
pub const ENDPOINTS: &str = "weft.dev/endpoints";
/// The ConfigMap that agents agree by, and the Secret of the network's CA; both in the agents' namespace.
pub const CONFIG_MAP: &str = "weft-seed";
pub const SECRET: &str = "weft-ca";
/// What was last known of the cluster, in the state directory.
pub const CACHE: &str = "kubernetes.json";
