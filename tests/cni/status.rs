//! "STATUS".

use crate::{
    harness::{Harness, Pod},
    protocol::least,
};
use std::time::Duration;
use weft::cni::Readiness;

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
fn status_says_the_agents_own_words() {
    let h = Harness::start();
    let reasons = vec!["no addresses: none of 3 peers has given any".into(), "TUN weft0 is missing".into()];
    h.agent().readiness.send_replace(Readiness { reasons, impaired: false });
    let message = h.status().fails_with(50);
    assert_eq!(
        message,
        "Weft can't attach pods: no addresses: none of 3 peers has given any; TUN weft0 is missing"
    );
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
    h.agent().readiness.send_replace(Readiness { reasons: vec!["a sysctl is off".into()], impaired: false });
    h.status().fails_with(50);
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    h.del(&pod, &h.conf()).silence();
    h.is_clean();
}
