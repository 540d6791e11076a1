//! Sixty real agents on one machine, which no other test has beside them. Needs root.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use weft_lab::{Lab, node::Node, wait};

#[test]
fn sixty_agents_find_each_other_reach_each_other_and_take_little_memory() {
    let lab = Lab::builder().nodes(NODES).without_agents().start().unwrap();
    let nodes = lab.nodes();
    let start = Instant::now();
    nodes.iter().for_each(|node| node.start_agent().unwrap());
    wait::until("all know all", PATIENCE, || {
        for node in &nodes {
            let status = node.status()?;
            ensure!(status["ready"] == true && status["peers"] == NODES - 1, "{}: {status}", node.name());
            ensure!(
                status["links"].as_u64().is_some_and(|links| links < MOST_LINKS),
                "{}: {status}",
                node.name()
            );
        }
        Ok(())
    })
    .unwrap();
    println!("{NODES} agents know each other after {:.1} s", start.elapsed().as_secs_f64());
    let pods: Vec<_> = nodes.iter().map(|node| lab.add_pod(node).unwrap()).collect();
    for pod in &pods {
        pod.attach().unwrap();
    }
    for (at, pod) in pods.iter().enumerate() {
        for other in [1, NODES / 2].map(|distance| &pods[(at + distance) % NODES]) {
            let what = format!("{} reaches {}", pod.full_name(), other.full_name());
            let address = other.address().unwrap();
            wait::until(&what, SOON, || pod.ping(address, SHORT)).unwrap();
        }
    }
    println!("the pods of all reach others after {:.1} s", start.elapsed().as_secs_f64());
    // They are idle from now on, and give back by and by what only the start has needed: then they stay small.
    wait::until("idle agents take little memory", SETTLED, || below(MOST_MEMORY - MARGIN, &nodes)).unwrap();
    for _ in 0..LOOKS {
        thread::sleep(BETWEEN);
        println!("memory of {NODES} agents: {}", below(MOST_MEMORY, &nodes).unwrap());
    }
    lab.finish().unwrap();
}

/// What the agents take, in a few words; an error unless each takes less than so many KiB.
fn below(bound: u64, nodes: &[Arc<Node>]) -> anyhow::Result<String> {
    let mut resident = nodes.iter().map(|node| memory(node)).collect::<anyhow::Result<Vec<_>>>()?;
    resident.sort_unstable();
    let (least, median, most) = (resident[0], resident[NODES / 2], resident[NODES - 1]);
    ensure!(most < bound, "{resident:?} KiB");
    Ok(format!("{least} to {most} KiB, half of them up to {median}"))
}

/// Resident memory of a node's agent in KiB.
fn memory(node: &Node) -> anyhow::Result<u64> {
    let pid = node.agent_process().context("it runs")?.pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

const NODES: usize = 60;
/// What an agent of so many wants, twice, and some.
const MOST_LINKS: u64 = 30;
/// Of an idle agent, in KiB.
const MOST_MEMORY: u64 = 20 << 10;
/// By how much less they show that they have given back what starting took.
const MARGIN: u64 = 1 << 10;
/// All agents share the machine's few processors while they start.
const PATIENCE: Duration = Duration::from_secs(60);
/// Until what they have needed once has been given back.
const SETTLED: Duration = Duration::from_secs(60);
/// Together longer than what they give back once may take to come again, until they give back the next time.
const LOOKS: u32 = 8;
const BETWEEN: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(500);
