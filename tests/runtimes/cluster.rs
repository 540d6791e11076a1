//! A lab whose nodes run containerd and an agent that writes the runtime's network configuration, as on Kubernetes.
use std::{sync::Arc, time::Duration};

use serde_json::Value;
use weft_lab::{
    Lab,
    namespace::Netns,
    node::Node,
    runtime::{Containerd, Version, containerd::Sandbox},
    traffic, wait,
};

pub struct Cluster {
    // Before the lab, which looks for processes that are left.
    pub runtimes: Vec<Containerd>,
    pub lab: Lab,
}

impl Cluster {
    /// A node for each version, agents ready, runtimes willing to run pods.
    pub fn start(versions: &[Version]) -> Self {
        let lab = Lab::builder().nodes(versions.len()).without_agents().start().unwrap();
        let start = |(node, version): (&Arc<Node>, &Version)| {
            let runtime = Containerd::start(node, lab.claim(), *version).unwrap();
            let directory = runtime.conf_dir().to_string_lossy().into_owned();
            node.configure(|settings| settings.more.extend(["--cni-conf-dir".into(), directory]));
            node.start_agent().unwrap();
            runtime
        };
        let runtimes: Vec<_> = lab.nodes().iter().zip(versions).map(start).collect();
        let cluster = Self { runtimes, lab };
        for runtime in &cluster.runtimes {
            runtime.node().wait_ready(SOON).unwrap();
            runtime.wait_network(SOON).unwrap();
        }
        cluster
    }

    /// Ends the runtimes, then the lab, which looks for leaks.
    pub fn finish(self) {
        drop(self.runtimes);
        self.lab.finish().unwrap();
    }

    /// One node with containerd 1.6, one with 2.x.
    pub fn old_and_new() -> Self {
        Self::start(&[Version::V1, Version::V2])
    }
}

/// The attachments that the node's agent knows.
pub fn attachments(node: &Node) -> Vec<Value> {
    node.weft_json("pods").unwrap()["pods"].as_array().unwrap().clone()
}

/// Waits until the one answers the other's echo.
pub fn reaches(from: &Netns, to: &Sandbox) {
    let what = format!("{} reaches {}", from.name(), to.netns.name());
    wait::until(&what, SOON, || traffic::ping(from, to.address, Duration::from_millis(500))).unwrap();
}

/// For what takes a second when all is well.
pub const SOON: Duration = Duration::from_secs(20);
