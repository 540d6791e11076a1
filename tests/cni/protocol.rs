//! "Protocol": environment in, one JSON document out.

use crate::{
    call::{Answer, Call},
    harness::{Harness, Pod, shim},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    io::{Read, Write},
    process::Stdio,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

#[test]
fn without_a_command_the_name_and_the_versions_are_on_stderr() {
    let h = Harness::without_agent();
    let answer = Call::new(shim(), "", &json!({})).run(h.node());
    answer.silence();
    assert!(answer.stderr.contains("weft-cni"), "{answer:?}");
    assert!(answer.stderr.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{answer:?}");
    Call::new(shim(), "", &json!({})).without("CNI_COMMAND").run(h.node()).silence();
}

/// `Answer` holds every call of this suite to one document; here is the case in which a known plugin prints two.
#[test]
fn the_hosts_namespace_gets_exactly_one_document_and_leaves_nothing() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let call = h.call_for("ADD", &pod, &h.conf()).env("CNI_NETNS", "/proc/self/ns/net");
    call.run(h.node()).fails_with(8);
    h.is_clean();
}

#[test]
fn errors_carry_version_code_msg_and_details() {
    let h = Harness::without_agent();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let answer = h.add(&Pod::new("c1"), &h.conf_of(version));
        answer.fails_with(100);
        let error = answer.json.unwrap();
        assert_eq!(error["cniVersion"], version);
        let keys: Vec<_> = error.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["cniVersion", "code", "details", "msg"]);
    }
}

#[test]
fn logs_go_to_stderr() {
    let h = Harness::without_agent();
    let answer = h.del(&Pod::new("c1"), &h.conf());
    answer.silence();
    assert!(answer.stderr.contains("does not answer"), "{answer:?}");
}

#[test]
fn stdin_is_at_most_a_mebibyte() {
    let h = Harness::start();
    let mut conf = h.conf_of("1.1.0");
    conf["padding"] = json!("x".repeat((1 << 20) - conf.to_string().len() - 13));
    let padded = conf.to_string();
    assert_eq!(padded.len(), 1 << 20);
    h.call("STATUS", &conf).run(h.node()).silence();
    let answer = h.call("STATUS", &conf).stdin(format!("{padded} ")).run(h.node());
    assert!(answer.fails_with(5).contains("1048576"));
}

#[test]
fn a_stdin_that_never_closes_ends_with_the_deadline() {
    let h = Harness::start();
    let call = h.call("STATUS", &h.conf_of("1.1.0"));
    let mut child = h.node().enter(|| call.command().stdin(Stdio::piped()).spawn().unwrap()).unwrap();
    let stdin = child.stdin.take();
    let started = Instant::now();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    assert!((4..8).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    Answer::new(output, started.elapsed()).fails_with(5);
}

#[test]
fn an_agent_that_never_answers_ends_with_the_deadline() {
    let h = Harness::without_agent();
    let _listener = std::os::unix::net::UnixListener::bind(h.socket()).unwrap();
    let answer = h.status();
    answer.fails_with(50);
    assert!((4..8).contains(&answer.took.as_secs()), "STATUS took {:?}", answer.took);
    let answer = h.del(&Pod::new("c1"), &h.conf());
    answer.silence();
    assert!((9..13).contains(&answer.took.as_secs()), "DEL took {:?}", answer.took);
}

#[test]
fn version_answers_without_reading_beyond_its_config() {
    let call = Call::new(shim(), "VERSION", &json!({}));
    let mut child = call.command().stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(br#"{"cniVersion":"1.0.0"}"#).unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let _ = stdout.read_to_string(&mut text);
        let _ = sender.send(text);
    });
    let text = receiver.recv_timeout(Duration::from_secs(5)).expect("it answers while stdin is open");
    drop(stdin);
    assert!(child.wait().unwrap().success());
    let versions: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(versions["cniVersion"], "1.0.0");
    assert_eq!(versions["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

#[test]
fn version_answers_whatever_version_it_is_asked_in() {
    let h = Harness::without_agent();
    let ask = |stdin: &str| Call::new(shim(), "VERSION", &json!({})).stdin(stdin).run(h.node());
    assert_eq!(ask(r#"{"cniVersion":"9.9.9"}"#).result()["cniVersion"], "9.9.9");
    assert_eq!(ask("").result()["cniVersion"], "1.1.0");
    assert_eq!(ask("{}").result()["cniVersion"], "1.1.0");
    ask("{").fails_with(6);
    ask(r#"{"cniVersion":1}"#).fails_with(6);
}

#[test]
fn parallel_calls_for_different_containers_are_safe() {
    let h = Harness::start();
    let pods: Vec<_> = (0..24).map(|n| Pod::new(&format!("c{n}"))).collect();
    let add = |pod: &Pod| h.add(pod, &h.conf()).result()["ips"][0]["address"].as_str().unwrap().to_string();
    let addresses: BTreeSet<String> = thread::scope(|scope| {
        let calls: Vec<_> = pods.iter().map(|pod| scope.spawn(move || add(pod))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert_eq!(addresses.len(), pods.len(), "no address twice");
    thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| h.del(pod, &h.conf()).silence());
        }
    });
    h.is_clean();
}

#[test]
fn the_shim_is_small_and_starts_at_once() {
    let h = Harness::without_agent();
    let size = std::fs::metadata(shim()).unwrap().len();
    assert!(size < 6 << 20, "weft-cni has {size} bytes");
    let version = least(|| Call::new(shim(), "VERSION", &h.conf()).run(h.node()).took);
    println!("weft-cni: {size} bytes, VERSION {version:?}");
    assert!(version < Duration::from_millis(5), "VERSION takes {version:?}");
}

/// The best of thirty runs: what a machine's other work adds is not the shim's.
pub fn least(run: impl Fn() -> Duration) -> Duration {
    (0..30).map(|_| run()).min().expect("there are runs")
}

#[test]
fn nothing_is_done_before_everything_is_checked() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let mut conf = h.conf();
    conf["mtu"] = json!("many");
    h.add(&pod, &conf).fails_with(7);
    h.call_for("ADD", &pod, &h.conf()).env("CNI_IFNAME", "a/b").run(h.node()).fails_with(4);
    h.call_for("ADD", &pod, &h.conf()).stdin("{").run(h.node()).fails_with(6);
    h.is_clean();
    assert_eq!(h.tombstones(), [""; 0]);
    assert!(pod.link("eth0").is_none());
}
