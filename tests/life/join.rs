//! How a node becomes part of a network that runs.
use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use weft_lab::wait::{self, Deadline};

use crate::harness::{SHORT, attached, lab, reaches};

#[test]
fn a_joiner_with_one_peer_reaches_everybody_within_two_seconds() {
    let lab = lab(5, 1);
    let elders = lab.pods();
    let joiner = lab.add_node().unwrap();
    let pod = lab.add_pod(&joiner).unwrap();

    let start = Instant::now();
    joiner.start_agent().unwrap();
    wait::until("ADD works", WITHIN, || pod.attach()).unwrap();
    let added = start.elapsed();
    let deadline = Deadline::after(WITHIN.saturating_sub(added));
    let address = pod.address().unwrap();
    thread::scope(|scope| {
        for elder in &elders {
            let pod = &pod;
            scope.spawn(move || {
                let there = elder.address().unwrap();
                wait::until("there", deadline.left().unwrap(), || pod.ping(there, SHORT)).unwrap();
                wait::until("back", deadline.left().unwrap(), || elder.ping(address, SHORT)).unwrap();
            });
        }
    });
    let took = start.elapsed();
    println!("ADD worked after {added:?}, all pairs after {took:?}");
    assert!(took <= WITHIN, "{took:?}");

    for from in &elders {
        for to in elders.iter().filter(|to| to.full_name() != from.full_name()) {
            from.ping(to.address().unwrap(), SHORT).unwrap();
        }
    }
    wait::until("everybody is linked with everybody", Duration::from_secs(5), || {
        for node in lab.nodes() {
            let status = node.status()?;
            ensure!(status["peers"] == 5 && status["links"] == 5, "{}: {status}", node.name());
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_pods_very_first_packet_arrives() {
    let lab = lab(2, 1);
    let (node, there) = (lab.node("n1").unwrap(), lab.pod("n2/p1").unwrap());
    let address = there.address().unwrap();
    reaches(&lab.pod("n1/p1").unwrap(), &there);
    for _ in 0..30 {
        // One echo, and no other.
        let pod = attached(&lab, &node);
        pod.ping(address, SHORT).unwrap();
    }
}

const WITHIN: Duration = Duration::from_secs(2);
