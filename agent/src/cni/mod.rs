//! Attach, detach, check and collect pods, as the shim asks for it.
//!
//! ```text
//!   weft-cni ──Reserve───▶ task ──reserve──▶ Addresses      an address, stored before the answer
//!      │ makes the veth, sets the pod's side up
//!      └──────Activate──▶ task ──attach───▶ Ports          bridge port, host route, policy in force
//!
//!   weft-cni ──Release───▶ task ──detach───▶ Ports ──▶ release ──▶ Addresses
//!   tombstones/ ──────────▶ ╯    what the shim left where no agent answered
//! ```
//!
//! [`Addresses`] and [`Ports`] are what this subject needs of the others; whoever wires the agent provides them.
//! What is asked and what is answered is thought out in pure files: [`request`], [`answer`], [`reap`], [`check`],
//! [`conflist`], [`tombstone`]; `task.rs` does it.

pub mod answer;
pub mod check;
pub mod conflist;
mod metrics;
pub mod reap;
pub mod request;
mod task;
pub mod tombstone;

pub use metrics::Metrics;
pub use request::Wish;
pub use task::{Config, Service, write_conflist};

use crate::types::{AttachmentKey, Mac, PodRef, Prefix, VethAlias};
use std::{future::Future, net::IpAddr, time::SystemTime};

/// Who hands out addresses.
pub trait Addresses: Send + Sync + 'static {
    /// Reserves an address for an attachment and stores it before answering. An attachment that has one
    /// keeps it.
    fn reserve(&self, wish: Wish) -> impl Future<Output = Result<Allocation, AddressError>> + Send;

    /// The attachment stands: its reservation no longer times out. False where there is none (any more).
    fn activated(&self, key: &AttachmentKey) -> impl Future<Output = Result<bool, AddressError>> + Send;

    /// Frees what an attachment holds; nothing held is success.
    fn release(&self, key: &AttachmentKey) -> impl Future<Output = Result<(), AddressError>> + Send;

    /// All attachments that hold addresses; the bridge's own address is none.
    fn allocations(&self) -> impl Future<Output = Result<Vec<Allocation>, AddressError>> + Send;
}

/// Who owns the bridge.
pub trait Ports: Send + Sync + 'static {
    /// Makes an existing veth a port, with its host routes and filters in force when this returns.
    fn attach(&self, port: Port) -> impl Future<Output = Result<(), PortError>> + Send;

    /// Takes routes, filters and the veth itself away; nothing there is success.
    fn detach(&self, key: &AttachmentKey) -> impl Future<Output = Result<(), PortError>> + Send;

    /// All veths of ours that exist on the host, known by their alias.
    fn veths(&self) -> impl Future<Output = Result<Vec<Veth>, PortError>> + Send;
}

/// What an attachment holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub attachment: AttachmentKey,
    pub pod: PodRef,
    /// IPv4 before IPv6.
    pub addresses: Vec<IpAddr>,
    /// The pod's end.
    pub mac: Mac,
    pub reserved: SystemTime,
}

/// What becomes a bridge port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub attachment: AttachmentKey,
    pub pod: PodRef,
    pub host_interface: String,
    pub addresses: Vec<IpAddr>,
    pub mac: Mac,
}

/// A pod's veth as the host shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veth {
    pub alias: VethAlias,
    pub host_interface: String,
    pub up: bool,
    /// It is a port of our bridge.
    pub on_bridge: bool,
    /// Host routes to its addresses that are there.
    pub routes: Vec<Prefix>,
}

/// What every pod on this node is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub bridge: String,
    pub bridge_mac: Mac,
    /// The bridge's addresses, at most one of each family, IPv4 before IPv6.
    pub gateways: Vec<IpAddr>,
    /// The pods', in bytes.
    pub mtu: u16,
}

/// Whether ADD would work now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Why not, each for an operator to read; empty: it would.
    pub reasons: Vec<String>,
    /// Pods that run already are cut off too.
    pub impaired: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Nothing to hand out yet.
    #[error("{0}")]
    NotReady(String),
    /// Everything is handed out; says who owns what.
    #[error("{0}")]
    Full(String),
    /// The wished address or range has nothing left, or belongs to somebody else.
    #[error("{0}")]
    Taken(String),
    /// The wished address or range can't be handed out by any node.
    #[error("{0}")]
    Refused(String),
    /// It could not be stored.
    #[error("{0}")]
    Store(String),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    #[error("{0}")]
    NotReady(String),
    /// There is no such veth.
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Kernel(String),
    /// The veth is there, but its policy was not in force in time.
    #[error("{0}")]
    Policy(String),
}
