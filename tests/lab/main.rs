//! The lab itself: that it works without agents, and that it leaves nothing. Needs root.
#![allow(clippy::unwrap_used)]

mod bench;
mod cleanup;
mod keeper;
mod network;
