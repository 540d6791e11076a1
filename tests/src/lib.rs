//! The lab: nodes as network namespaces on one machine, an agent on each, pods attached by the real shim.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use std::time::Duration;
//! let lab = weft_lab::Lab::builder().nodes(3).pods(1).start()?;
//! let (a, b) = (lab.pod("n1/p1")?, lab.pod("n3/p1")?);
//! weft_lab::wait::until("ping", Duration::from_secs(2), || a.ping(b.address()?, Duration::from_millis(200)))?;
//! lab.finish()?; // or drop it: panics if anything was left behind
//! # Ok(())
//! # }
//! ```
//!
//! ```text
//!                            main ─▶ demo, up, bench, soak, chaos (scenario, storm), suite
//!                                        │
//!                                  Lab (lab.rs)
//!      ┌──────────┬───────────┬──────────┼──────────┬──────────┬──────────┐
//!     node ─▶ agent          pod ─▶ cni  underlay   traffic   fault     leaks
//!                                                 adversary
//!      └──────────┴───────────┴──────────┼──────────┴──────────┴──────────┘
//!           namespace, links  ─▶  sandbox: private mounts, gone with the process
//!           claim, process    ─▶  what has to be cleaned up after kill -9
//! ```
//!
//! It needs root, Linux, and `nft`; nothing in the host's network namespace is touched.

pub mod adversary;
pub mod agent;
pub mod apiserver;
pub mod bench;
pub mod binaries;
pub mod capacity;
pub mod chaos;
pub mod claim;
pub mod clock;
pub mod cni;
pub mod debian;
pub mod demo;
pub mod disorder;
pub mod fault;
pub mod image;
pub mod keys;
pub mod lab;
pub mod leaks;
pub mod links;
pub mod namespace;
pub mod node;
pub mod pairs;
pub mod pod;
pub mod policy;
pub mod process;
pub mod progress;
pub mod relay;
pub mod report;
pub mod runtime;
pub mod sandbox;
pub mod sandboxes;
pub mod scale;
pub mod scenario;
pub mod sim;
pub mod soak;
pub mod storm;
pub mod suite;
pub mod tools;
pub mod traffic;
pub mod underlay;
pub mod up;
pub mod wait;

mod background;
mod linux;

pub use lab::{Builder, Lab};
