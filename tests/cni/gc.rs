//! "GC".

use crate::harness::{Harness, Pod};
use serde_json::{Value, json};

/// Three attached pods, of which some are older than a minute.
fn three(old: &[&str]) -> (Harness, [Pod; 3]) {
    let h = Harness::start();
    let pods = ["c1", "c2", "c3"].map(Pod::new);
    for pod in &pods {
        h.add(pod, &h.conf()).result();
    }
    h.age(old);
    (h, pods)
}

fn attachments(pods: &[&Pod]) -> Value {
    pods.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"})).collect()
}

fn left(h: &Harness) -> Vec<String> {
    let pods = h.pods();
    let text = |key: &str| pods.iter().map(|pod| pod[key].as_str().unwrap().to_string()).collect::<Vec<_>>();
    let (mut links, mut expected) =
        (h.veths().into_iter().map(|link| link.name).collect::<Vec<_>>(), text("host_interface"));
    links.sort();
    expected.sort();
    assert_eq!(links, expected, "allocations and interfaces go together");
    assert_eq!(h.pod_routes().len(), links.len());
    let mut left = text("container_id");
    left.sort();
    left
}

#[test]
fn gc_removes_what_is_not_valid() {
    let (h, [one, _two, three]) = three(&ALL);
    h.gc(json!({"cni.dev/valid-attachments": attachments(&[&one, &three])})).silence();
    assert_eq!(left(&h), ["c1", "c3"]);
}

#[test]
fn gc_reads_the_older_key_too() {
    let (h, [one, ..]) = three(&ALL);
    h.gc(json!({"cni.dev/attachments": attachments(&[&one])})).silence();
    assert_eq!(left(&h), ["c1"]);
}

#[test]
fn an_absent_list_is_not_that_none_are_valid() {
    let (h, _pods) = three(&ALL);
    h.gc(json!({})).silence();
    h.gc(json!({"cni.dev/valid-attachments": null})).silence();
    assert_eq!(left(&h).len(), 3);
}

#[test]
fn an_empty_list_is_that_none_are_valid() {
    let (h, _pods) = three(&ALL);
    h.gc(json!({"cni.dev/valid-attachments": []})).silence();
    h.is_clean();
}

#[test]
fn a_list_that_does_not_decode_removes_nothing() {
    let (h, _pods) = three(&ALL);
    for bad in [json!({}), json!("x"), json!([{"containerID": "c1"}]), json!([7])] {
        h.gc(json!({"cni.dev/valid-attachments": bad})).fails_with(6);
    }
    assert_eq!(left(&h).len(), 3);
}

#[test]
fn gc_leaves_alone_what_is_younger_than_a_minute() {
    let (h, _pods) = three(&["c2", "c3"]);
    h.gc(json!({"cni.dev/valid-attachments": []})).silence();
    assert_eq!(left(&h), ["c1"]);
}

#[test]
fn gc_leaves_others_interfaces_alone() {
    let (h, _pods) = three(&ALL);
    crate::harness::cable(h.node(), "wfother");
    h.gc(json!({"cni.dev/valid-attachments": []})).silence();
    let names: Vec<_> = h.veths().into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["wfother"]);
}

const ALL: [&str; 3] = ["c1", "c2", "c3"];
