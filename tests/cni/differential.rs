//! Against the reference `bridge` plugin, where the two should agree.

use crate::{
    call::{Answer, Call},
    harness::{Harness, Pod},
};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use weft_lab::debian::Suite;

/// The same calls to both plugins on one node; each has a pod of its own.
struct Both {
    h: Harness,
}

impl Both {
    fn start() -> Self {
        Self { h: Harness::start() }
    }

    fn conf(&self, version: &str) -> Value {
        json!({"cniVersion": version, "name": "reference", "type": "bridge", "bridge": "ref0",
            "isGateway": true, "isDefaultGateway": true,
            "ipam": {"type": "host-local", "dataDir": self.h.run_dir().join("host-local"),
                "ranges": [[{"subnet": "10.40.0.0/24"}]]}})
    }

    fn reference(&self, verb: &str, pod: &Pod, conf: &Value) -> Call {
        let plugins = Suite::plugins().unwrap();
        Call::new(&plugins.join("bridge"), verb, conf)
            .env("CNI_PATH", plugins.to_str().unwrap())
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    }

    /// The two answers to calls that are changed alike.
    fn ask(&self, verb: &str, version: &str, change: impl Fn(Call) -> Call) -> (Answer, Answer) {
        let (ours, theirs) = (Pod::new("c1"), Pod::new("c2"));
        let our_call = self.h.call_for(verb, &ours, &self.h.conf_of(version));
        let their_call = self.reference(verb, &theirs, &self.conf(version));
        (change(our_call).run(self.h.node()), change(their_call).run(self.h.node()))
    }
}

/// Every key of a document, with its way there; lists' places do not matter.
fn shape(value: &Value) -> BTreeSet<String> {
    let mut shape = BTreeSet::new();
    walk(value, "", &mut shape);
    shape
}

fn walk(value: &Value, path: &str, shape: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => object.iter().for_each(|(key, value)| {
            shape.insert(format!("{path}.{key}"));
            walk(value, &format!("{path}.{key}"), shape);
        }),
        Value::Array(list) => list.iter().for_each(|value| walk(value, &format!("{path}[]"), shape)),
        _ => {}
    }
}

#[test]
fn results_have_the_same_shape_in_every_version() {
    let both = Both::start();
    for (n, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].into_iter().enumerate() {
        let (ours, theirs) = (Pod::new(&format!("o{n}")), Pod::new(&format!("t{n}")));
        let our_answer = both.h.add(&ours, &both.h.conf_of(version));
        let their_answer = both.reference("ADD", &theirs, &both.conf(version)).run(both.h.node());
        let (our_result, their_result) = (our_answer.result(), their_answer.result());
        // The reference leaves out what 1.1.0 allows and runtimes like to know.
        let mut our_shape = shape(our_result);
        assert_eq!(our_shape.remove(".interfaces[].mtu"), version == "1.1.0");
        assert_eq!(our_shape, shape(their_result), "{version}: {our_result} {their_result}");
        for key in ["interfaces", "ips", "routes"] {
            let length = |result: &Value| result[key].as_array().unwrap().len();
            assert_eq!(length(our_result), length(their_result), "{version} {key}");
        }
        for path in
            ["/cniVersion", "/ips/0/interface", "/ips/0/version", "/interfaces/2/name", "/routes/0/dst"]
        {
            assert_eq!(our_result.pointer(path), their_result.pointer(path), "{version} {path}");
        }
    }
}

#[test]
fn the_same_errors_have_the_same_codes() {
    let both = Both::start();
    let same = |what: &str, verb: &str, version: &str, change: &dyn Fn(Call) -> Call| {
        let (ours, theirs) = both.ask(verb, version, change);
        assert_eq!(ours.failure().0, theirs.json.as_ref().unwrap()["code"], "{what}: {ours:?} {theirs:?}");
        assert_eq!(ours.code, theirs.code, "{what}");
    };
    same("no container", "ADD", "1.0.0", &|call| call.without("CNI_CONTAINERID"));
    same("no namespace", "ADD", "1.0.0", &|call| call.without("CNI_NETNS"));
    same("no interface", "DEL", "1.0.0", &|call| call.without("CNI_IFNAME"));
    same("bad container", "ADD", "1.0.0", &|call| call.env("CNI_CONTAINERID", "-x"));
    same("bad interface", "ADD", "1.0.0", &|call| call.env("CNI_IFNAME", "a/b"));
    same("bad command", "FROB", "1.0.0", &|call| call);
    same("bad JSON", "ADD", "1.0.0", &|call| call.stdin("{"));
    same("no stdin", "ADD", "1.0.0", &|call| call.stdin(""));
    same("version", "ADD", "9.9.9", &|call| call);
    same("CHECK before 0.4.0", "CHECK", "0.3.1", &|call| call);
    same("STATUS before 1.1.0", "STATUS", "1.0.0", &|call| call);
    same("GC before 1.1.0", "GC", "1.0.0", &|call| call);
}

#[test]
fn del_is_idempotent_in_both() {
    let both = Both::start();
    let (ours, theirs) = (Pod::new("c1"), Pod::new("c2"));
    let (our_conf, their_conf) = (both.h.conf(), both.conf("1.0.0"));
    both.h.add(&ours, &our_conf).result();
    both.reference("ADD", &theirs, &their_conf).run(both.h.node()).result();
    for netns in [None, None, Some("")] {
        let with = |call: Call| netns.iter().fold(call, |call, netns| call.env("CNI_NETNS", *netns));
        with(both.h.call_for("DEL", &ours, &our_conf)).run(both.h.node()).silence();
        with(both.reference("DEL", &theirs, &their_conf)).run(both.h.node()).silence();
    }
}

#[test]
fn both_speak_the_conflists_versions() {
    let both = Both::start();
    let (ours, theirs) = both.ask("VERSION", "1.0.0", |call| call);
    let list = |answer: &Answer| answer.result()["supportedVersions"].as_array().unwrap().clone();
    assert_eq!(list(&ours).into_iter().filter(|v| !list(&theirs).contains(v)).count(), 0, "we claim no more");
}
