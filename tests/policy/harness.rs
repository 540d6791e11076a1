//! What the tests have in common.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::{fs, net::IpAddr, time::Duration};
use weft_lab::{node::Node, pod::Pod, wait};

/// Has a node know these objects, and no others.
pub fn apply(node: &Node, objects: &[Value]) -> anyhow::Result<()> {
    let file = node.run_dir().join("objects.json");
    fs::write(&file, json!({"kind": "List", "items": objects}).to_string())?;
    weft(node, &["policy", "apply", "--only", "-f", &file.to_string_lossy()]).map(drop)
}

/// What `weft` says on success.
pub fn weft(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    let output = node.weft(arguments)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "weft {arguments:?} on {}: {}", node.name(), stderr.trim());
    String::from_utf8(output.stdout).context("weft's output is not text")
}

pub fn policy(name: &str, spec: Value) -> Value {
    json!({"kind": "NetworkPolicy", "metadata": {"name": name, "namespace": "lab"}, "spec": spec})
}

/// A pod of the lab with a label.
pub fn labelled(pod: &Pod, key: &str, value: &str) -> Value {
    let metadata = json!({"name": pod.netns().name(), "namespace": "lab", "labels": {key: value}});
    json!({"kind": "Pod", "metadata": metadata, "status": {"podIPs": [{"ip": address(pod)}]}})
}

pub fn address(pod: &Pod) -> IpAddr {
    pod.address().expect("the pod is attached")
}

/// Waits until a node has dropped so many packets for its policies' sake.
pub fn wait_dropped(node: &Node, least: u64) -> anyhow::Result<u64> {
    wait::until("packets are dropped", Duration::from_secs(10), || {
        let dropped = weft_lab::policy::packets::dropped_on(node)?;
        ensure!(dropped >= least, "{dropped} were");
        Ok(dropped)
    })
}
