//! What a cluster's nodes go through as time passes: agents replaced, nodes cut off, pods that vanish. Needs root.
use std::{sync::Arc, time::Duration};

use anyhow::ensure;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use weft::kube::TAINT;
use weft_lab::{
    clock::Clock,
    fault,
    relay::{Quality, Relay},
    wait,
};

use crate::cluster::{Cluster, START, all_reach_all};

#[test]
fn an_agent_that_has_handed_over_rests_and_only_the_next_speaks_to_the_api_server() {
    let cluster = Cluster::new(2);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    let (node, relay) = (&nodes[0], &cluster.relays[0]);
    wait::until("the Node is available", START, || cluster.is_available(node)).unwrap();

    let (next, kubeconfig) = cluster.way(node, "next");
    node.configure(|settings| {
        let at = settings.more.iter().position(|flag| flag == "--kubeconfig").unwrap();
        settings.more[at + 1] = kubeconfig.display().to_string();
    });
    let mut before = node.start_next().unwrap();
    wait::until("it has handed over, and hung up", START, || {
        ensure!(node.log().contains("handed over") && !relay.is_used() && next.is_used());
        Ok(())
    })
    .unwrap();
    node.wait_ready(START).unwrap();
    let calls = relay.calls();
    // Whoever sees the Node takes it off.
    let tainted = Patch::Merge(json!({"spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}]}}));
    let (api, name) = (cluster.scene.nodes(), cluster.scene.name(node.name()));
    cluster.runtime.block_on(api.patch(&name, &PatchParams::default(), &tainted)).unwrap();
    wait::until("the next takes it off", START, || cluster.is_available(node)).unwrap();
    pods.push(cluster.attached(node));
    all_reach_all(&pods);
    assert_eq!(relay.calls(), calls, "calls by who has handed over");
    before.check().unwrap();
    // As kubelet does once the next is ready.
    assert!(before.stop().unwrap().success());
    all_reach_all(&pods);
    node.wait_ready(START).unwrap();
    cluster.end();
}

#[test]
fn a_node_that_is_cut_off_and_returns_is_in_order_again() {
    let cluster = Cluster::new(3);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    let cut_off = &nodes[2];
    fault::cable(cluster.lab.underlay(), cut_off, false).unwrap();
    cluster.relays[2].close();
    nodes[0].wait_warning(&cluster.scene.name(cut_off.name()), START).unwrap();
    // On either side pods come, and those of one node reach each other; the one agent is even started again.
    cut_off.kill_agent().unwrap();
    cut_off.start_agent().unwrap();
    cut_off.wait_ready(START).unwrap();
    pods.extend([&nodes[0], cut_off].map(|node| cluster.attached(node)));
    all_reach_all(&[pods[2].clone(), pods[4].clone()]);
    all_reach_all(&[pods[0].clone(), pods[1].clone(), pods[3].clone()]);
    // And a Node leaves the cluster that it does not hear of.
    cluster.runtime.block_on(cluster.scene.make_node("brief", "192.0.2.99", json!({})));
    cluster.runtime.block_on(cluster.scene.delete_node("brief"));

    fault::cable(cluster.lab.underlay(), cut_off, true).unwrap();
    cluster.relays[2].set(Quality::Good);
    all_reach_all(&pods);
    for node in &nodes {
        wait::until("nothing is wrong any more", START, || {
            // A real server has Nodes of others, too.
            let warnings = node.status()?["warnings"].to_string();
            ensure!(!warnings.contains(&cluster.scene.id) && !warnings.contains("API server"), "{warnings}");
            cluster.is_available(node)
        })
        .unwrap();
    }
    cluster.end();
}

#[test]
fn pods_come_and_agents_start_again_through_a_long_outage() {
    let cluster = Cluster::new(2);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    cluster.relays.iter().for_each(Relay::close);
    let text = std::env::var("WEFT_TEST_OUTAGE").unwrap_or_else(|_| "20".into());
    std::thread::sleep(Duration::from_secs(text.parse().expect("WEFT_TEST_OUTAGE is a number of seconds")));
    pods.extend(nodes.iter().map(|node| cluster.attached(node)));
    for node in &nodes {
        node.stop_agent().unwrap();
        node.start_agent().unwrap();
        node.wait_ready(START).unwrap();
        pods.push(cluster.attached(node));
    }
    all_reach_all(&pods);
    cluster.end();
}

/// Takes as long as pods may be missing in what the server says.
#[test]
fn what_a_pod_holds_that_the_cluster_does_not_know_any_more_is_freed() {
    let cluster = Cluster::new(1);
    let node = &cluster.lab.nodes()[0];
    let clock = Arc::new(Clock::new(&node.state_dir().with_file_name("")).unwrap());
    node.configure(|settings| settings.clock = Some(clock.clone()));
    cluster.start();
    let of_cluster = |name| cluster.attached_as(&cluster.make_pod(name, node), node);
    let (stays, vanishes) = (of_cluster("stays"), of_cluster("vanishes"));
    let held = || {
        let told = node.weft_json("pods").unwrap().to_string();
        [&stays, &vanishes].map(|pod| told.contains(pod.container_id()))
    };
    assert_eq!(held(), [true, true]);
    cluster.runtime.block_on(cluster.scene.delete_pod("vanishes"));
    // It takes minutes, which pass faster for the agent than for us.
    let mut passed = 0;
    wait::until("what it held is freed", Duration::from_secs(60), || {
        passed += 2;
        clock.pass(passed)?;
        ensure!(!held()[1]);
        Ok(())
    })
    .unwrap();
    assert_eq!(held(), [true, false]);
    assert!(node.log().contains("its pod does not exist any more"));
    cluster.end();
}
