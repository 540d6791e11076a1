//! "DEL".

use crate::harness::{Harness, Pod, eventually};
use weft::cni::tombstone;

#[test]
fn del_succeeds_the_first_the_second_and_the_third_time() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    h.del(&pod, &h.conf()).silence();
    h.is_clean();
    assert!(pod.link("eth0").is_none());
    h.del(&pod, &h.conf()).silence();
    h.call_for("DEL", &pod, &h.conf()).env("CNI_NETNS", "").run(h.node()).silence();
}

#[test]
fn del_succeeds_without_a_namespace() {
    let h = Harness::start();
    for (n, netns) in ["", "/nonexistent", "/proc/self/status", "/proc/self/ns/net"].iter().enumerate() {
        let pod = Pod::new(&format!("c{n}"));
        h.add(&pod, &h.conf()).result();
        h.call_for("DEL", &pod, &h.conf()).env("CNI_NETNS", *netns).run(h.node()).silence();
        h.is_clean();
    }
    let pod = Pod::new("c9");
    h.add(&pod, &h.conf()).result();
    h.call_for("DEL", &pod, &h.conf()).without("CNI_NETNS").run(h.node()).silence();
    h.is_clean();
}

#[test]
fn del_succeeds_when_the_namespace_died_with_its_interface() {
    let h = Harness::start();
    let id = {
        let pod = Pod::new("c1");
        h.add(&pod, &h.conf()).result();
        pod.id.clone()
    };
    eventually("the kernel takes the veth away with the namespace", || h.veths().is_empty());
    let call = h.call("DEL", &h.conf()).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
    call.env("CNI_NETNS", "").run(h.node()).silence();
    h.is_clean();
}

#[test]
fn del_needs_no_prev_result_and_does_not_mind_a_bad_one() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let mut conf = h.conf();
    conf["prevResult"] = added.result().clone();
    h.del(&pod, &conf).silence();
    conf["prevResult"] = serde_json::json!("nonsense");
    h.del(&pod, &conf).silence();
    h.is_clean();
}

#[test]
fn del_takes_only_its_own_attachment() {
    let h = Harness::start();
    let (one, other) = (Pod::new("c1"), Pod::new("c2"));
    h.add(&one, &h.conf()).result();
    let added = h.add(&other, &h.conf());
    h.del(&one, &h.conf()).silence();
    h.check(&other, &h.conf(), added.result()).silence();
}

#[test]
fn with_the_agent_down_the_interface_goes_a_tombstone_stays_and_del_succeeds() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    h.kill_agent();
    h.del(&pod, &h.conf()).silence();
    assert_eq!(h.veths(), []);
    assert!(pod.link("eth0").is_none());
    assert_eq!(h.tombstones(), [tombstone::file_name(&pod.key())], "one file, and no temporary one");
    h.del(&pod, &h.conf()).silence();
    h.call_for("DEL", &pod, &h.conf()).env("CNI_NETNS", "").run(h.node()).silence();
    assert_eq!(h.tombstones().len(), 1);
    h.start_agent();
    eventually("the agent works it off at its start", || h.tombstones().is_empty());
    h.is_clean();
}

#[test]
fn a_tombstone_that_appears_is_worked_off_at_once() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    let mut conf = h.conf();
    conf["socket"] = serde_json::json!(h.run_dir().join("not-the-socket"));
    h.del(&pod, &conf).silence();
    eventually("the agent works it off", || h.tombstones().is_empty());
    h.is_clean();
}

#[test]
fn a_new_add_is_not_hit_by_an_old_tombstone() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    h.kill_agent();
    h.del(&pod, &h.conf()).silence();
    h.start_agent();
    let added = h.add(&pod, &h.conf());
    added.result();
    eventually("the tombstone goes", || h.tombstones().is_empty());
    h.check(&pod, &h.conf(), added.result()).silence();
}

#[test]
fn del_succeeds_where_no_tombstone_can_be_left() {
    let h = Harness::without_agent();
    let mut conf = h.conf();
    conf["runDir"] = serde_json::json!("/proc/self/nonexistent");
    let answer = h.del(&Pod::new("c1"), &conf);
    answer.silence();
    assert!(answer.stderr.contains("tombstone"), "{answer:?}");
}
