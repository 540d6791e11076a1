//! Network policies on the lab's nodes: real agents, real nftables, real packets.
#![allow(clippy::unwrap_used)]

mod cases;
mod ends;
mod harness;
mod labels;
mod repair;
mod size;
mod start;
mod trace;
