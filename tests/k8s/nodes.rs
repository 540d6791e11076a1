//! Real agents on nodes of a cluster. Needs root.
use std::time::{Duration, Instant};

use anyhow::ensure;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use weft_lab::{
    node::Node,
    relay::{Quality, Relay},
    wait,
};

use crate::cluster::{Cluster, START, all_reach_all};

#[test]
fn the_nodes_of_a_cluster_become_a_network_and_outlive_its_api_server() {
    let cluster = Cluster::new(3);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    for node in &nodes {
        wait::until("the Node is available", START, || cluster.is_available(node)).unwrap();
    }

    // Nobody answers any more: pods come, agents start again, and find each other.
    cluster.relays.iter().for_each(Relay::close);
    pods.push(cluster.attached(&nodes[0]));
    nodes[1].stop_agent().unwrap();
    nodes[1].start_agent().unwrap();
    nodes[1].wait_ready(START).unwrap();
    pods.push(cluster.attached(&nodes[1]));
    all_reach_all(&pods);
    let warned = |node: &Node| -> anyhow::Result<()> {
        let status = node.status()?.to_string();
        ensure!(status.contains("what it said last goes on counting"), "{status}");
        Ok(())
    };
    wait::until("the status says so", START, || warned(&nodes[1])).unwrap();
    cluster.relays.iter().for_each(|relay| relay.set(Quality::Good));
    wait::until("it answers again", START, || {
        ensure!(warned(&nodes[1]).is_err());
        Ok(())
    })
    .unwrap();
    cluster.end();
}

#[test]
fn pods_can_run_within_three_seconds_of_an_agents_start() {
    // What else the machine does is no matter: of three tries the best counts.
    let mut tries = (0..3).map(|_| until_pods_run());
    assert!(tries.any(|slowest| slowest < Duration::from_secs(3)));
}

/// How long it takes the slowest of three agents, started at once in a new cluster, until a pod that waits for it runs.
fn until_pods_run() -> Duration {
    let cluster = Cluster::new(3);
    let nodes = cluster.lab.nodes();
    // As the manifest has it: with network policies.
    nodes.iter().for_each(|node| {
        node.configure(|settings| settings.more.retain(|flag| flag != "--network-policy" && flag != "off"));
    });
    let pending: Vec<_> = nodes.iter().map(|node| cluster.make_pod(node.name(), node)).collect();
    // Before the clock runs, as nothing is built while images are pulled.
    nodes[0].binaries().unwrap();
    let start = Instant::now();
    nodes.iter().for_each(|node| node.start_agent().unwrap());
    for (node, pod) in nodes.iter().zip(&pending) {
        wait::until("the node is free for pods", START, || {
            ensure!(cluster.conflist(node).exists(), "no conflist yet");
            cluster.is_available(node)
        })
        .unwrap();
        let free = start.elapsed();
        cluster.attached_as(pod, node);
        println!("{} is free for pods after {free:.2?}, has one after {:.2?}", node.name(), start.elapsed());
    }
    let slowest = start.elapsed();
    cluster.end();
    slowest
}

#[test]
fn with_podcidr_a_nodes_pods_have_addresses_of_its_range_also_without_a_server() {
    let cluster = Cluster::new(2);
    let nodes = cluster.lab.nodes();
    for (node, range) in nodes.iter().zip(["10.99.1.0/24", "10.99.2.0/24"]) {
        let patch = Patch::Merge(json!({"spec": {"podCIDR": range, "podCIDRs": [range]}}));
        let (api, name) = (cluster.scene.nodes(), cluster.scene.name(node.name()));
        cluster.runtime.block_on(api.patch(&name, &PatchParams::default(), &patch)).unwrap();
        node.configure(|settings| {
            settings.universe = Some("10.99.0.0/16".into());
            settings.more.extend(["--ipam".into(), "podcidr".into()]);
        });
    }
    cluster.start();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    cluster.relays.iter().for_each(Relay::close);
    nodes[1].stop_agent().unwrap();
    nodes[1].start_agent().unwrap();
    nodes[1].wait_ready(START).unwrap();
    pods.push(cluster.attached(&nodes[1]));
    all_reach_all(&pods);
    for (pod, range) in pods.iter().zip(["10.99.1.", "10.99.2.", "10.99.2."]) {
        let address = pod.address().unwrap().to_string();
        assert!(address.starts_with(range), "{} has {address}", pod.full_name());
    }
    cluster.end();
}

#[test]
fn an_agent_is_alive_while_it_waits_for_the_api_server() {
    let cluster = Cluster::new(1);
    let node = &cluster.lab.nodes()[0];
    let socket = cluster.scene.dir().join("probe.sock").display().to_string();
    node.configure(|settings| settings.more.extend(["--probe-socket".into(), socket.clone()]));
    cluster.relays[0].close();
    node.start_agent().unwrap();
    wait::until("it has asked in vain, more than once", START, || {
        ensure!(node.log().matches("waiting for the API server").count() > 1);
        Ok(())
    })
    .unwrap();
    let probe = |what: &str| node.weft(&["probe", what, "--probe-socket", &socket]).unwrap().status.code();
    assert_eq!((probe("live"), probe("ready")), (Some(0), Some(1)));
    cluster.relays[0].set(Quality::Good);
    wait::until("it is ready", START, || {
        ensure!(probe("ready") == Some(0));
        Ok(())
    })
    .unwrap();
    cluster.end();
}

#[test]
fn a_deleted_nodes_space_is_taken_over_and_the_node_comes_back() {
    let cluster = Cluster::new(3);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    // Whoever has not been elected: the elected one's space is most of the universe, that of another a part.
    let gone = &nodes[2];
    let name = cluster.scene.name(gone.name());
    wait::until("it owns space", START, || {
        ensure!(cluster.owners(&nodes[0])?.contains(&name));
        Ok(())
    })
    .unwrap();
    gone.kill_agent().unwrap();
    cluster.runtime.block_on(cluster.scene.delete_node(gone.name()));
    for node in &nodes[..2] {
        wait::until("its space is another's", Duration::from_secs(45), || {
            let owners = cluster.owners(node)?;
            ensure!(!owners.contains(&name), "{owners:?}");
            Ok(())
        })
        .unwrap();
    }
    let map = cluster.runtime.block_on(cluster.scene.maps().get("weft-seed")).unwrap();
    assert!(map.data.unwrap()["takeovers"].contains(&name));

    // Its pod still has its address, which nobody else uses; and it gets space of its own again.
    cluster.register(gone);
    gone.start_agent().unwrap();
    gone.wait_ready(START).unwrap();
    pods.push(cluster.attached(gone));
    all_reach_all(&pods);
    let owners = cluster.owners(&nodes[0]).unwrap();
    assert!(owners.contains(&name), "{owners:?}");
    cluster.end();
}
