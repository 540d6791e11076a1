//! What Weft does with a Kubernetes API server: real kube-rs against the lab's own server, or against a real one, to which
//! `WEFT_TEST_KUBECONFIG` leads. Each test makes objects of its own, and takes them away again. Those in `nodes`,
//! `lasting` and `policies` need root.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod agreement;
mod cluster;
mod harness;
mod lasting;
mod nodes;
mod own_node;
mod policies;
mod watching;
