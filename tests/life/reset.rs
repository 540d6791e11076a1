//! `weft reset`: the addresses go to a peer, all else goes away.
use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use weft_lab::{Lab, node::Node, pod::Pod, wait};

use crate::{
    harness::{SOON, START, attached, complaint, lab, printed, reaches},
    kernel::Kernel,
};

/// Two nodes, and one that joined them, with a pod; and what the kernel was like there before.
fn with_joiner() -> (Lab, Arc<Node>, Arc<Pod>, Kernel) {
    let lab = lab(2, 1);
    let node = lab.add_node().unwrap();
    // Something to be put back.
    node.netns().sysctl("net/ipv4/conf/all/send_redirects", "1").unwrap();
    node.netns().sysctl("net/ipv4/conf/eth0/forwarding", "0").unwrap();
    let before = Kernel::of(&node);
    let pod = join(&lab, &node);
    assert!(Kernel::of(&node) != before);
    (lab, node, pod, before)
}

fn join(lab: &Lab, node: &Arc<Node>) -> Arc<Pod> {
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    let pod = attached(lab, node);
    reaches(&pod, &lab.pod("n1/p1").unwrap());
    pod
}

fn ranges_of(node: &Node, owner: &str) -> anyhow::Result<Vec<String>> {
    let ipam = node.weft_json("ipam")?;
    let ranges = ipam["ranges"].as_array().context("ranges")?.clone();
    let prefix = |range: &Value| range["prefix"].as_str().expect("a prefix").to_owned();
    Ok(ranges.iter().filter(|range| range["owner"] == owner).map(prefix).collect())
}

fn nothing_is_left(node: &Node, before: &Kernel) {
    Kernel::of(node).assert_is(before);
    assert!(!node.state_dir().exists() && !node.run_dir().exists());
}

#[test]
fn a_reset_node_hands_its_addresses_to_a_peer_and_leaves_nothing() {
    let (lab, node, pod, before) = with_joiner();
    let refusal = complaint(node.weft(&["reset"]).unwrap());
    assert!(refusal.contains("1 pod") && refusal.contains("--force"), "{refusal}");
    node.check_agent().unwrap();
    reaches(&pod, &lab.pod("n2/p1").unwrap());

    pod.detach().unwrap();
    lab.remove_pod(&pod);
    drop(pod);
    let ranges = ranges_of(&node, "n3").unwrap();
    assert!(!ranges.is_empty());
    let said = printed(node.weft(&["reset"]).unwrap()).unwrap();
    nothing_is_left(&node, &before);
    assert!(node.wait_agent_end(SOON).unwrap().success());
    let heir = said.lines().find_map(|line| line.strip_prefix("addresses handed to ")).unwrap();
    assert!(said.contains("agent stopped") && said.contains("bridge weft"), "{said}");

    let heir = lab.node(heir).unwrap();
    wait::until("all know that n3 has left and who has its addresses", SOON, || {
        for other in ["n1", "n2"] {
            ensure!(ranges_of(&*lab.node(other)?, "n3")?.is_empty());
            ensure!(lab.node(other)?.status()?["peers"] == 1);
        }
        Ok(())
    })
    .unwrap();
    let inherited = nth(&ranges[0], 9);
    let heirs_pod = lab.add_pod(&heir).unwrap();
    let mut add = heirs_pod.call("ADD");
    let mut config: Value = serde_json::from_slice(&add.stdin).unwrap();
    config["runtimeConfig"] = json!({ "ips": [inherited] });
    add.stdin = config.to_string().into_bytes();
    let answer = add.run(&heir).unwrap();
    answer.check("ADD with an inherited address").unwrap();
    assert!(answer.stdout.contains(&inherited), "{}", answer.stdout);
    let address = inherited.parse().unwrap();
    let other = lab.pods().into_iter().find(|pod| pod.node().name() != heir.name()).unwrap();
    wait::until("the new pod answers", SOON, || other.ping(address, Duration::from_millis(500))).unwrap();

    join(&lab, &node);
}

#[test]
fn a_node_with_pods_is_reset_by_force() {
    let (lab, node, pod, before) = with_joiner();
    let said = printed(node.weft(&["reset", "--force"]).unwrap()).unwrap();
    assert!(said.contains("addresses handed to n"), "{said}");
    nothing_is_left(&node, &before);
    assert!(node.wait_agent_end(SOON).unwrap().success());
    assert_eq!(pod.netns().links(async |links| links.names().await).unwrap(), ["lo"]);
    lab.remove_pod(&pod);
    drop(pod);
    join(&lab, &node);
}

#[test]
fn without_an_agent_only_force_cleans_up() {
    let (lab, node, pod, before) = with_joiner();
    node.kill_agent().unwrap();
    let standing = Kernel::of(&node);
    let refusal = complaint(node.weft(&["reset"]).unwrap());
    assert!(refusal.contains("no agent answers on") && refusal.contains("--force"), "{refusal}");
    Kernel::of(&node).assert_is(&standing);
    assert!(node.state_dir().exists());

    printed(node.weft(&["reset", "--force"]).unwrap()).unwrap();
    nothing_is_left(&node, &before);
    assert_eq!(pod.netns().links(async |links| links.names().await).unwrap(), ["lo"]);
    // There is nothing to do the second time.
    assert_eq!(printed(node.weft(&["reset"]).unwrap()).unwrap(), "");
    lab.remove_pod(&pod);
    drop(pod);
    join(&lab, &node);
}

/// The address so many places behind a prefix's first.
fn nth(prefix: &str, places: u32) -> String {
    let network: ipnet::Ipv4Net = prefix.parse().unwrap();
    std::net::Ipv4Addr::from(u32::from(network.network()) + places).to_string()
}
