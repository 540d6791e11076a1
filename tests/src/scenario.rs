//! What happens to a network, and how long its users notice: each scenario is a test, and is measured by
//! `cargo lab chaos --scenario NAME`.
//!
//! Times run from the moment of the fault, or of its end, until a ping goes through or an agent says so.
mod place;
mod size;

pub use place::{endpoints, renumber};
pub use size::{differing, jumbo, mtu};

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::{Lab, fault::Fault, node::Node, pod::Pod, wait};

/// A name, and what happens.
pub struct Scenario {
    pub name: &'static str,
    /// Where something lasts as long as one likes, it lasts that long.
    pub run: fn(Duration) -> anyhow::Result<Vec<Measured>>,
}

/// How long something took, and how long it may take.
#[derive(Clone, Debug)]
pub struct Measured {
    pub what: &'static str,
    pub took: Duration,
    pub most: Duration,
}

pub const ALL: [Scenario; 10] = [
    Scenario { name: "relay", run: |_| relay() },
    Scenario { name: "relay-ipv6", run: |_| relay_ipv6() },
    Scenario { name: "outage", run: outage },
    Scenario { name: "kill", run: |_| kill() },
    Scenario { name: "chain", run: |_| chain() },
    Scenario { name: "mtu", run: |_| mtu() },
    Scenario { name: "jumbo", run: |_| jumbo() },
    Scenario { name: "differing", run: |_| differing() },
    Scenario { name: "move", run: |_| renumber() },
    Scenario { name: "endpoints", run: |_| endpoints() },
];

/// No data passes between two of three nodes: the third relays it until it does.
pub fn relay() -> anyhow::Result<Vec<Measured>> {
    relayed(lab(3)?)
}

/// The same with pods and nodes that have IPv6 addresses.
pub fn relay_ipv6() -> anyhow::Result<Vec<Measured>> {
    let lab = Lab::builder().nodes(3).pods(1).universe("fd00:77::/64").without_agents().start()?;
    let nodes = lab.nodes();
    let plug =
        |(node, number): (&std::sync::Arc<Node>, usize)| lab.underlay().plug_ipv6(node.netns(), number);
    let addresses = nodes.iter().zip(1..).map(plug).collect::<anyhow::Result<Vec<_>>>()?;
    for (node, own) in nodes.iter().zip(&addresses) {
        let others = addresses.iter().filter(|other| *other != own).map(|other| format!("[{other}]"));
        let peers = others.collect();
        node.configure(|settings| (settings.advertise, settings.peers) = (own.to_string(), peers));
        node.start_agent()?;
    }
    nodes.iter().try_for_each(|node| node.wait_ready(START))?;
    lab.pods().iter().try_for_each(|pod| pod.attach().map(drop))?;
    relayed(lab)
}

fn relayed(lab: Lab) -> anyhow::Result<Vec<Measured>> {
    let [a, b, c] = nodes(&lab)?;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    meet(&lab)?;
    let cut = Fault::no_data(lab.underlay(), &a, &b)?;
    let start = Instant::now();
    wait::until("packets are relayed", LONG, || from.ping(to.address()?, PING))?;
    let relayed = start.elapsed();
    wait::until("both say so", LONG, || {
        says(&a, &b, "relayed")?;
        says(&b, &a, "relayed")
    })?;
    let by = a.weft_json("peers")?;
    let by = by["peers"].as_array().context("no peers")?.iter().find(|peer| peer["name"] == b.name());
    ensure!(by.context("no such peer")?["via"] == c.name(), "not by the third: {by:?}");
    // A bulk of full size, both ways.
    for (from, to) in [(&from, &to), (&to, &from)] {
        crate::traffic::transfer(from.netns(), to.netns(), to.address()?, 4 << 20, Duration::from_secs(20))?;
    }
    let passed = metric(&c, "weft_relayed_packets_total")?;
    ensure!(passed > 100.0, "n3 has passed on {passed} packets");
    drop(cut);
    let start = Instant::now();
    wait::until("packets go directly again", LONG, || {
        says(&a, &b, "direct")?;
        says(&b, &a, "direct")
    })?;
    let direct = start.elapsed();
    from.ping(to.address()?, SOON)?;
    lab.finish()?;
    Ok(vec![
        Measured { what: "traffic flows again, relayed", took: relayed, most: Duration::from_millis(1500) },
        Measured { what: "healed: direct again", took: direct, most: Duration::from_secs(1) },
    ])
}

/// Two nodes alone lose each other for a while.
pub fn outage(lasting: Duration) -> anyhow::Result<Vec<Measured>> {
    let lab = lab(2)?;
    let [a, b] = nodes(&lab)?;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    meet(&lab)?;
    let cut = Fault::partition(lab.underlay(), &[&a], &[&b])?;
    let start = Instant::now();
    wait::until("both say that the other is down", LONG, || {
        says(&a, &b, "down")?;
        says(&b, &a, "down")
    })?;
    let noticed = start.elapsed();
    wait::until("the outage lasts", 2 * lasting + SOON, || {
        ensure!(from.ping(to.address()?, PING).is_err(), "a ping goes through");
        ensure!(start.elapsed() >= lasting);
        Ok(())
    })?;
    drop(cut);
    let start = Instant::now();
    wait::until("packets flow again", LONG, || from.ping(to.address()?, PING))?;
    let back = start.elapsed();
    wait::until("control links are back", Duration::from_secs(5), || {
        ensure!(metric(&a, "weft_links")? == 1.0 && metric(&b, "weft_links")? == 1.0);
        Ok(())
    })?;
    let linked = start.elapsed();
    lab.finish()?;
    Ok(vec![
        Measured { what: "said to be down", took: noticed, most: Duration::from_millis(1500) },
        Measured { what: "healed: traffic flows again", took: back, most: Duration::from_secs(1) },
        Measured { what: "healed: linked again", took: linked, most: Duration::from_secs(2) },
    ])
}

