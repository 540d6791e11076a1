//! The table of codes: one test for each row.

use crate::harness::{Harness, Pod, eventually, foreign_route, inside};
use serde_json::{Value, json};

fn with(mut conf: Value, key: &str, value: Value) -> Value {
    conf[key] = value;
    conf
}

#[test]
fn code_1_is_a_version_or_a_verb_that_the_version_lacks() {
    let h = Harness::without_agent();
    let pod = Pod::new("c1");
    for version in ["0.1.0", "0.2.0", "0.3.0", "1.2.0", "9.9.9"] {
        let answer = h.add(&pod, &h.conf_of(version));
        assert!(answer.fails_with(1).contains(version));
        assert!(answer.details().contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"));
    }
    let mut unversioned = h.conf();
    unversioned.as_object_mut().unwrap().remove("cniVersion");
    h.add(&pod, &unversioned).fails_with(1);
    let run = |verb: &str, version: &str| h.call_for(verb, &pod, &h.conf_of(version)).run(h.node());
    assert!(run("CHECK", "0.3.1").fails_with(1).contains("CHECK"));
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        assert!(run("GC", version).fails_with(1).contains("GC"));
        assert!(run("STATUS", version).fails_with(1).contains("STATUS"));
    }
}

#[test]
fn code_2_names_key_and_value_of_what_is_refused() {
    let h = Harness::start();
    for (key, value, words) in [
        ("ipam", json!({"type": "host-local"}), ["ipam", "host-local"]),
        ("runtimeConfig", json!({"ips": ["10.32.0.300/24"]}), ["ips", "10.32.0.300"]),
        ("runtimeConfig", json!({"ips": ["10.32.0.3", "10.32.0.4"]}), ["ips", "10.32.0.4"]),
        ("runtimeConfig", json!({"mac": "01:00:5e:00:00:01"}), ["mac", "01:00:5e:00:00:01"]),
        ("runtimeConfig", json!({"ipRanges": [[{"subnet": "nonsense"}]]}), ["ipRanges", "nonsense"]),
        ("args", json!({"cni": {"ips": 7}}), ["ips", "7"]),
        ("runtimeConfig", json!({"ips": ["192.0.2.7"]}), ["ips", "192.0.2.7"]),
    ] {
        let message = h.add(&Pod::new("c1"), &with(h.conf(), key, value)).fails_with(2);
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    h.is_clean();
}

#[test]
fn code_3_is_a_container_that_is_unknown() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let other = Pod::new("c2");
    let added = h.add(&other, &h.conf());
    h.check(&pod, &h.conf(), added.result()).fails_with(3);
    h.del(&other, &h.conf()).silence();
}

#[test]
fn code_4_names_the_variables() {
    let h = Harness::without_agent();
    let pod = Pod::new("c1");
    for (verb, required) in [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ] {
        for name in required {
            let answer = h.call_for(verb, &pod, &h.conf()).without(name).run(h.node());
            assert!(answer.fails_with(4).contains(name));
        }
        let bare = required.iter().fold(h.call_for(verb, &pod, &h.conf()), |call, name| call.without(name));
        let message = bare.run(h.node()).fails_with(4);
        assert!(required.iter().all(|name| message.contains(name)), "{message}");
    }
    let invalid = |name: &str, value: &str| {
        let answer = h.call_for("ADD", &pod, &h.conf()).env(name, value).run(h.node());
        let message = answer.fails_with(4);
        assert!(message.contains(name), "{message}");
    };
    invalid("CNI_COMMAND", "FROB");
    invalid("CNI_COMMAND", "add");
    invalid("CNI_ARGS", "K8S_POD_NAME");
    invalid("CNI_ARGS", "FROB=1");
    invalid("CNI_NETNS", "/nonexistent/netns");
}

#[test]
fn code_5_is_a_stdin_that_can_not_be_read() {
    let h = Harness::without_agent();
    let call = h.call_for("ADD", &Pod::new("c1"), &h.conf()).stdin_file(h.run_dir());
    assert!(call.run(h.node()).fails_with(5).contains("stdin"));
}

#[test]
fn code_6_is_json_that_does_not_decode() {
    let h = Harness::without_agent();
    let pod = Pod::new("c1");
    for stdin in ["", "{", "null", "[]", "{} {}", "\u{0}"] {
        let answer = h.call_for("ADD", &pod, &h.conf()).stdin(stdin).run(h.node());
        assert!(matches!(answer.failure().0, 6 | 1), "{stdin:?}: {answer:?}");
    }
    h.call_for("ADD", &pod, &h.conf()).stdin("{").run(h.node()).fails_with(6);
    for version in [json!(1), json!("one"), json!("1.0"), json!(""), json!(null)] {
        h.add(&pod, &with(h.conf(), "cniVersion", version)).fails_with(6);
    }
    for bad in [json!("x"), json!({"ips": [{"address": "x"}]}), json!({"interfaces": 1})] {
        let conf = with(h.conf(), "prevResult", bad);
        h.call_for("CHECK", &pod, &conf).run(h.node()).fails_with(6);
        h.add(&pod, &conf).fails_with(6);
    }
}

