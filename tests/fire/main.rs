//! Addresses under fire, with real agents: dead nodes, and who has their addresses afterwards. Needs root.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod forget;
mod harness;
mod partition;
mod seeding;
