//! Two agents with one name.
use std::time::Duration;

use anyhow::ensure;
use weft_lab::wait;

use crate::{
    harness::{SHORT, SOON, START, lab, reaches},
    kernel::Kernel,
};

#[test]
fn the_later_of_two_with_one_name_refuses_and_touches_nothing() {
    let lab = lab(2, 1);
    let (elder, twin) = (lab.node("n1").unwrap(), lab.add_node().unwrap());
    let conf = tempfile::tempdir().unwrap();
    twin.configure(|settings| {
        settings.name = "n1".into();
        // It hears of the elder from another.
        settings.peers = vec![lab.node("n2").unwrap().address().to_string()];
        settings.more.extend(["--cni-conf-dir".into(), conf.path().display().to_string()]);
    });
    let before = Kernel::of(&twin);

    twin.start_agent().unwrap();
    let status = twin.wait_agent_end(SOON).unwrap();
    assert_eq!(status.code(), Some(1), "{}", twin.log());
    let log = twin.log();
    assert!(log.contains("the name n1 is taken") && log.contains("192.0.2.1:6783"), "{log}");
    assert!(log.contains("--name"), "{log}");
    Kernel::of(&twin).assert_is(&before);
    assert_eq!(std::fs::read_dir(conf.path()).unwrap().count(), 0);

    elder.wait_ready(SHORT).unwrap();
    twin.configure(|settings| settings.name = "n3".into());
    twin.start_agent().unwrap();
    twin.wait_ready(START).unwrap();
    reaches(&lab.pod("n1/p1").unwrap(), &lab.pod("n2/p1").unwrap());
    reaches(&lab.pod("n2/p1").unwrap(), &lab.pod("n1/p1").unwrap());
    let peers = lab.node("n2").unwrap().weft_json("peers").unwrap();
    let endpoints = |peer: &serde_json::Value| (peer["name"] == "n1").then(|| peer["endpoints"].clone());
    let found: Vec<_> = peers["peers"].as_array().unwrap().iter().filter_map(endpoints).collect();
    assert_eq!(found, [serde_json::json!(["192.0.2.1:6783"])]);
}

#[test]
fn an_agent_that_was_killed_starts_again_under_its_name() {
    let lab = lab(2, 1);
    let node = lab.node("n1").unwrap();
    for round in 0..2 {
        match round {
            0 => node.kill_agent().unwrap(),
            _ => drop(node.stop_agent().unwrap()),
        }
        node.start_agent().unwrap();
        node.wait_ready(START).unwrap();
        reaches(&lab.pod("n1/p1").unwrap(), &lab.pod("n2/p1").unwrap());
        wait::until("the peer knows one n1, and is linked with it", Duration::from_secs(5), || {
            let status = lab.node("n2")?.status()?;
            ensure!(status["peers"] == 1 && status["links"] == 1, "{status}");
            Ok(())
        })
        .unwrap();
    }
}
