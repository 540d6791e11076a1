//! Real container runtimes on a lab's nodes: one containerd for each node, in the node's network namespace.
//!
//! ```text
//!   lab keeper ─▶ unshare: process and mount namespace of the node's runtime
//!                    └─ sh (1) ─▶ containerd ◀─CRI─ test          restarted by the shell when it ends
//!                          └─ shims, pods                         outlive it
//! ```
//! The kernel ends everything in the process namespace when the lab's process ends, however it does.

pub mod cgroup;
pub mod containerd;
pub mod cri;
pub mod image;

pub use containerd::{Containerd, Version};
