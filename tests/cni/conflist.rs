//! "The file in /etc/cni/net.d".

use crate::harness::{Harness, eventually};
use serde_json::{Value, json};
use std::{fs, path::Path};
use weft::cni::Readiness;

fn read(directory: &Path) -> Option<Value> {
    let text = fs::read_to_string(directory.join("10-weft.conflist")).ok()?;
    Some(serde_json::from_str(&text).expect("what can be read is whole"))
}

fn node_waiting(h: &mut Harness, directory: &Path) {
    let waiting = Readiness { reasons: vec!["first policy sync".into()], impaired: false };
    h.start_agent_with(None, waiting, Some(directory));
}

#[test]
fn the_conflist_is_written_once_the_node_is_ready_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let mut h = Harness::without_agent();
    node_waiting(&mut h, directory.path());
    h.status().fails_with(50);
    assert_eq!(read(directory.path()), None);
    h.agent().readiness.send_replace(Readiness::default());
    eventually("the conflist is there", || read(directory.path()).is_some());
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
    h.agent().readiness.send_replace(Readiness { reasons: vec!["bridge is down".into()], impaired: true });
    h.status().fails_with(51);
    h.kill_agent();
    assert!(read(directory.path()).is_some(), "never removed");
}

#[test]
fn the_conflist_of_an_agent_that_has_not_changed_is_not_touched() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let mut h = Harness::without_agent();
    let write = || weft::cni::write_conflist(directory.path(), &h.socket(), h.run_dir()).unwrap();
    write();
    let inode = || fs::metadata(directory.path().join("10-weft.conflist")).unwrap().ino();
    let before = inode();
    assert_eq!(write(), [""; 0]);
    assert_eq!(inode(), before);
    node_waiting(&mut h, directory.path());
}

#[test]
fn files_that_would_win_are_reported_and_not_deleted() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["05-other.conf", "10-a.conflist", "20-later.conflist", "README"] {
        fs::write(directory.path().join(name), "{}").unwrap();
    }
    let mut h = Harness::without_agent();
    node_waiting(&mut h, directory.path());
    h.agent().readiness.send_replace(Readiness::default());
    let warnings = || h.agent().warnings.borrow().clone();
    eventually("the agent warns", || warnings().len() == 2);
    assert!(warnings()[0].contains("05-other.conf") && warnings()[1].contains("10-a.conflist"));
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
