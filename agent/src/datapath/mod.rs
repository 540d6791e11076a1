//! Moving packets: TUN to UDP and back.
//!
//! ```text
//!            ┌─ worker 0 ── TUN queue 0 ⇄ UDP lanes ─┐      one thread each, see worker.rs
//!    pods ⇄ ─┤                                       ├─ ⇄ underlay
//!            └─ worker n ── TUN queue n ⇄ UDP lanes ─┘
//!                   │ reads once per batch        │ writes its own
//!              ArcSwap<Table>                  counters ──▶ Datapath::counters(), summed
//! ```
//!
//! [`task::spawn`] starts it; whoever knows the topology stores a new [`table::Table`] when it changes.

mod counters;
pub mod handshake;
pub mod header;
pub mod icmp;
pub mod offload;
mod pace;
pub mod packet;
pub mod path;
pub mod path_task;
pub mod pending;
mod receive;
pub mod relay;
pub mod replay;
pub mod seal;
pub mod session_task;
pub mod sessions;
pub mod table;
pub mod task;
mod transmit;
pub mod verdict;
mod worker;

pub use counters::{Drop, PeerTraffic, Snapshot, Traffic};
