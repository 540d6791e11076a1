//! "STATUS".

use crate::{
    harness::{Harness, Pod, eventually},
    protocol::least,
};
use std::time::Duration;

#[test]
fn status_is_silent_when_add_would_work() {
    let h = Harness::start();
    h.status().silence();
}

#[test]
fn status_takes_under_five_milliseconds() {
    let h = Harness::start();
    let took = least(|| h.status().took);
    println!("STATUS {took:?}");
    assert!(took < Duration::from_millis(5), "STATUS takes {took:?}");
}

#[test]
fn status_of_an_agent_that_waits_for_addresses_says_for_whose() {
    let (h, giver) = Harness::waiting(|_| {});
    let words = "Weft can't attach pods: no addresses to hand out: waiting for ";
    eventually("it says so", || h.status().fails_with(50).starts_with(words));
    giver.start_agent();
    eventually("it has addresses", || h.status().code == Some(0));
}

#[test]
fn status_of_an_agent_that_is_down_tells_an_operator_what_to_do() {
    let h = Harness::without_agent();
    let message = h.status().fails_with(50);
    assert!(message.contains("is it running on this node?"), "{message}");
}

#[test]
fn status_stops_neither_add_nor_del() {
    let h = Harness::start();
    h.nft(DROPPING);
    eventually("the agent has noticed", || h.status().code == Some(1));
    h.status().fails_with(51);
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    h.del(&pod, &h.conf()).silence();
    h.is_clean();
}

/// As a firewall's that knows nothing of us.
pub const DROPPING: &str =
    "table inet other {\nchain forward {\ntype filter hook forward priority 0; policy drop\n}\n}\n";
