//! Keys as an operator handles them: made, missing, wrong, renewed, replaced.
use std::{fs, path::Path};

use anyhow::ensure;
use serde_json::Value;
use weft_lab::{Lab, keys, node::Node, wait};

use crate::harness::{SHORT, SOON, START, complaint, lab, printed, reaches};

#[test]
fn an_agent_without_keys_says_how_to_get_some() {
    let lab = lab(1, 0);
    let node = lab.add_node().unwrap();
    node.configure(|settings| settings.ca_dir = None);
    node.start_agent().unwrap();
    let status = node.wait_agent_end(SOON).unwrap();
    assert_eq!(status.code(), Some(1));
    let log = node.log();
    for word in
        ["has no keys", "`weft ca init DIR`", "--ca-dir", "--tls-cert", "--insecure", "nothing was changed"]
    {
        assert!(log.contains(word), "`{word}` is missing in: {log}");
    }
    let nowhere = lab.claim().state_dir().join("nowhere");
    node.configure(|settings| settings.ca_dir = Some(nowhere.clone()));
    node.start_agent().unwrap();
    assert_eq!(node.wait_agent_end(SOON).unwrap().code(), Some(1));
    assert!(node.log().contains(&format!("read {}/ca.crt; make one with `weft ca init`", nowhere.display())));
}

#[test]
fn agents_without_keys_run_where_all_are_told_to_and_say_so() {
    let lab = Lab::builder().nodes(2).pods(1).without_agents().start().unwrap();
    for node in lab.nodes() {
        node.configure(|settings| {
            settings.ca_dir = None;
            settings.more.push("--insecure".into());
        });
        node.start_agent().unwrap();
    }
    for node in lab.nodes() {
        node.wait_ready(START).unwrap();
        node.wait_warning("run with --insecure", SOON).unwrap();
        assert!(printed(node.weft(&["status"]).unwrap()).unwrap().contains("run with --insecure"));
    }
    // One with keys and those without have nothing to do with each other, and say why.
    let other = lab.add_node().unwrap();
    other.start_agent().unwrap();
    other.wait_warning("is that agent run with --insecure?", SOON).unwrap();
}

