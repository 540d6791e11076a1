//! Who is in the network.
//!
//! ```text
//!             ┌ machine ──────────────────────────────────────────────┐
//!   subjects ─┤ own: record, name   links, link, greeting: who talks   ├─ task ── tonic streams
//!             │ exchange: gossip ── replica, slots, buffer   dial: whom │
//!             │ peers: the set      routes: unicasts' next hop          │
//!             └────────────────────────────────────────────────────────┘
//! ```
//! `gossip` is what other subjects see of it: [`gossip::Item`], [`gossip::Gossiper`], [`gossip::Rejected`].

pub mod buffer;
pub mod dial;
mod exchange;
pub mod gossip;
pub mod greeting;
pub mod link;
mod links;
pub mod machine;
mod own;
pub mod peers;
pub mod pool;
mod refusals;
pub mod replica;
pub mod routes;
pub mod slots;
pub mod task;
mod transport;

pub use weft_proto::mesh as wire;
