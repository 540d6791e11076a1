//! Under load: nothing is harmed, and nobody starves.
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::time::clock_getcpuclockid;
use weft_lab::{
    process::Process,
    progress::Progress,
    soak::{self, soak},
    traffic::{Arrived, Datagrams, Manner},
};

use crate::harness::{lab, metric, reaches};

#[test]
fn traffic_over_a_bad_network_with_restarts_arrives_unharmed() {
    let options = soak::Options { gigabytes: 1.0, data_threads: 4, restart_every: 2.0, no_install: true };
    let soaked = soak(&options, &Progress::Quiet).unwrap();
    println!("{soaked:?}");
    assert!(soaked.restarts > 0);
}

#[test]
fn a_flood_of_small_packets_to_one_peer_does_not_starve_another() {
    let lab = lab(3, 1);
    let (from, flooded, other) = (
        lab.add_pod(&lab.node("n1").unwrap()).unwrap(),
        lab.pod("n2/p1").unwrap(),
        lab.pod("n3/p1").unwrap(),
    );
    from.attach().unwrap();
    reaches(&from, &flooded);
    reaches(&lab.pod("n1/p1").unwrap(), &other);
    let flood = Manner { per_second: 2_000_000, size: 16, at_once: 1 };
    let flood = Datagrams::start(from.netns(), flooded.netns(), flooded.address().unwrap(), flood).unwrap();
    // Some may share the flood's queue; most must not.
    let gentle = Manner { per_second: 500, size: 200, at_once: 1 };
    let sender = lab.pod("n1/p1").unwrap();
    let flows: Vec<_> = (0..FLOWS)
        .map(|_| Datagrams::start(sender.netns(), other.netns(), other.address().unwrap(), gentle).unwrap())
        .collect();
    let soon = Duration::from_secs(20);
    weft_lab::wait::until("the flood is on", soon, || {
        anyhow::ensure!(flows.iter().all(|flow| flow.received() > 800), "too few");
        Ok(())
    })
    .unwrap();
    let mut losses: Vec<_> = flows.into_iter().map(|flow| flow.finish().unwrap().loss()).collect();
    let flood: Arrived = flood.finish().unwrap();
    losses.sort_by(f64::total_cmp);
    println!("the flood: {flood:?}; losses of the others: {losses:.4?}");
    assert!(losses[FLOWS / 2] < 0.01, "{losses:?}");
    let drops = |node: &str, reason: &str| {
        let metric = metric(&lab.node(node).unwrap(), &format!("weft_drops_total{{reason=\"{reason}\"}}"));
        metric.unwrap() as u64
    };
    let counted = drops("n1", "tun_queue_full") + drops("n2", "receive_buffer_full");
    println!("counted by the kernel: {counted}");
    assert!(counted > 0 || flood.loss() < 0.01, "{flood:?}");
}

/// How long each time takes is the machine's; who polls or spins is awake for more than a fiftieth of any.
#[test]
fn an_idle_agent_is_woken_by_little_more_than_its_probes() {
    let lab = lab(3, 1);
    let agents: Vec<_> = lab.nodes().iter().map(|node| node.agent_process().unwrap()).collect();
    lab.pods().iter().for_each(|pod| reaches(&lab.pod("n1/p1").unwrap(), pod));
    let count = || agents.iter().map(|agent| Awake::of(agent).unwrap()).collect::<Vec<_>>();
    let (mut before, mut start) = (count(), Instant::now());
    // What starting left to do, and what else this machine does, may spoil a window or two.
    weft_lab::wait::until("all agents are idle", 8 * WINDOW, || {
        let took = start.elapsed();
        anyhow::ensure!(took >= WINDOW, "a window is not over");
        let after = count();
        let rates: Vec<_> =
            before.iter().zip(&after).map(|(before, after)| after.since(before, took)).collect();
        (before, start) = (after, Instant::now());
        println!("times a second, and of a core: {rates:.4?}");
        anyhow::ensure!(rates.iter().all(|(times, share)| *times < 50.0 && *share < 0.02), "{rates:.4?}");
        Ok(())
    })
    .unwrap();
}

/// How often all threads of a process have slept, and for how long it was awake.
struct Awake {
    times: u64,
    time: Duration,
}

impl Awake {
    fn of(process: &Process) -> anyhow::Result<Self> {
        let threads = fs::read_dir(format!("/proc/{}/task", process.pid))?;
        let times = threads.map(|thread| sleeps(&thread?.path())).sum::<anyhow::Result<u64>>()?;
        Ok(Self { times, time: clock_getcpuclockid(process.pid)?.now()?.into() })
    }

    fn since(&self, before: &Self, took: Duration) -> (f64, f64) {
        let times = self.times.saturating_sub(before.times) as f64 / took.as_secs_f64();
        (times, (self.time - before.time).div_duration_f64(took))
    }
}

fn sleeps(thread: &Path) -> anyhow::Result<u64> {
    // It may have ended since it was listed.
    let Ok(status) = fs::read_to_string(thread.join("status")) else { return Ok(0) };
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(count.context("a thread's status says nothing of its switches")?.trim().parse()?)
}

const WINDOW: Duration = Duration::from_secs(5);
const FLOWS: usize = 16;
