//! What an agent tells about itself: readiness, metrics and the local API of the command line.
//!
//! ```text
//!   every subject ──▶ Observe::snapshot ──┬─▶ metrics ──▶ /metrics ┐
//!                                         └─▶ replies ──▶ Admin    │  gRPC on weft.sock (with Cni beside it)
//!   Pending guards, dropped when done ──▶ Readiness ────▶ /readyz  ├─ HTTP on --metrics-addr
//!   loops that tick ────────────────────▶ Heartbeats ───▶ /livez   ┘
//! ```
//! A [`Front`] answers on both until that is there.

mod front;
mod heartbeat;
mod http;
mod local;
mod metrics;
mod readiness;
mod replies;
mod snapshot;
mod socket;

pub use front::Front;
pub use heartbeat::{Heartbeat, Heartbeats, STALLED_AFTER, Stall};
pub use http::{HttpError, HttpServer, Pages};
pub use local::{AdminService, ForgetCall, Forgotten, LeaveCall};
pub use metrics::Metrics;
pub use readiness::{Blocks, Pending, Readiness};
pub(crate) use snapshot::addresses_in;
#[cfg(test)]
pub(crate) use snapshot::example;
pub use snapshot::{
    Counters, Encryption, Observe, Observer, Path, PeerView, PodView, RangeView, Snapshot, Traffic,
};
pub use socket::{LocalSocket, SocketError};

/// What is said while the agent looks for somebody to join through.
pub const STARTING: &str = "the agent is starting: it looks for a peer that tells it how things stand";
