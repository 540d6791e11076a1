//! What an operator sees of a node: the kernel's objects, the agent's lists, the process.
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    process::Command,
};

use anyhow::{Context, ensure};
use serde_json::Value;
use weft::linux::netlink::{Family, Netlink, NetlinkError};
use weft_lab::{namespace::Netns, node::Node, process::Process, tools};

/// Links, Weft's routes, permanent neighbours, static bridge entries and the firewall of a node, a line each: so that
/// what was left behind, or is missing, is the difference of two sets.
pub fn kernel(node: &Node) -> anyhow::Result<BTreeSet<String>> {
    let mut lines = node.netns().run(|| Ok(on_runtime(routing())??))?;
    let nft = tools::find("nft").context("there is no nft")?;
    let mut list = Command::new(nft);
    list.args(["--stateless", "list", "ruleset"]);
    let rules = node.exec(list)?;
    ensure!(rules.status.success(), "nft: {}", String::from_utf8_lossy(&rules.stderr));
    lines.extend(String::from_utf8_lossy(&rules.stdout).lines().map(|line| format!("nft {}", line.trim())));
    Ok(lines)
}

/// Names of the links in a namespace.
pub fn links(netns: &Netns) -> anyhow::Result<Vec<String>> {
    netns.links(async |links| links.names().await)
}

/// Container id → address and state, of all pods that the agent knows.
pub fn pods(node: &Node) -> anyhow::Result<BTreeMap<String, (IpAddr, String)>> {
    let list = node.weft_json("pods")?;
    let pod = |pod: &Value| {
        let address = pod["addresses"][0].as_str()?.parse().ok()?;
        Some((pod["container_id"].as_str()?.into(), (address, pod["state"].as_str()?.into())))
    };
    let pods = list["pods"].as_array().context("no list of pods")?;
    pods.iter().map(|entry| pod(entry).with_context(|| format!("not a pod: {entry}"))).collect()
}

/// What the agent has dropped so far, by reason.
pub fn drops(node: &Node) -> anyhow::Result<BTreeMap<String, u64>> {
    let status = node.status()?;
    let counters = status["counters"].as_object().context("no counters")?.iter();
    Ok(counters.filter_map(|(name, n)| Some((name.strip_prefix("drops/")?.into(), n.as_u64()?))).collect())
}

/// One number of `/metrics`; `name` comes with its labels, if it has any.
pub fn metric(node: &Node, name: &str) -> anyhow::Result<f64> {
    let (_, page) = node.http("/metrics")?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("there is no {name} in\n{page}"))?.parse()?)
}

/// What DELs without an agent have left for it to do.
pub fn tombstones(node: &Node) -> Vec<String> {
    let files = fs::read_dir(node.run_dir().join("tombstones")).into_iter().flatten().flatten();
    files.map(|file| file.file_name().to_string_lossy().into_owned()).collect()
}

/// Memory that a process has in use, in bytes.
pub fn resident(process: Process) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has ended")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

fn on_runtime<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work))
}

async fn routing() -> Result<BTreeSet<String>, NetlinkError> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let name = |index: u32| {
        let link = links.iter().find(|link| link.index == index);
        link.map_or_else(|| format!("link number {index}"), |link| link.name.clone())
    };
    let mut lines = BTreeSet::new();
    for link in &links {
        let of = link.master.map(|bridge| format!(", a port of {}", name(bridge))).unwrap_or_default();
        lines.insert(format!("link {}{of}", link.name));
    }
    for family in [Family::V4, Family::V6] {
        let ours = netlink.routes(family).await?.into_iter().filter(|route| route.protocol == RTPROT_WEFT);
        lines.extend(ours.map(|route| format!("route {:?}", route.with_link(route.link.map(name)))));
    }
    let permanent = netlink.neighbours().await?.into_iter().filter(|neighbour| neighbour.permanent);
    lines.extend(permanent.map(|n| format!("neighbour {} at {} on {}", n.address, n.mac, name(n.link))));
    let fixed = netlink.fdb().await?.into_iter().filter(|entry| entry.is_static);
    lines.extend(fixed.map(|entry| format!("MAC {} behind {}", entry.mac, name(entry.port))));
    Ok(lines)
}

/// Protocol number of Weft's routes.
const RTPROT_WEFT: u8 = 99;
