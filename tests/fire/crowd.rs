//! Sixty real agents on one machine.
use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use weft_lab::{Lab, node::Node, wait};

use crate::harness::reaches;

#[test]
fn sixty_agents_find_each_other_reach_each_other_and_take_little_memory() {
    let lab = Lab::builder().nodes(NODES).without_agents().start().unwrap();
    let nodes = lab.nodes();
    nodes.iter().for_each(|node| node.start_agent().unwrap());
    wait::until("all know all", PATIENCE, || {
        for node in &nodes {
            let status = node.status()?;
            ensure!(status["ready"] == true && status["peers"] == NODES - 1, "{}: {status}", node.name());
            ensure!(status["links"].as_u64().is_some_and(|links| links < 30), "{}: {status}", node.name());
        }
        Ok(())
    })
    .unwrap();
    let pods: Vec<_> = nodes
        .iter()
        .map(|node| {
            let pod = lab.add_pod(node).unwrap();
            pod.attach().unwrap();
            pod
        })
        .collect();
    for (at, pod) in pods.iter().enumerate() {
        reaches(pod, &pods[(at + 1) % NODES]);
        reaches(pod, &pods[(at + NODES / 2) % NODES]);
    }
    // They are idle from now on. What only the start needed is given back a little after it.
    let mut resident = Vec::new();
    let settled = wait::until("idle agents take little memory", SETTLED, || {
        resident = nodes.iter().map(|node| memory(node)).collect::<anyhow::Result<Vec<_>>>()?;
        resident.sort_unstable();
        ensure!(resident[NODES - 1] < MOST, "{resident:?} KiB");
        Ok(())
    });
    println!("memory of {NODES} agents: {} to {} KiB", resident[0], resident[NODES - 1]);
    settled.unwrap();
    lab.finish().unwrap();
}

/// Resident memory of a node's agent in KiB.
fn memory(node: &Node) -> anyhow::Result<u64> {
    let pid = node.agent_process().context("it runs")?.pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

const NODES: usize = 60;
/// Resident memory of an idle agent, in KiB.
const MOST: u64 = 20 << 10;
const SETTLED: Duration = Duration::from_secs(30);
/// All agents share the machine's few processors while they start.
const PATIENCE: Duration = Duration::from_secs(60);
