//! Under load: nothing is harmed, and nobody starves.
use std::time::{Duration, Instant};

use anyhow::Context;
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

#[test]
fn an_idle_agent_takes_no_more_than_a_five_hundredth_of_a_core() {
    let lab = lab(3, 1);
    let agents: Vec<_> = lab.nodes().iter().map(|node| node.agent_process().unwrap()).collect();
    // What starting left to do is done.
    lab.pods().iter().for_each(|pod| reaches(&lab.pod("n1/p1").unwrap(), pod));
    let used = || agents.iter().map(|agent| processor_time(agent).unwrap()).collect::<Vec<_>>();
    let (before, start) = (used(), Instant::now());
    weft_lab::wait::until("some seconds pass", 2 * IDLE, || {
        anyhow::ensure!(start.elapsed() >= IDLE);
        Ok(())
    })
    .unwrap();
    let (took, after) = (start.elapsed(), used());
    for (before, after) in before.into_iter().zip(after) {
        let share = (after - before).as_secs_f64() / took.as_secs_f64();
        println!("{:.3} % of a core", share * 100.0);
        assert!(share <= 0.002, "{:.3} % of a core", share * 100.0);
    }
}

/// Of all threads.
fn processor_time(process: &Process) -> anyhow::Result<Duration> {
    let mut sum = Duration::ZERO;
    for thread in std::fs::read_dir(format!("/proc/{}/task", process.pid))? {
        let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        let nanoseconds = text.split_whitespace().next().context("an empty schedstat")?;
        sum += Duration::from_nanos(nanoseconds.parse()?);
    }
    Ok(sum)
}

const IDLE: Duration = Duration::from_secs(5);
const FLOWS: usize = 16;
