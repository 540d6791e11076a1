//! No packet before the policies.
use crate::harness::{address, apply, policy, wait_dropped, weft};
use serde_json::json;
use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use weft_lab::{Lab, node::Node, policy::packets::dropped_on, wait};

/// Starts a pod that sends from before it has an interface on, until `enough`.
fn flood(lab: &Lab, node: &Arc<Node>, target: &UdpSocket, enough: impl FnOnce()) {
    let (pod, to, over) = (lab.add_pod(node).unwrap(), target.local_addr().unwrap(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            pod.netns().run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                while !over.load(Relaxed) {
                    // There is no way to the target until the pod is attached.
                    let _ = socket.send_to(b"flood", to);
                }
                Ok(())
            })
        });
        pod.attach().unwrap();
        enough();
        over.store(true, Relaxed);
    });
    pod.detach().unwrap();
    lab.remove_pod(&pod);
}

#[test]
fn of_two_hundred_pods_that_flood_from_their_first_instant_on_none_gets_a_packet_past_a_deny_policy() {
    let lab = Lab::builder().nodes(2).start().unwrap();
    let (node, other) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let pod = lab.add_pod(&other).unwrap();
    pod.attach().unwrap();
    let target = pod.netns().run(|| Ok(UdpSocket::bind((address(&pod), 7000))?)).unwrap();
    target.set_nonblocking(true).unwrap();
    apply(&node, &[policy("deny", json!({"podSelector": {}, "policyTypes": ["Egress"]}))]).unwrap();
    for _ in 0..STARTS {
        let before = dropped_on(&node).unwrap();
        flood(&lab, &node, &target, || {
            wait_dropped(&node, before + 1).unwrap();
        });
        let mut buffer = [0; 16];
        assert!(target.recv(&mut buffer).is_err(), "a packet came through");
    }
    // And it was the policy.
    weft(&node, &["policy", "delete", "lab/deny"]).unwrap();
    flood(&lab, &node, &target, || {
        let arrived = || Ok(target.recv(&mut [0; 16])?);
        wait::until("a packet arrives", Duration::from_secs(10), arrived).unwrap();
    });
    lab.finish().unwrap();
}

const STARTS: usize = 200;
