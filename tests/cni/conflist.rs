//! "The file in /etc/cni/net.d".

use crate::harness::{Harness, eventually};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::MetadataExt, path::Path};
use weft_lab::agent::Settings;

fn read(directory: &Path) -> Option<Value> {
    let text = fs::read_to_string(directory.join("10-weft.conflist")).ok()?;
    Some(serde_json::from_str(&text).expect("what can be read is whole"))
}

fn into(directory: &Path) -> impl FnOnce(&mut Settings) {
    let flag = ["--cni-conf-dir", directory.to_str().unwrap()].map(String::from);
    |settings| settings.more.extend(flag)
}

#[test]
fn the_conflist_is_written_once_the_node_is_ready_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let (h, giver) = Harness::waiting(into(directory.path()));
    h.status().fails_with(50);
    assert_eq!(read(directory.path()), None);
    giver.start_agent();
    eventually("the conflist is there", || read(directory.path()).is_some());
    h.status().silence();
    let list = read(directory.path()).unwrap();
    assert_eq!(list["cniVersion"], "1.0.0");
    assert_eq!(list["cniVersions"], json!(["0.4.0", "1.0.0", "1.1.0"]));
    assert_eq!(list["plugins"][0]["type"], "weft-cni");
    assert_eq!(list["plugins"][0]["socket"], h.socket().to_str().unwrap());
    assert_eq!(list["plugins"][0]["runDir"], h.run_dir().to_str().unwrap());
    assert_eq!(list["plugins"][1]["type"], "portmap");
    assert_eq!(list["plugins"][2]["type"], "bandwidth");
    let names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["10-weft.conflist"], "no temporary file is left");
    h.node.stop_agent().unwrap();
    assert!(read(directory.path()).is_some(), "never removed");
}

#[test]
fn the_conflist_of_an_agent_that_has_not_changed_is_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let h = Harness::start_with(into(directory.path()));
    let path = directory.path().join("10-weft.conflist");
    let inode = || fs::metadata(&path).map(|file| file.ino()).ok();
    eventually("the conflist is there", || inode().is_some());
    let before = inode();
    h.kill_agent();
    let log = h.node.log().len();
    h.start_agent();
    eventually("the agent has started", || h.node.log()[log..].contains("started"));
    assert_eq!(inode(), before);
    fs::write(&path, "{}").unwrap();
    h.kill_agent();
    h.start_agent();
    eventually("one that differs is replaced", || inode() != before);
    assert_eq!(read(directory.path()).unwrap()["name"], "weft");
}

#[test]
fn files_that_would_win_are_reported_and_not_deleted() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["05-other.conf", "10-a.conflist", "20-later.conflist", "README"] {
        fs::write(directory.path().join(name), "{}").unwrap();
    }
    let h = Harness::start_with(into(directory.path()));
    let warnings = || h.node.status().unwrap()["warnings"].as_array().unwrap().clone();
    eventually("the agent warns", || warnings().len() == 2);
    let says = |n: usize, name: &str| warnings()[n].as_str().unwrap().contains(name);
    assert!(says(0, "05-other.conf") && says(1, "10-a.conflist"));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5);
}

#[test]
fn every_version_in_the_conflist_is_spoken() {
    let h = Harness::without_agent();
    let list: Value = serde_json::from_str(&weft::cni::conflist::text(&h.socket(), h.run_dir())).unwrap();
    let versions = h.call("VERSION", &json!({"cniVersion": "1.0.0"})).run(h.node());
    let ours = versions.result()["supportedVersions"].as_array().unwrap();
    assert!(list["cniVersions"].as_array().unwrap().iter().all(|version| ours.contains(version)));
}
