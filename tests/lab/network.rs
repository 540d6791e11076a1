//! Namespaces, probes and faults, on the underlay alone.
use std::time::Duration;

use weft_lab::{Lab, fault, traffic, wait};

const SOON: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);

fn bare(nodes: usize) -> Lab {
    Lab::builder().nodes(nodes).without_agents().start().unwrap()
}

#[test]
fn nodes_reach_each_other_and_the_outside() {
    let lab = bare(2);
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    traffic::ping(n1.netns(), n2.address(), SOON).unwrap();
    traffic::ping(n1.netns(), lab.underlay().outside_address(), SOON).unwrap();
    let seen = traffic::seen_as(n2.netns(), &lab.underlay().outside, lab.underlay().outside_address(), SOON);
    assert_eq!(seen.unwrap(), n2.address());
    lab.finish().unwrap();
}

#[test]
fn what_is_sent_arrives_unchanged() {
    let lab = bare(2);
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    traffic::udp_echo(n1.netns(), n2.netns(), n2.address(), (20, 4000), SOON).unwrap();
    let done = traffic::transfer(n1.netns(), n2.netns(), n2.address(), (8 << 20) + 5, 4 * SOON).unwrap();
    assert_eq!(done.bytes, (8 << 20) + 5);
    assert_eq!(done.sha256.len(), 64);
}

#[test]
fn a_stream_runs_until_it_is_told_to_finish() {
    let lab = bare(2);
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let stream = traffic::Stream::start(n1.netns(), n2.netns(), n2.address(), u64::MAX, 4 * SOON).unwrap();
    stream.advances(1 << 20, SOON).unwrap();
    fault::cable(lab.underlay(), &n2, false).unwrap();
    stream.advances(64 << 20, SHORT).unwrap_err();
    fault::cable(lab.underlay(), &n2, true).unwrap();
    stream.advances(1 << 20, 2 * SOON).unwrap();
    assert!(stream.finish().unwrap().bytes > 2 << 20);
}

#[test]
fn a_path_that_is_too_small_says_so() {
    let lab = bare(1);
    let (node, outside) = (lab.node("n1").unwrap(), lab.underlay().outside_address());
    let error = traffic::path_mtu(node.netns(), "eth0", outside, SHORT).unwrap_err();
    assert!(format!("{error:#}").contains("raise no error"), "{error:#}");
    lab.underlay().netns.links(async |links| links.mtu("outside", 1300).await).unwrap();
    let found = traffic::path_mtu(node.netns(), "eth0", outside, SOON).unwrap();
    assert_eq!((found.interface, found.path), (1500, 1300));
}

#[test]
fn a_partition_ends_when_it_is_dropped() {
    let lab = bare(3);
    let nodes = lab.nodes();
    let ping = |from: usize, to: usize| traffic::ping(nodes[from].netns(), nodes[to].address(), SHORT);
    wait::until("all is well", SOON, || ping(0, 1)).unwrap();
    let partition = fault::Fault::partition(lab.underlay(), &[&nodes[0]], &[&nodes[1], &nodes[2]]).unwrap();
    ping(0, 1).unwrap_err();
    ping(2, 0).unwrap_err();
    ping(1, 2).unwrap();
    drop(partition);
    wait::until("healed", SOON, || ping(0, 1)).unwrap();
    let loss = fault::Fault::loss(lab.underlay(), &nodes[1], 100).unwrap();
    ping(0, 1).unwrap_err();
    ping(0, 2).unwrap();
    drop(loss);
}

#[test]
fn a_pings_error_tells_from_where_to_where() {
    let lab = bare(1);
    let node = lab.node("n1").unwrap();
    let error = traffic::ping(node.netns(), "192.0.2.77".parse().unwrap(), SHORT).unwrap_err();
    assert!(format!("{error:#}").starts_with("ping 192.0.2.77 from n1: "), "{error:#}");
}
