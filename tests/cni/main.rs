//! The CNI shim as a container runtime sees it: the real `weft-cni`, real namespaces, the agent's real service.
//!
//! One file for each chapter of what CNI and the runtimes ask of a plugin; one test for each sentence.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod add;
mod agent;
mod call;
mod check;
mod codes;
mod conflist;
mod del;
mod differential;
mod gc;
mod harness;
mod protocol;
mod reference;
mod status;
