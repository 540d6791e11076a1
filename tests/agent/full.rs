//! A universe with fewer addresses than pods that want one.
//!
//! Of the eight addresses of a `/29` no pod can have the first and the last, and three bridges take one each: three pods
//! it is, wherever they start.
use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use serde_json::Value;
use weft_lab::{Lab, node::Node, pod::Pod, wait};

use crate::{living::code, seen};

#[test]
fn a_full_universe_says_who_owns_what_and_takes_what_is_given_back() {
    let lab = Lab::builder().nodes(3).universe(UNIVERSE).start().unwrap();
    let (n1, n2, n3) = (lab.node("n1").unwrap(), lab.node("n2").unwrap(), lab.node("n3").unwrap());
    let mut addresses: BTreeSet<IpAddr> = lab.nodes().iter().map(|node| bridge(node)).collect();
    assert_eq!(addresses.len(), 3, "each bridge has an address: {addresses:?}");

    // All on one node, which has room for one and has to ask the others for the rest.
    let pods: Vec<_> = (0..3).map(|_| lab.add_pod(&n1).unwrap()).collect();
    for pod in &pods {
        attach(pod);
        let address = pod.address().unwrap();
        assert!(addresses.insert(address), "{address} was given twice");
    }
    let one_more = lab.add_pod(&n1).unwrap();
    let error = refused(&one_more, |msg| msg.contains("is full"));
    for owner in ["10.32.0.0/29 is full: n1 owns ", "n2 owns ", "n3 owns ", " addresses; remove pods, or "] {
        assert!(error.contains(owner), "{error}");
    }
    let elsewhere = lab.add_pod(&n2).unwrap();
    refused(&elsewhere, |msg| msg.contains("is full"));
    assert_eq!(seen::pods(&n1).unwrap().len(), 3, "what was refused left a reservation");
    assert_eq!(seen::links(one_more.netns()).unwrap(), ["lo"]);

    // What is freed rests first; nobody gets it, here or elsewhere.
    pods[0].detach().unwrap();
    let error = refused(&one_more, |msg| msg.contains("is full"));
    assert!(error.contains("(1 freed here can be used again in up to 30 s)"), "{error}");
    assert_eq!(resting(&n1), 1);
    refused(&elsewhere, |msg| msg.contains("is full"));

    // A node that leaves needs no address any more: its heir has one.
    let given_back = bridge(&n3);
    let reset = n3.weft(&["reset"]).unwrap();
    assert!(reset.status.success(), "{}", String::from_utf8_lossy(&reset.stderr));
    assert!(n3.wait_agent_end(Duration::from_secs(10)).unwrap().success());
    let said = String::from_utf8_lossy(&reset.stdout).into_owned();
    let heir = if said.contains("addresses handed to n1") { &one_more } else { &elsewhere };
    attach(heir);
    assert_eq!(heir.address().unwrap(), given_back, "{said}");
    for pod in [&pods[1], &pods[2], heir] {
        let (from, to) = (&pods[1], pod.address().unwrap());
        wait::until(&format!("{} is reached", pod.full_name()), Duration::from_secs(5), || {
            from.ping(to, Duration::from_millis(300))
        })
        .unwrap();
    }
    lab.finish().unwrap();
}

/// ADD as often as a runtime would, as space may have to be asked for first.
fn attach(pod: &Arc<Pod>) {
    wait::until(&format!("{} is attached", pod.full_name()), Duration::from_secs(15), || pod.attach())
        .unwrap();
}

/// ADD until it is refused with such a message: before that, space may be asked for. It is never granted.
fn refused(pod: &Arc<Pod>, expected: impl Fn(&str) -> bool) -> String {
    let refused = wait::until(&format!("{} is refused", pod.full_name()), Duration::from_secs(15), || {
        let answer = pod.call("ADD").run(pod.node())?;
        assert!(!answer.success, "{} was attached: {}", pod.full_name(), answer.stdout);
        assert_eq!(code(&answer).unwrap(), 11, "{}", answer.stdout);
        let msg = answer.json()?["msg"].as_str().unwrap_or_default().to_owned();
        ensure!(expected(&msg), "{msg}");
        Ok(msg)
    });
    pod.call("DEL").run(pod.node()).unwrap().check("DEL of what was refused").unwrap();
    refused.unwrap()
}

fn bridge(node: &Node) -> IpAddr {
    let status = node.status().unwrap();
    status["bridge_address"].as_str().and_then(|text| text.parse().ok()).context(status.to_string()).unwrap()
}

fn resting(node: &Node) -> u64 {
    let ipam = node.weft_json("ipam").unwrap();
    ipam["ranges"].as_array().unwrap().iter().filter_map(|range: &Value| range["resting"].as_u64()).sum()
}

const UNIVERSE: &str = "10.32.0.0/29";
