//! Real agents under abuse: what they are sent, what they lose, and what kills them. Needs root.
#![allow(clippy::unwrap_used)]

mod burst;
mod control;
mod datagrams;
mod full;
mod living;
mod seen;
mod state_file;
mod storm;
mod stranger;
