//! Paths that take more or less than they did, or than others do.
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{LONG, Measured, SOON, lab, meet, metric, nodes};
use crate::{
    Lab,
    fault::{self, Fault},
    node::Node,
    traffic::{Stream, path_mtu, transfer, udp_echo},
    wait,
};

/// The way between two nodes takes less, without a word, under a running transfer; then it takes more again.
pub fn mtu() -> anyhow::Result<Vec<Measured>> {
    let lab = lab(2)?;
    let [a, b] = nodes(&lab)?;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    // Or the switch would see super-packets, and drop them as too large.
    [&a, &b].into_iter().try_for_each(|node| fault::segmentation(node, false))?;
    meet(&lab)?;
    let limit = Duration::from_secs(50);
    let stream = Stream::start(from.netns(), to.netns(), to.address()?, u64::MAX, limit)?;
    stream.advances(1 << 20, SOON)?;
    let narrow = Fault::narrow(lab.underlay(), &a, &b, 1300)?;
    let start = Instant::now();
    wait::until("the path is known to be narrow", LONG, || {
        let told = metric(&a, "weft_peer_mtu_bytes{peer=\"n2\"}")?;
        ensure!(told <= 1240.0, "{told} bytes");
        Ok(())
    })?;
    let shrunk = start.elapsed();
    stream.advances(1 << 20, Duration::from_secs(10)).context("TCP goes on")?;
    wait::until("it is known how narrow", LONG, || takes(&a, "n2", 1240.0))?;
    drop(narrow);
    let start = Instant::now();
    wait::until("the path grows", Duration::from_secs(20), || takes(&a, "n2", 1440.0))?;
    let grown = start.elapsed();
    stream.advances(1 << 20, SOON)?;
    stream.finish()?;
    lab.finish()?;
    Ok(vec![
        Measured { what: "1500 to 1300: known", took: shrunk, most: Duration::from_secs(2) },
        Measured { what: "1300 to 1500: known", took: grown, most: Duration::from_secs(15) },
    ])
}

/// Cables of 9,000 bytes with something narrower between them at first, which goes away.
pub fn jumbo() -> anyhow::Result<Vec<Measured>> {
    let lab = Lab::builder().nodes(2).pods(1).underlay_mtu("n1", 9000).underlay_mtu("n2", 9000).start()?;
    let [a, b] = nodes(&lab)?;
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    [&a, &b].into_iter().try_for_each(|node| fault::segmentation(node, false))?;
    let narrow = Fault::narrow(lab.underlay(), &a, &b, 1500)?;
    meet(&lab)?;
    let stream = Stream::start(from.netns(), to.netns(), to.address()?, u64::MAX, Duration::from_secs(50))?;
    wait::until("it is known how narrow", LONG, || takes(&a, "n2", 1440.0))?;
    stream.advances(1 << 20, LONG)?;
    drop(narrow);
    let start = Instant::now();
    wait::until("the path grows", Duration::from_secs(20), || {
        takes(&a, "n2", 8940.0)?;
        takes(&b, "n1", 8940.0)
    })?;
    let grown = start.elapsed();
    stream.advances(1 << 20, SOON)?;
    stream.finish()?;
    // As large as the pods' MTU allows, in one piece.
    udp_echo(from.netns(), to.netns(), to.address()?, (20, 8940 - 28), SOON)?;
    lab.finish()?;
    Ok(vec![Measured { what: "1500 to 9000: known", took: grown, most: Duration::from_secs(15) }])
}

/// Of a node's two peers one is behind something narrow: only packets to that one are told so.
pub fn differing() -> anyhow::Result<Vec<Measured>> {
    let lab = lab(3)?;
    let [a, b, c] = nodes(&lab)?;
    let [from, narrow, wide] = ["n1/p1", "n2/p1", "n3/p1"].map(|name| lab.pod(name));
    let (from, narrow, wide) = (from?, narrow?, wide?);
    [&a, &b, &c].into_iter().try_for_each(|node| fault::segmentation(node, false))?;
    meet(&lab)?;
    let fault = Fault::narrow(lab.underlay(), &a, &b, 1300)?;
    let start = Instant::now();
    let stream =
        Stream::start(from.netns(), narrow.netns(), narrow.address()?, u64::MAX, Duration::from_secs(50))?;
    wait::until("it is known which path is narrow", LONG, || {
        takes(&a, "n2", 1240.0)?;
        takes(&a, "n3", 1440.0)
    })?;
    let known = start.elapsed();
    stream.advances(1 << 20, LONG)?;
    stream.finish()?;
    let told = path_mtu(from.netns(), "eth0", narrow.address()?, SOON)?;
    // What it was told first it believes for some minutes.
    ensure!((1000..=1240).contains(&told.path), "the pod is told {} bytes", told.path);
    udp_echo(from.netns(), wide.netns(), wide.address()?, (20, 1440 - 28), SOON)?;
    transfer(narrow.netns(), wide.netns(), wide.address()?, 4 << 20, Duration::from_secs(20))?;
    drop(fault);
    lab.finish()?;
    Ok(vec![Measured { what: "one path of two narrow: known", took: known, most: Duration::from_secs(4) }])
}

/// Whether a node says that the path to a peer takes inner packets of that size.
fn takes(node: &Node, peer: &str, mtu: f64) -> anyhow::Result<()> {
    let told = metric(node, &format!("weft_peer_mtu_bytes{{peer=\"{peer}\"}}"))?;
    ensure!(told == mtu, "{} to {peer}: {told} bytes", node.name());
    Ok(())
}