#[test]
fn code_7_is_an_invalid_configuration() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let refused = |key: &str, value: Value, word: &str| {
        let message = h.add(&pod, &with(h.conf(), key, value)).fails_with(7);
        assert!(message.contains(word), "{message}");
    };
    for name in [json!(""), json!("-x"), json!("a/b"), json!(7), json!(null)] {
        refused("name", name, "name");
    }
    for mtu in [json!(-1), json!(67), json!(65536), json!("1400"), json!(1.5)] {
        refused("mtu", mtu.clone(), &mtu.to_string());
    }
    refused("mtu", json!(9000), "1400");
    refused("socket", json!("weft.sock"), "absolute");
    refused("prevResult", json!({"cniVersion": "1.0.0", "interfaces": [], "ips": []}), "first");
    let without = h.call_for("CHECK", &pod, &h.conf()).run(h.node());
    assert!(without.fails_with(7).contains("prevResult"));
    h.is_clean();
}

#[test]
fn code_8_is_a_namespace_that_is_the_hosts_or_none() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let file = h.run_dir().join("file");
    std::fs::write(&file, "").unwrap();
    for path in ["/proc/self/ns/net", "/proc/self/ns/uts", "/proc/self/status", "/", file.to_str().unwrap()] {
        let answer = h.call_for("ADD", &pod, &h.conf()).env("CNI_NETNS", path).run(h.node());
        assert!(answer.fails_with(8).contains("CNI_NETNS"));
    }
    h.is_clean();
}

#[test]
fn code_11_is_an_agent_without_addresses_and_a_universe_that_is_full() {
    let (joiner, _giver) = Harness::waiting(|_| {});
    let pod = Pod::new("c1");
    let message = joiner.add(&pod, &joiner.conf()).fails_with(11);
    assert!(message.contains("the agent is starting") || message.contains("no addresses"), "{message}");
    assert!(pod.link("eth0").is_none());

    let h = Harness::start_with(|settings| settings.universe = Some("10.32.0.0/29".into()));
    // Eight, less the first, the last and the bridge's.
    let pods: Vec<_> = (0..5).map(|n| Pod::new(&format!("full{n}"))).collect();
    for pod in &pods {
        h.add(pod, &h.conf()).result();
    }
    let message = h.add(&pod, &h.conf()).fails_with(11);
    assert!(message.contains("full") && message.contains(h.node.name()), "who owns what: {message}");
    assert_eq!(h.veths().len(), 5);
    assert!(pod.link("eth0").is_none());
}

#[test]
fn code_50_is_an_add_that_would_fail_and_51_is_pods_that_are_cut_off() {
    let (joiner, _giver) = Harness::waiting(|_| {});
    joiner.status().fails_with(50);
    let h = Harness::start();
    h.nft(crate::status::DROPPING);
    eventually("the agent has noticed", || h.status().code == Some(1));
    let message = h.status().fails_with(51);
    assert!(message.contains("inet other forward drops forwarded packets"), "{message}");
    h.nft("delete table inet other");
    eventually("all is well again", || h.status().code == Some(0));
}

#[test]
fn code_100_is_an_agent_that_can_not_be_reached() {
    let h = Harness::without_agent();
    let message = h.add(&Pod::new("c1"), &h.conf()).fails_with(100);
    assert!(message.contains(h.socket().to_str().unwrap()), "{message}");
    h.gc(json!({"cni.dev/valid-attachments": []})).fails_with(100);
}

#[test]
fn code_101_is_an_address_or_a_range_that_is_used_up() {
    let h = Harness::start();
    let (first, second) = (Pod::new("c1"), Pod::new("c2"));
    let conf = with(h.conf(), "runtimeConfig", json!({"ips": ["10.32.0.9/32"]}));
    h.add(&first, &conf).result();
    assert!(h.add(&second, &conf).fails_with(101).contains("10.32.0.9"));
    let range = json!({"ipRanges": [[{"subnet": "10.32.0.9/32"}]]});
    h.add(&second, &with(h.conf(), "runtimeConfig", range)).fails_with(101);
    assert!(second.link("eth0").is_none());
    h.del(&first, &conf).silence();
    h.is_clean();
}

#[test]
fn code_102_is_an_interface_that_exists() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    pod.occupy("eth0");
    assert!(h.add(&pod, &h.conf()).fails_with(102).contains("eth0"));
    h.is_clean();
}

#[test]
fn code_103_is_a_check_that_finds_a_difference() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let link = pod.link("eth0").unwrap().index;
    inside(&pod.netns, async |netlink| netlink.set_up(link, false).await.unwrap());
    h.check(&pod, &h.conf(), added.result()).fails_with(103);
}

#[test]
fn code_104_is_a_kernel_that_refuses() {
    let h = Harness::start();
    inside(h.node(), async |netlink| {
        let lo = netlink.link_by_name("lo").await.unwrap().index;
        netlink.add_route(&foreign_route("10.32.0.2/32", lo)).await.unwrap();
    });
    assert!(h.add(&Pod::new("c1"), &h.conf()).fails_with(104).contains("10.32.0.2/32"));
    h.is_clean();
}
