//! Under load: nothing is harmed, and nobody starves.
use std::time::{Duration, Instant};

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

#[test]
fn an_idle_agent_takes_no_more_than_a_five_hundredth_of_a_core() {
    let lab = lab(3, 1);
    let agents: Vec<_> = lab.nodes().iter().map(|node| node.agent_process().unwrap()).collect();
    lab.pods().iter().for_each(|pod| reaches(&lab.pod("n1/p1").unwrap(), pod));
    let used = || agents.iter().map(|agent| processor_time(agent).unwrap()).collect::<Vec<_>>();
    let (mut before, mut start) = (used(), Instant::now());
    // What starting left to do, and what else this machine does, may spoil a window or two.
    weft_lab::wait::until("all agents are idle", 8 * WINDOW, || {
        let took = start.elapsed();
        anyhow::ensure!(took >= WINDOW, "a window is not over");
        let after = used();
        let share = |(before, after): (&Duration, &Duration)| (*after - *before).div_duration_f64(took);
        let shares: Vec<_> = before.iter().zip(&after).map(share).collect();
        (before, start) = (after, Instant::now());
        println!("of a core: {shares:.5?}");
        anyhow::ensure!(shares.iter().all(|share| *share <= 0.002), "of a core: {shares:.5?}");
        Ok(())
    })
    .unwrap();
}

/// Of all threads, those that have ended too.
fn processor_time(process: &Process) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(process.pid)?;
    Ok(clock.now()?.into())
}

const WINDOW: Duration = Duration::from_secs(5);
const FLOWS: usize = 16;
