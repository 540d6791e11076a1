//! The wire formats of Weft, generated from `proto/wire` without `protoc`.
//!
//! ```text
//!   agent ──mesh.proto──▶ agent       control links, TCP 6783
//!   weft-cni ┐
//!   weft CLI ┴─local.proto──▶ agent   unix socket /run/weft/weft.sock
//!   agent ──takeover.proto──▶ agent   unix socket /run/weft/takeover.sock
//! ```
#![forbid(unsafe_code)]

/// Agent to agent: links, gossip, requests for address space.
pub mod mesh {
    #![allow(clippy::all, clippy::unwrap_used)]
    tonic::include_proto!("weft.mesh.v1");
}

/// Shim and command line to agent, on the unix socket.
pub mod local {
    #![allow(clippy::all, clippy::unwrap_used)]
    tonic::include_proto!("weft.local.v1");
}

/// From an agent to the one that takes its work over, on the same node.
pub mod takeover {
    #![allow(clippy::all, clippy::unwrap_used)]
    tonic::include_proto!("weft.takeover.v1");
}
