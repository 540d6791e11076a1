//! What these tests ask of nodes.
use std::{process::Output, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use weft_lab::{Lab, node::Node, pod::Pod, wait};

/// For what takes milliseconds when all is well.
pub const SOON: Duration = Duration::from_secs(5);
/// From an agent's start until ADD would work, on a busy machine.
pub const START: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(500);

pub fn ranges_of(node: &Node, owner: &str) -> anyhow::Result<Vec<String>> {
    let ipam = node.weft_json("ipam")?;
    let ranges = ipam["ranges"].as_array().context("ranges")?.clone();
    let prefix = |range: &Value| range["prefix"].as_str().expect("a prefix").to_owned();
    Ok(ranges.iter().filter(|range| range["owner"] == owner).map(prefix).collect())
}

/// What a command of `weft` printed, if it succeeded.
pub fn printed(output: Output) -> anyhow::Result<String> {
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{}: {out}{err}", output.status);
    Ok(out)
}

/// The complaint of a command of `weft` that failed.
pub fn complaint(output: Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// ADD of a pod that insists on an address.
pub fn attach_at(pod: &Pod, address: &str) -> anyhow::Result<()> {
    let mut add = pod.call("ADD");
    let mut config: Value = serde_json::from_slice(&add.stdin)?;
    config["runtimeConfig"] = json!({ "ips": [address] });
    add.stdin = config.to_string().into_bytes();
    add.run(pod.node())?.check("ADD with an address that is asked for")
}

/// Adds an attached pod.
pub fn attached(lab: &Lab, node: &Arc<Node>) -> Arc<Pod> {
    let pod = lab.add_pod(node).unwrap();
    pod.attach().unwrap();
    pod
}

/// Waits until the one pod answers the other.
pub fn reaches(from: &Pod, to: &Pod) {
    let what = format!("{} reaches {}", from.full_name(), to.full_name());
    let address = to.address().unwrap();
    wait::until(&what, SOON, || from.ping(address, SHORT)).unwrap();
}

/// The address so many places behind a prefix's first.
pub fn nth(prefix: &str, places: u32) -> String {
    let network: ipnet::Ipv4Net = prefix.parse().unwrap();
    std::net::Ipv4Addr::from(u32::from(network.network()) + places).to_string()
}