/// A node dies.
pub fn kill() -> anyhow::Result<Vec<Measured>> {
    let lab = lab(3)?;
    let [a, b, c] = nodes(&lab)?;
    meet(&lab)?;
    c.kill_agent()?;
    let start = Instant::now();
    wait::until("both others say so", LONG, || {
        says(&a, &c, "down")?;
        says(&b, &c, "down")
    })?;
    let noticed = start.elapsed();
    lab.finish()?;
    Ok(vec![Measured { what: "others say so", took: noticed, most: Duration::from_millis(1500) }])
}

/// Four nodes of which each reaches only its neighbours: packets pass two relays.
pub fn chain() -> anyhow::Result<Vec<Measured>> {
    let lab = Lab::builder().nodes(4).pods(1).without_agents().start()?;
    let [a, b, c, d] = nodes(&lab)?;
    let cut = Fault::partition(lab.underlay(), &[&a], &[&c, &d])?;
    let cut_too = Fault::partition(lab.underlay(), &[&b], &[&d])?;
    for node in [&a, &b, &c, &d] {
        node.start_agent()?;
    }
    for node in [&a, &b, &c, &d] {
        node.wait_ready(START)?;
    }
    lab.pods().iter().try_for_each(|pod| pod.attach().map(drop))?;
    let start = Instant::now();
    for from in lab.pods() {
        for to in lab.pods().iter().filter(|to| to.full_name() != from.full_name()) {
            let what = format!("{} reaches {}", from.full_name(), to.full_name());
            wait::until(&what, Duration::from_secs(15), || from.ping(to.address()?, PING))?;
        }
    }
    let met = start.elapsed();
    says(&a, &d, "relayed")?;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n4/p1")?);
    crate::traffic::transfer(from.netns(), to.netns(), to.address()?, 2 << 20, Duration::from_secs(20))?;
    for relay in [&b, &c] {
        ensure!(metric(relay, "weft_relayed_packets_total")? > 100.0, "{} relays nothing", relay.name());
        let circles = metric(relay, "weft_drops_total{reason=\"relay_expired\"}")?;
        ensure!(circles == 0.0, "{circles} packets went in circles");
    }
    drop((cut, cut_too));
    lab.finish()?;
    Ok(vec![Measured { what: "everybody reaches everybody", took: met, most: Duration::from_secs(15) }])
}

fn lab(nodes: usize) -> anyhow::Result<Lab> {
    Lab::builder().nodes(nodes).pods(1).start()
}

fn nodes<const N: usize>(lab: &Lab) -> anyhow::Result<[std::sync::Arc<Node>; N]> {
    lab.nodes().try_into().map_err(|_| anyhow::anyhow!("the lab has not {N} nodes"))
}

/// Every pod reaches every other, and every path has been measured by both ends.
fn meet(lab: &Lab) -> anyhow::Result<()> {
    let pods = lab.pods();
    let ping = |from: &Pod, to: &Pod| {
        let what = format!("{} reaches {}", from.full_name(), to.full_name());
        wait::until(&what, LONG, || from.ping(to.address()?, PING))
    };
    for from in &pods {
        for to in pods.iter().filter(|to| to.full_name() != from.full_name()) {
            ping(from, to)?;
        }
    }
    let others = pods.len() - 1;
    let mut told = (Vec::new(), Instant::now());
    wait::until("everybody has measured everybody, and has heard so", LONG, || {
        for node in lab.nodes() {
            let (_, page) = node.http("/metrics")?;
            let measured =
                page.lines().filter(|line| line.starts_with("weft_peer_path_rtt_seconds{")).count();
            ensure!(measured == others, "{} has measured {measured}", node.name());
        }
        let merged =
            |node: &std::sync::Arc<Node>| metric(node, "weft_gossip_events_total{event=\"items_merged\"}");
        let now = lab.nodes().iter().map(merged).collect::<anyhow::Result<Vec<_>>>()?;
        if now != told.0 {
            told = (now, Instant::now());
        }
        ensure!(told.1.elapsed() >= QUIET, "there is still news");
        Ok(())
    })
}

/// Whether the node says so of the path to the peer.
pub(crate) fn says(node: &Node, peer: &Node, path: &str) -> anyhow::Result<()> {
    let (_, page) = node.http("/metrics")?;
    let line = format!("weft_peer_path{{peer=\"{}\",path=\"{path}\"}} 1", peer.name());
    let found =
        page.lines().find(|line| line.starts_with(&format!("weft_peer_path{{peer=\"{}\"", peer.name())));
    ensure!(page.lines().any(|other| other == line), "{} says {found:?}", node.name());
    Ok(())
}

pub(crate) fn metric(node: &Node, name: &str) -> anyhow::Result<f64> {
    let (_, page) = node.http("/metrics")?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("{} has no {name}", node.name()))?.parse()?)
}

/// Longer than neighbours that have changed are kept back.
const QUIET: Duration = Duration::from_millis(1500);
/// For one echo.
const PING: Duration = Duration::from_millis(50);
/// For what takes milliseconds when all is well.
const SOON: Duration = Duration::from_secs(5);
/// From an agent's start until ADD would work.
const START: Duration = Duration::from_secs(20);
/// Longer than anything here may take.
const LONG: Duration = Duration::from_secs(10);
