//! `deploy/`: what is applied to a cluster is what the chart says, what Kubernetes knows, and what the agent understands.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod chart;
mod objects;
