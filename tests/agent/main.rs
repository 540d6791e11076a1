//! Real agents under abuse: what they are sent, what they lose, and what kills them. Needs root.
#![allow(clippy::unwrap_used)]

mod burst;
mod living;
mod seen;
mod storm;
