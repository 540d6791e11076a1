//! The CNI shim as a container runtime sees it: the real `weft-cni` and the real agent in the lab.
//!
//! One file for each chapter of what CNI and the runtimes ask of a plugin; one test for each sentence.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod add;
mod call;
mod check;
mod codes;
mod conflist;
mod del;
mod differential;
mod fake;
mod gc;
mod harness;
mod injected;
mod killed;
mod protocol;
mod status;
mod traffic;
