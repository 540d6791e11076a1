//! Pieces of the agent against the real kernel, in network namespaces of their own. They need root.
#![allow(clippy::unwrap_used)]

mod datapath;
mod joined;
