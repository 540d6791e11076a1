//! Weft under real container runtimes (containerd old and new on each node of a lab, podman), and under Services as on
//! Kubernetes. Needs root, and Debian's archive on the first run.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

mod churn;
mod cluster;
mod image;
mod outage;
mod podman;
mod pods;
mod restart;
mod services;
