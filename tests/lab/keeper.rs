//! The program: `up`, `exec`, `down`, and `kill -9`, each in a directory of its own beside the user's labs.
use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::Pid};
use weft_lab::{process::Process, wait};

fn lab(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-lab"));
    command.args(arguments).env("WEFT_LAB_DIR", directory).stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Brings a bare lab up; returns its keeper.
fn up(directory: &Path) -> Process {
    let up = lab(directory, &["up", "--bare", "--nodes", "2", "--pods", "1"]);
    assert!(up.status.success(), "{}", stderr(&up));
    assert!(stdout(&up).contains("n2/p1"), "{}", stdout(&up));
    let facts: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.join("up/lab.json")).unwrap()).unwrap();
    facts["keeper"].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_lab_stays_up_until_it_is_taken_down() {
    let directory = tempfile::tempdir().unwrap();
    let keeper = up(directory.path());
    let exec = |place, command: &[&str]| lab(directory.path(), &[&["exec", place, "--"], command].concat());

    let links = exec("n1", &["cat", "/proc/net/dev"]);
    assert!(stdout(&links).contains("eth0:"), "{}{}", stdout(&links), stderr(&links));
    let names = exec("n2/p1", &["ls", "/var/run/netns"]);
    assert_eq!(
        stdout(&names).split_whitespace().collect::<Vec<_>>(),
        ["n1", "n1-p1", "n2", "n2-p1", "outside", "underlay"]
    );
    let variable = exec("n1", &["sh", "-c", "echo $WEFT_RUN_DIR; exit 7"]);
    assert_eq!(Path::new(stdout(&variable).trim()), directory.path().join("up/n1"));
    assert_eq!(variable.status.code(), Some(7));
    let nowhere = exec("n9", &["true"]);
    assert!(stderr(&nowhere).contains("has no `n9`, but n1, n2, "), "{}", stderr(&nowhere));

    let second = lab(directory.path(), &["up", "--bare"]);
    assert!(!second.status.success());
    assert_eq!(stderr(&second).trim(), "a lab is up already; `cargo lab down` takes it down");

    let down = lab(directory.path(), &["down"]);
    assert!(down.status.success(), "{}", stderr(&down));
    assert!(!keeper.runs());
    assert!(!directory.path().join("up").exists());
    let again = lab(directory.path(), &["down"]);
    assert_eq!(stderr(&again).trim(), "no lab is up; `cargo lab up` starts one");
    assert!(!again.status.success());
}

#[test]
fn what_a_killed_lab_left_is_cleaned_up_by_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let keeper = up(directory.path());
    // It stands for an agent that outlived its lab.
    let mut orphan = Command::new("sleep").arg("60").spawn().unwrap();
    let process = Process::of(Pid::from_raw(orphan.id().cast_signed())).unwrap();
    let list = directory.path().join("up/processes");
    writeln!(OpenOptions::new().append(true).open(list).unwrap(), "{process}").unwrap();
    keeper.signal(Signal::SIGKILL).unwrap();
    wait::until("the keeper ends", Duration::from_secs(5), || {
        anyhow::ensure!(!keeper.runs());
        Ok(())
    })
    .unwrap();
    let exec = lab(directory.path(), &["exec", "n1", "--", "true"]);
    assert_eq!(stderr(&exec).trim(), "no lab is up; `cargo lab up` starts one");

    let next = up(directory.path());
    assert_ne!(next, keeper);
    assert!(!orphan.wait().unwrap().success(), "the orphan was not ended");
    assert!(lab(directory.path(), &["down"]).status.success());
}
