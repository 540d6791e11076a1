//! Nodes that are to be found elsewhere, or at several addresses.
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{LONG, Measured, PING, SOON, START, meet, metric, nodes, says};
use crate::{
    Lab,
    fault::{self, Fault},
    traffic::Stream,
    wait,
};

/// A node gets another address under traffic; then the other one does, whose agent alone would call again.
pub fn renumber() -> anyhow::Result<Vec<Measured>> {
    let lab = Lab::builder().nodes(2).pods(1).without_agents().start()?;
    let nodes: [_; 2] = nodes(&lab)?;
    for node in &nodes {
        node.configure(|settings| settings.advertise.clear());
        node.start_agent()?;
    }
    nodes.iter().try_for_each(|node| node.wait_ready(Duration::from_secs(20)))?;
    lab.pods().iter().try_for_each(|pod| pod.attach().map(drop))?;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    meet(&lab)?;
    let stream = Stream::start(from.netns(), to.netns(), to.address()?, u64::MAX, Duration::from_secs(50))?;
    stream.advances(1 << 20, SOON)?;
    let (mut flows, mut told) = (Duration::ZERO, Duration::ZERO);
    for (number, moved, other) in [(101, &nodes[0], &nodes[1]), (102, &nodes[1], &nodes[0])] {
        fault::renumber(lab.underlay(), moved, number)?;
        let start = Instant::now();
        wait::until("packets flow again", LONG, || from.ping(to.address()?, PING))?;
        flows = flows.max(start.elapsed());
        let endpoint = format!("{}:6783", moved.address());
        wait::until("the other has heard of it", LONG, || {
            let peers = other.weft_json("peers")?;
            let peers = peers["peers"].as_array().context("no peers")?;
            let peer = peers.iter().find(|peer| peer["name"] == moved.name()).context("no such peer")?;
            ensure!(peer["endpoints"][0] == endpoint, "{} says {}", other.name(), peer["endpoints"]);
            ensure!(metric(moved, "weft_links")? == 1.0 && metric(other, "weft_links")? == 1.0);
            Ok(())
        })?;
        told = told.max(start.elapsed());
        ensure!(moved.status()?["endpoints"][0] == endpoint, "its own status has another endpoint");
        stream.advances(1 << 20, SOON)?;
    }
    stream.finish()?;
    lab.finish()?;
    Ok(vec![
        Measured { what: "another address: traffic flows again", took: flows, most: Duration::from_secs(2) },
        Measured { what: "another address: linked again", took: told, most: Duration::from_secs(5) },
    ])
}

/// Two nodes on two networks; one of these fails, and comes back.
pub fn endpoints() -> anyhow::Result<Vec<Measured>> {
    let lab = Lab::builder().nodes(2).pods(1).without_agents().start()?;
    let nodes: [_; 2] = nodes(&lab)?;
    for (node, number) in nodes.iter().zip(1..) {
        let second = lab.underlay().plug_second(node.netns(), number)?;
        node.configure(|settings| settings.advertise = format!("{},{second}", node.address()));
        node.start_agent()?;
    }
    nodes.iter().try_for_each(|node| node.wait_ready(START))?;
    lab.pods().iter().try_for_each(|pod| pod.attach().map(drop))?;
    let [a, b] = &nodes;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    meet(&lab)?;
    let stream = Stream::start(from.netns(), to.netns(), to.address()?, u64::MAX, Duration::from_secs(50))?;
    stream.advances(1 << 20, SOON)?;
    let cut = Fault::first_network(lab.underlay())?;
    let start = Instant::now();
    wait::until("packets take the other network", LONG, || from.ping(to.address()?, PING))?;
    let took = start.elapsed();
    wait::until("both say that it is direct", LONG, || {
        says(a, b, "direct")?;
        says(b, a, "direct")
    })?;
    stream.advances(1 << 20, SOON)?;
    wait::until("control links are back", SOON, || {
        ensure!(metric(a, "weft_links")? == 1.0 && metric(b, "weft_links")? == 1.0);
        Ok(())
    })?;
    let linked = start.elapsed();
    drop(cut);
    stream.finish()?;
    lab.finish()?;
    Ok(vec![
        Measured { what: "one network of two fails: traffic flows", took, most: Duration::from_secs(2) },
        Measured { what: "one network of two fails: linked again", took: linked, most: SOON },
    ])
}
