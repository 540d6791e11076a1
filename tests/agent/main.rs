//! Real agents under abuse: what they are sent, what they lose, and what kills them. Needs root.
#![allow(clippy::unwrap_used)]

mod adversary;
mod burst;
mod control;
mod datagrams;
mod full;
mod insider;
mod living;
mod sealed;
mod seen;
mod sessions;
mod state_file;
mod storm;
mod stranger;
