//! What runtimes do while the agent is down, and after.
use std::fs;

use anyhow::ensure;
use weft_lab::{cni, runtime::Version, wait};

use crate::cluster::{Cluster, SOON, attachments, reaches};

#[test]
fn the_reason_why_pods_can_not_run_reaches_the_runtime_verbatim() {
    let cluster = Cluster::start(&[Version::V2]);
    let (runtime, node) = (&cluster.runtimes[0], cluster.runtimes[0].node());
    node.stop_agent().unwrap();
    let mut config = cni::config(node);
    config["cniVersion"] = "1.1.0".into();
    let mut call = cni::Call::new("STATUS", "", "", &config);
    (call.container_id, call.netns, call.ifname) = (None, None, None);
    let said = call.run(node).unwrap().json().unwrap()["msg"].as_str().unwrap().to_string();
    wait::until("the runtime tells it", SOON, || {
        let network = runtime.client().condition("NetworkReady")?;
        ensure!(!network.status && network.message.contains(&said), "{said}, but {network:?}");
        Ok(())
    })
    .unwrap();
    node.start_agent().unwrap();
    runtime.wait_network(SOON).unwrap();
    cluster.finish();
}

#[test]
fn with_the_agent_down_no_pod_begins_and_every_pod_can_end() {
    let cluster = Cluster::old_and_new();
    for runtime in &cluster.runtimes {
        let node = runtime.node();
        let before = runtime.run_pod("before").unwrap();
        let links = node.netns().links(async |links| links.names().await).unwrap();
        node.kill_agent().unwrap();

        let error = format!("{:#}", runtime.run_pod("meanwhile").err().unwrap());
        assert!(error.contains("agent"), "{error}");
        let now = node.netns().links(async |links| links.names().await).unwrap();
        assert_eq!(now, links, "the pod that failed left nothing");

        runtime.remove(&before.id).unwrap();
        drop(before);
        let listed = runtime.client().list_pod_sandboxes().unwrap();
        for sandbox in listed {
            runtime.remove(&sandbox.id).unwrap();
        }
        let tombstones =
            || fs::read_dir(node.run_dir().join("tombstones")).map_or(0, |entries| entries.count());
        assert!(tombstones() > 0, "the shim noted what the agent has to forget");

        node.start_agent().unwrap();
        node.wait_ready(SOON).unwrap();
        wait::until("the tombstones are worked off", SOON, || {
            ensure!(tombstones() == 0 && attachments(node).is_empty());
            Ok(())
        })
        .unwrap();
        runtime.wait_network(SOON).unwrap();
        let after = runtime.run_pod("after").unwrap();
        reaches(node.netns(), &after);
    }
    cluster.finish();
}
