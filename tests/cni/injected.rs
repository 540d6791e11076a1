//! Errors that a real agent can't be brought to, from a fake one: a kernel that does not let go of an interface, a policy
//! that is late, a bridge that loses its address; and what only the agent's side sees of a call.

use crate::{
    fake::Fake,
    harness::{Pod, eventually},
};
use serde_json::json;
use std::time::{Duration, SystemTime};
use weft::cni::Readiness;

#[test]
fn code_105_is_a_policy_that_is_late() {
    let fake = Fake::start();
    fake.state().policy_is_late = true;
    fake.add(&Pod::new("c1"), &fake.conf()).fails_with(105);
    fake.is_clean();
}

#[test]
fn status_tells_impaired_pods_from_an_add_that_would_fail() {
    let fake = Fake::start();
    let say = |impaired| {
        let reasons =
            vec!["no addresses: none of 3 peers has given any".into(), "bridge weft is down".into()];
        fake.readiness.send_replace(Readiness { reasons, impaired });
        fake.status()
    };
    let words = "Weft can't attach pods: no addresses: none of 3 peers has given any; bridge weft is down";
    assert_eq!(say(false).fails_with(50), words);
    assert_eq!(say(true).fails_with(51), words);
}

#[test]
fn a_refusal_does_not_touch_what_the_same_attachment_has() {
    let fake = Fake::start();
    let pod = Pod::new("c1");
    let added = fake.add(&pod, &fake.conf());
    let node = fake.node.send_replace(None);
    fake.add(&Pod::new("c1"), &fake.conf()).fails_with(11);
    fake.node.send_replace(node);
    fake.check(&pod, &fake.conf(), added.result()).silence();
}

#[test]
fn check_tells_of_an_interface_without_an_allocation() {
    let fake = Fake::start();
    let pod = Pod::new("c1");
    let added = fake.add(&pod, &fake.conf());
    fake.state().allocations.clear();
    let answer = fake.check(&pod, &fake.conf(), added.result());
    answer.fails_with(103);
    assert!(answer.details().contains("no allocation"), "{answer:?}");
}

#[test]
fn an_agent_that_can_not_release_does_not_keep_the_pod() {
    let fake = Fake::start();
    let pod = Pod::new("c1");
    fake.add(&pod, &fake.conf()).result();
    fake.state().stuck.insert(pod.key());
    fake.del(&pod, &fake.conf()).silence();
    assert_eq!(fake.veths(), []);
    assert_eq!(fake.tombstones().len(), 1, "the agent tries again");
    fake.state().stuck.clear();
    // Another one has it look again.
    fake.del(&pod, &fake.conf()).silence();
    let (other, place) = (fake.run_dir().join("other"), fake.run_dir().join("tombstones/other.json"));
    std::fs::write(&other, "{}").and_then(|()| std::fs::rename(&other, &place)).unwrap();
    eventually("it has tried again", || fake.tombstones().is_empty());
    fake.is_clean();
}

#[test]
fn gc_goes_on_over_errors_and_tells_them() {
    let fake = Fake::start();
    let pods = ["c1", "c2", "c3"].map(Pod::new);
    for pod in &pods {
        fake.add(pod, &fake.conf()).result();
    }
    for allocation in fake.state().allocations.values_mut() {
        allocation.reserved = SystemTime::now() - Duration::from_secs(61);
    }
    fake.state().stuck.insert(pods[0].key());
    let answer = fake.gc(json!({"cni.dev/valid-attachments": []}));
    answer.fails_with(104);
    assert!(answer.details().contains("c1/eth0"), "{answer:?}");
    assert!(fake.state().allocations.keys().eq([&pods[0].key()]), "the others are gone");
    assert_eq!(fake.veths().len(), 1);
}

#[test]
fn the_trace_context_goes_into_the_metadata() {
    let fake = Fake::start();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let call = fake.call("STATUS", &fake.conf_of("1.1.0"));
    let call = call.env("TRACEPARENT", trace).env("TRACESTATE", "a=b").env("BAGGAGE", "c=d");
    call.run(fake.node()).silence();
    let metadata = fake.state().metadata.clone();
    for (key, value) in [("traceparent", trace), ("tracestate", "a=b"), ("baggage", "c=d")] {
        assert_eq!(metadata.get(key).map(String::as_str), Some(value));
    }
}

#[test]
fn nothing_is_asked_before_everything_is_checked() {
    let fake = Fake::start();
    let pod = Pod::new("c1");
    let mut conf = fake.conf();
    conf["mtu"] = json!("many");
    fake.add(&pod, &conf).fails_with(7);
    fake.call_for("ADD", &pod, &fake.conf()).env("CNI_IFNAME", "a/b").run(fake.node()).fails_with(4);
    fake.call_for("ADD", &pod, &fake.conf()).stdin("{").run(fake.node()).fails_with(6);
    fake.call_for("ADD", &pod, &fake.conf())
        .env("CNI_NETNS", "/proc/self/ns/net")
        .run(fake.node())
        .fails_with(8);
    assert!(fake.state().metadata.is_empty(), "the agent was not even asked");
    fake.is_clean();
    assert_eq!(fake.tombstones(), [""; 0]);
    assert!(pod.link("eth0").is_none());
}
