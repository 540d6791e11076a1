//! Under load: nothing is harmed, and nobody starves.
use std::time::Duration;

use weft_lab::{
    progress::Progress,
    soak::{self, soak},
    traffic::{Arrived, Datagrams, Manner},
};

use crate::harness::{lab, reaches};

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
}

const FLOWS: usize = 16;
