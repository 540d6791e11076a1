//! Weft: an overlay network daemon. This library is the agent; `main.rs` only picks a command.
//!
//! ```text
//!                 main ─▶ config ─▶ run::build ─▶ Running
//!                                     │ wires the subjects, which never import each other
//!        ┌──────────┬─────────┬───────┴──┬──────────┬─────────┐
//!      mesh       ipam     datapath    links       cni      admin
//!    who is in  who owns   TUN ↔ UDP   bridge,   attach,   health,
//!    the net    which                  routes,   detach    metrics,
//!               address                nftables            local API
//!        └──────────┴─────────┴────┬─────┴──────────┴─────────┘
//!                   types       identity       linux
//!            words, parsed    who we are,      thin, safe kernel calls
//!                             whom we believe
//! ```
//!
//! Two more subjects have no room in the picture: `kube`, the cluster's word, and `policy`, who may begin to talk to whom.
//! Pure files hold the thinking and know no clock, socket or lock; one `task.rs` per subject owns those.
//! With `default-features = false` only [`types`] and a part of [`linux`] are there: what the CNI shim needs.

pub mod linux;
pub mod types;

#[cfg(feature = "agent")]
pub mod admin;
#[cfg(feature = "agent")]
pub mod cli;
#[cfg(feature = "agent")]
pub mod cni;
#[cfg(feature = "agent")]
pub mod config;
#[cfg(feature = "agent")]
pub mod datapath;
#[cfg(feature = "agent")]
pub mod identity;
#[cfg(feature = "agent")]
pub mod ipam;
#[cfg(feature = "agent")]
pub mod kube;
#[cfg(feature = "agent")]
pub mod links;
#[cfg(feature = "agent")]
pub mod mesh;
#[cfg(feature = "agent")]
pub mod policy;
#[cfg(feature = "agent")]
pub mod run;

/// Name and version, as peers, metrics and `weft version` show them.
pub const SOFTWARE: &str = concat!("weft ", env!("CARGO_PKG_VERSION"));
