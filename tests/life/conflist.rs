//! The CNI configuration that an agent writes.
use std::fs;

use anyhow::ensure;
use serde_json::Value;
use weft_lab::{Lab, wait};

use crate::harness::{SOON, START};

#[test]
fn a_conflist_that_cannot_be_written_is_tried_again() {
    let temp = tempfile::tempdir().unwrap();
    let conf = temp.path().join("net.d");
    let lab = Lab::builder().without_agents().start().unwrap();
    let node = lab.node("n1").unwrap();
    node.configure(|settings| {
        settings.more.extend(["--cni-conf-dir".into(), conf.display().to_string()]);
    });
    node.start_agent().unwrap();
    wait::until("it says that pods can't start", START, || {
        let status = node.status()?;
        ensure!(status["warnings"].to_string().contains("pods can't start: write "), "{status}");
        Ok(())
    })
    .unwrap();

    fs::create_dir(&conf).unwrap();
    wait::until("the conflist is written, and nobody warns any more", SOON, || {
        ensure!(conf.join("10-weft.conflist").exists());
        let status = node.status()?;
        ensure!(!status["warnings"].to_string().contains("pods can't start"), "{status}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_conflist_appears_whole_once_ready_and_is_never_removed() {
    let conf = tempfile::tempdir().unwrap();
    let path = conf.path().join("10-weft.conflist");
    fs::write(conf.path().join("05-other.conflist"), "{}").unwrap();
    fs::write(conf.path().join("99-later.conflist"), "{}").unwrap();
    let lab = Lab::builder().without_agents().start().unwrap();
    let node = lab.node("n1").unwrap();
    node.configure(|settings| {
        settings.more.extend(["--cni-conf-dir".into(), conf.path().display().to_string()]);
    });

    node.start_agent().unwrap();
    let mut seen = Vec::new();
    wait::until("the conflist is there", START, || {
        let names = fs::read_dir(conf.path())?.map(|entry| Ok(entry?.file_name().into_string().unwrap()));
        seen.extend(names.collect::<std::io::Result<Vec<_>>>()?);
        ensure!(path.exists());
        Ok(())
    })
    .unwrap();
    let text = fs::read_to_string(&path).unwrap();
    node.wait_ready(SOON).unwrap();
    let list: Value = serde_json::from_str(&text).expect("it is whole from the first moment");
    assert_eq!((&list["name"], &list["plugins"][0]["type"]), (&"weft".into(), &"weft-cni".into()));
    let socket = list["plugins"][0]["socket"].as_str().unwrap();
    assert_eq!(socket, node.socket().to_str().unwrap());

    let status = node.status().unwrap();
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("05-other.conflist") && !warnings.contains("99-later"), "{status}");

    node.stop_agent().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    node.kill_agent().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    let mut names: Vec<_> =
        fs::read_dir(conf.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["05-other.conflist", "10-weft.conflist", "99-later.conflist"]);
}
