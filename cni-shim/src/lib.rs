//! `weft-cni`: attaches pods to the Weft agent of this node, as CNI 0.3.1 to 1.1.0 have it.
//!
//! ```text
//!   CNI_* ─▶ env ─╮                     ╭─▶ agent (unix socket): reserve … activate
//!                 ├─ checked ─▶ verbs ──┤
//!   stdin ▶ config╯             │       ╰─▶ pod: the veth, inside and outside the pod's namespace
//!                               ▼
//!                       result: one JSON document on stdout, exit code
//! ```
//!
//! Everything is checked before the first side effect; what fails later is undone.
#![forbid(unsafe_code)]

mod agent;
pub mod config;
pub mod env;
mod failure;
mod pod;
mod prev_result;
mod result;
mod stdin;
mod tombstone;
mod verbs;
mod version;

pub use failure::{Failure, code};
pub use verbs::run;
pub use version::Version;
