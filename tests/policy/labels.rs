//! Whom policies are for on plain hosts: what runtimes say of pods, and which addresses are nodes'.
use crate::harness::{address, apply, policy, weft};
use serde_json::{Value, json};
use std::{
    net::{IpAddr, TcpListener, TcpStream},
    time::Duration,
};
use weft_lab::{Lab, wait};

#[test]
fn a_pod_has_the_labels_of_its_network_configuration_until_somebody_says_otherwise() {
    let lab = Lab::builder().nodes(1).start().unwrap();
    let node = lab.node("n1").unwrap();
    let closed = policy("closed", json!({"podSelector": {"matchLabels": {"role": "server"}}}));
    apply(&node, &[closed]).unwrap();
    let pod = lab.add_pod(&node).unwrap();
    let mut call = pod.call("ADD");
    let mut config: Value = serde_json::from_slice(&call.stdin).unwrap();
    config["args"] = json!({"cni": {"labels": [{"key": "role", "value": "server"}]}});
    call.stdin = config.to_string().into_bytes();
    call.run(&node).unwrap().check("ADD").unwrap();
    let name = format!("lab/{}", pod.netns().name());
    let said = || weft(&node, &["policy", "explain", "198.51.100.1", &format!("{name}:80/TCP")]).unwrap();
    assert!(said().contains("isolated by NetworkPolicy lab/closed"), "{}", said());

    node.kill_agent().unwrap();
    node.start_agent().unwrap();
    node.wait_ready(Duration::from_secs(20)).unwrap();
    assert!(said().contains("isolated by NetworkPolicy lab/closed"), "{}", said());
    weft(&node, &["pods", "label", &name, "role=client"]).unwrap();
    assert!(!said().contains("denied"), "{}", said());
    pod.detach().unwrap();
    lab.finish().unwrap();
}

#[test]
fn a_remote_nodes_bridge_counts_as_that_node() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let serving = lab.pod("n2/p1").unwrap();
    let listener = serving.netns().run(|| Ok(TcpListener::bind((address(&serving), 8000))?)).unwrap();
    let target = listener.local_addr().unwrap();
    let connect = |within| n1.netns().run(|| Ok(TcpStream::connect_timeout(&target, within)?));
    let from = |allowed: IpAddr| {
        let cidr = format!("{allowed}/{}", if allowed.is_ipv4() { 32 } else { 128 });
        policy("nodes", json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": cidr}}]}]}))
    };
    apply(&n2, &[from(n2.address())]).unwrap();
    assert!(connect(Duration::from_secs(1)).is_err());
    apply(&n2, &[from(n1.address())]).unwrap();
    wait::until("n1 counts as itself", Duration::from_secs(10), || connect(Duration::from_secs(1))).unwrap();
    lab.finish().unwrap();
}
