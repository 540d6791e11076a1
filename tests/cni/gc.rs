//! "GC".

use crate::harness::{Harness, Pod};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// Three attached pods, older than a minute.
fn three() -> (Harness, [Pod; 3]) {
    let h = Harness::start();
    let pods = ["c1", "c2", "c3"].map(Pod::new);
    for pod in &pods {
        h.add(pod, &h.conf()).result();
    }
    for allocation in h.state().allocations.values_mut() {
        allocation.reserved = SystemTime::now() - Duration::from_secs(61);
    }
    (h, pods)
}

fn attachments(pods: &[&Pod]) -> Value {
    pods.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"})).collect()
}

fn left(h: &Harness) -> Vec<String> {
    let mut links: Vec<_> = h.veths().into_iter().map(|link| link.name).collect();
    let mut expected: Vec<_> = h.state().allocations.keys().map(|key| key.host_interface()).collect();
    links.sort();
    expected.sort();
    assert_eq!(links, expected, "allocations and interfaces go together");
    h.state().allocations.keys().map(|key| key.container_id().to_string()).collect()
}

#[test]
fn gc_removes_what_is_not_valid() {
    let (h, [one, _two, three]) = three();
    h.gc(json!({"cni.dev/valid-attachments": attachments(&[&one, &three])})).silence();
    assert_eq!(left(&h), ["c1", "c3"]);
}

#[test]
fn gc_reads_the_older_key_too() {
    let (h, [one, ..]) = three();
    h.gc(json!({"cni.dev/attachments": attachments(&[&one])})).silence();
    assert_eq!(left(&h), ["c1"]);
}

#[test]
fn an_absent_list_is_not_that_none_are_valid() {
    let (h, _pods) = three();
    h.gc(json!({})).silence();
    h.gc(json!({"cni.dev/valid-attachments": null})).silence();
    assert_eq!(left(&h).len(), 3);
}

#[test]
fn an_empty_list_is_that_none_are_valid() {
    let (h, _pods) = three();
    h.gc(json!({"cni.dev/valid-attachments": []})).silence();
    h.is_clean();
}

#[test]
fn a_list_that_does_not_decode_removes_nothing() {
    let (h, _pods) = three();
    for bad in [json!({}), json!("x"), json!([{"containerID": "c1"}]), json!([7])] {
        h.gc(json!({"cni.dev/valid-attachments": bad})).fails_with(6);
    }
    assert_eq!(left(&h).len(), 3);
}

#[test]
fn gc_leaves_alone_what_is_younger_than_a_minute() {
    let (h, [one, ..]) = three();
    h.state().allocations.get_mut(&one.key()).unwrap().reserved = SystemTime::now();
    h.gc(json!({"cni.dev/valid-attachments": []})).silence();
    assert_eq!(left(&h), ["c1"]);
}

#[test]
fn gc_leaves_others_interfaces_alone() {
    let (h, _pods) = three();
    crate::harness::cable(h.node(), "wfother");
    h.gc(json!({"cni.dev/valid-attachments": []})).silence();
    let names: Vec<_> = h.veths().into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["wfother"]);
}

#[test]
fn gc_goes_on_over_errors_and_tells_them() {
    let (h, [one, ..]) = three();
    h.state().stuck.insert(one.key());
    let answer = h.gc(json!({"cni.dev/valid-attachments": []}));
    answer.fails_with(104);
    assert!(answer.details().contains("c1/eth0"), "{answer:?}");
    assert_eq!(left(&h), ["c1"]);
}