#[test]
fn the_command_line_makes_keys_that_work_and_are_renewed_in_place() {
    let lab = Lab::builder().nodes(2).pods(1).without_agents().start().unwrap();
    let dir = lab.claim().state_dir().join("pki");
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let path = dir.to_str().unwrap();
    printed(n1.weft(&["ca", "init", path]).unwrap()).unwrap();
    assert!(complaint(n1.weft(&["ca", "init", path]).unwrap()).contains("is there already"));
    let issue = |node: &Node| {
        let name = node.name();
        printed(node.weft(&["ca", "issue", name, "--ca-dir", path, "--out", path, "--days", "2"]).unwrap())
            .unwrap()
    };
    for node in lab.nodes() {
        issue(&node);
        let file = |name: String| format!("{path}/{name}");
        let more = [
            ("--tls-ca", file("ca.crt".into())),
            ("--tls-cert", file(format!("{}.crt", node.name()))),
            ("--tls-key", file(format!("{}.key", node.name()))),
        ];
        node.configure(|settings| {
            settings.ca_dir = None;
            settings.more = more.into_iter().flat_map(|(flag, file)| [flag.into(), file]).collect();
        });
        node.start_agent().unwrap();
    }
    lab.nodes().iter().for_each(|node| node.wait_ready(START).unwrap());
    linked(&n1, "n2");
    warns_of_nothing(&n1);
    let pods = lab.pods();
    pods.iter().for_each(|pod| drop(pod.attach().unwrap()));
    reaches(&pods[0], &pods[1]);

    issue(&n1);
    logs(&n1, "keys and certificates are loaded anew");
    fs::write(dir.join("n2.key"), "nonsense").unwrap();
    n2.wait_warning("n2.key", SOON).unwrap();
    issue(&n2);
    logs(&n2, "keys and certificates are loaded anew");
    warns_of_nothing(&n2);
    let logs = n1.log() + &n2.log();
    let lost = logs.lines().filter(|line| line.contains("link down") && !line.contains("a double"));
    assert_eq!(lost.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn a_node_with_the_wrong_certificate_is_turned_away_on_both_sides() {
    let lab = lab(1, 0);
    let (n1, joiner) = (lab.node("n1").unwrap(), lab.add_node().unwrap());
    let other = lab.claim().state_dir().join("other");
    keys::make_ca(&other).unwrap();
    joiner.configure(|settings| settings.ca_dir = Some(other));
    joiner.start_agent().unwrap();
    joiner.wait_warning("of no CA that this node believes", SOON).unwrap();
    n1.wait_warning("192.0.2.2 was turned away: the other end does not accept this node's certificate", SOON)
        .unwrap();
    // Its operator copies the right files, and it joins without a restart.
    for file in ["ca.key", "ca.crt"] {
        let text = fs::read_to_string(lab.ca_dir().join(file)).unwrap();
        keys::write(&lab.claim().state_dir().join("other").join(file), &text).unwrap();
    }
    joiner.wait_ready(START).unwrap();
    linked(&n1, "n2");
}

#[test]
fn a_ca_is_replaced_while_pods_talk() {
    let lab = lab(2, 1);
    let (a, b) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    reaches(&a, &b);
    // A copy of the CA for each node, as on real hosts: they change one after the other.
    let dirs =
        lab.nodes().into_iter().map(|node| (lab.claim().state_dir().join(node.name()).join("ca"), node));
    let dirs: Vec<_> = dirs.collect();
    let new = lab.claim().state_dir().join("new");
    keys::make_ca(&new).unwrap();
    let read = |dir: &Path, file: &str| fs::read_to_string(dir.join(file)).unwrap();
    let both = read(lab.ca_dir(), "ca.crt") + &read(&new, "ca.crt");
    for (dir, node) in &dirs {
        fs::create_dir_all(dir).unwrap();
        ["ca.crt", "ca.key"]
            .iter()
            .for_each(|file| keys::write(&dir.join(file), &read(lab.ca_dir(), file)).unwrap());
        node.configure(|settings| settings.ca_dir = Some(dir.clone()));
        node.stop_agent().unwrap();
        node.start_agent().unwrap();
        node.wait_ready(START).unwrap();
    }
    linked(&dirs[0].1, "n2");
    reaches(&a, &b);
    let (old, new_cert) = (read(lab.ca_dir(), "ca.crt"), read(&new, "ca.crt"));
    let steps = [
        ("ca.crt", both),
        ("ca.key", read(&new, "ca.key")),
        // What was handed over under the old one still counts.
        ("retired.crt", old.clone()),
        ("ca.crt", new_cert),
    ];
    for (n, (file, text)) in steps.into_iter().enumerate() {
        for (dir, node) in &dirs {
            let before = node.log().matches("loaded anew").count();
            keys::write(&dir.join(file), &text).unwrap();
            wait::until("it is taken up", SOON, || {
                ensure!(node.log().matches("loaded anew").count() > before);
                Ok(())
            })
            .unwrap();
            a.ping(b.address().unwrap(), SHORT).unwrap_or_else(|error| panic!("step {n}: {error:#}"));
        }
    }
    linked(&dirs[0].1, "n2");
    linked(&dirs[1].1, "n1");
    // Who comes now has a certificate of the new one, and believes what was said under the old one.
    keys::write(&new.join("retired.crt"), &old).unwrap();
    let joiner = lab.add_node().unwrap();
    joiner.configure(|settings| settings.ca_dir = Some(new));
    joiner.start_agent().unwrap();
    joiner.wait_ready(START).unwrap();
    let pod = crate::harness::attached(&lab, &joiner);
    reaches(&pod, &a);
    reaches(&b, &pod);
}

#[track_caller]
fn warns_of_nothing(node: &Node) {
    wait::until(&format!("{} has no warning", node.name()), SOON, || {
        let warnings = node.status()?["warnings"].to_string();
        ensure!(warnings == "[]", "{warnings}");
        Ok(())
    })
    .unwrap();
}

fn linked(node: &Node, peer: &str) {
    wait::until(&format!("{} is linked with {peer}", node.name()), SOON, || {
        let peers = node.weft_json("peers")?;
        let is = |entry: &Value| entry["name"] == peer && entry["linked"] == true;
        ensure!(peers["peers"].as_array().is_some_and(|peers| peers.iter().any(is)), "{peers}");
        Ok(())
    })
    .unwrap();
}

fn logs(node: &Node, words: &str) {
    wait::until(&format!("{} logs `{words}`", node.name()), SOON, || {
        ensure!(node.log().contains(words));
        Ok(())
    })
    .unwrap();
}
