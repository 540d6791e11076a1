//! An agent's life on a node, with real agents: how it joins, what it refuses, what it leaves when it stops, how it
//! repairs and cleans up, and what it tells. Needs root.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod conflist;
mod drift;
mod environment;
mod harness;
mod health;
mod join;
mod kernel;
mod keys;
mod load;
mod migrate;
mod names;
mod nobody;
mod privileges;
mod refusals;
mod reset;
mod restart;
mod silence;
mod takeover;
