//! Network policies: who may begin to talk to whom.
//!
//! ```text
//!   API server, `weft policy apply` ──objects──▶ convert ──▶ ┌───────┐
//!   allocator ──addresses attached here────────────────────▶ │ index │ ──▶ explain: which policy decides, and why
//!   mesh ──nodes' addresses────────────────────────────────▶ └───┬───┘
//!                                         compile: what changed  ▼
//!                                       rules: sets, chains, targets ──render──▶ `nft -f -` ──▶ task
//! ```
//! Semantics are those of `networking.k8s.io/v1` and, for the cluster's tiers, `policy.networking.k8s.io/v1alpha2`. A node enforces both directions of its own pods' policies, when a
//! connection begins; what is established passes, and is ended when a policy comes to forbid it.

pub mod cache;
pub mod cluster;
mod compile;
pub mod convert;
pub mod counts;
pub mod document;
mod explain;
mod index;
pub mod model;
mod render;
mod rules;
pub mod selector;
mod task;

#[cfg(test)]
mod law_tests;
#[cfg(test)]
mod nft_tests;

pub use compile::Compiler;
pub use explain::{Explanation, Verdict, explain};
pub use index::{Index, Nodes, Touched};
pub use render::Renderer;
pub use rules::{Change, Rules};
pub use task::{Handle, PolicyError, Status, remove, spawn};
