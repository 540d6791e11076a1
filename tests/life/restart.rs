//! An agent that stops leaves the network as it is, and finds it so.
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::ensure;
use nix::sys::signal::Signal;
use weft_lab::{
    Lab,
    node::Node,
    traffic::{Datagrams, Manner, Stream},
    wait,
};

use crate::{
    harness::{START, lab, metric, reaches},
    kernel::Kernel,
};

enum End {
    By(Signal),
    Killed,
}

#[test]
fn a_stopped_agent_leaves_everything_and_the_next_changes_nothing() {
    let lab = lab(2, 2);
    let node = lab.node("n1").unwrap();
    let kernel = Kernel::of(&node);
    let pods = node.weft_json("pods").unwrap();
    let (a, b) = (lab.pod("n1/p1").unwrap(), lab.pod("n1/p2").unwrap());
    let local =
        Stream::start(a.netns(), b.netns(), b.address().unwrap(), u64::MAX, Duration::from_secs(40)).unwrap();

    for end in [End::By(Signal::SIGTERM), End::By(Signal::SIGINT), End::Killed] {
        stop(&node, &end);
        Kernel::of(&node).without_carrier().assert_is(&kernel);
        local.advances(1 << 20, Duration::from_secs(5)).unwrap();
        node.start_agent().unwrap();
        node.wait_ready(START).unwrap();
        reaches(&a, &b);
        reaches(&a, &lab.pod("n2/p2").unwrap());
        reaches(&lab.pod("n2/p1").unwrap(), &b);
        Kernel::of(&node).assert_is(&kernel);
        assert_eq!(metric(&node, "weft_links_repairs_total").unwrap(), 0.0);
        assert_eq!(node.weft_json("pods").unwrap(), pods);
    }
    local.finish().unwrap();
    check(&lab);
}

#[test]
fn packets_between_nodes_flow_a_quarter_of_a_second_after_the_next_process_begins() {
    let lab = lab(2, 1);
    let node = lab.node("n1").unwrap();
    let (a, b) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    reaches(&a, &b);
    let tick = Manner { per_second: 1000, size: 64, at_once: 1 };
    let flows = [(&a, &b), (&b, &a)]
        .map(|(from, to)| Datagrams::start(from.netns(), to.netns(), to.address().unwrap(), tick).unwrap());
    let mut gaps = Vec::new();
    for end in [End::By(Signal::SIGTERM), End::Killed, End::By(Signal::SIGTERM), End::Killed, End::Killed] {
        stop(&node, &end);
        let before = flows.each_ref().map(Datagrams::received);
        let begun = Instant::now();
        node.start_agent().unwrap();
        let gap = wait::until("both directions flow", START, || {
            let now = flows.each_ref().map(Datagrams::received);
            ensure!(now.iter().zip(before).all(|(now, before)| *now > before), "{now:?}");
            Ok(begun.elapsed())
        });
        gaps.push(gap.unwrap());
        node.wait_ready(START).unwrap();
    }
    gaps.sort();
    println!("{gaps:?}");
    assert!(gaps[gaps.len() / 2] <= Duration::from_millis(250), "{gaps:?}");
    for flow in flows {
        flow.finish().unwrap();
    }
}

/// Ends the node's agent; by a signal within a second, with 0.
fn stop(node: &Arc<Node>, end: &End) {
    let End::By(signal) = end else { return node.kill_agent().unwrap() };
    let start = Instant::now();
    node.agent_process().unwrap().signal(*signal).unwrap();
    let status = node.wait_agent_end(Duration::from_secs(5)).unwrap();
    let took = start.elapsed();
    println!("{signal} took {took:?}");
    assert!(status.success(), "{signal}: {status}");
    assert!(took <= Duration::from_secs(1), "{signal} took {took:?}");
}

/// Addresses that were handed out are not handed out again.
fn check(lab: &Lab) {
    let taken: Vec<_> = lab.pods().iter().map(|pod| pod.address().unwrap()).collect();
    let fresh = crate::harness::attached(lab, &lab.node("n1").unwrap());
    assert!(!taken.contains(&fresh.address().unwrap()), "{taken:?}");
}
