//! What is left when a lab ends: nothing, or a complaint.
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{SigSet, Signal},
    unistd::Pid,
};
use weft_lab::{Lab, leaks::Host, links, namespace::Netns, process::Process, sandbox::Sandbox, wait};

fn bare(nodes: usize) -> Lab {
    Lab::builder().nodes(nodes).pods(1).without_agents().start().unwrap()
}

#[test]
fn namespaces_are_seen_by_the_lab_only_and_vanish_with_it() {
    let lab = bare(2);
    let path = lab.pod("n2/p1").unwrap().netns().path();
    assert_eq!(path, Path::new("/var/run/netns/n2-p1"));
    assert!(!path.exists(), "the host sees it");
    assert!(lab.sandbox().run(|| Ok(path.exists())).unwrap(), "the lab does not see it");
    let (run, state) = (lab.claim().run_dir().to_owned(), lab.claim().state_dir().to_owned());
    assert!(run.exists() && state.exists());
    lab.finish().unwrap();
    assert!(!run.exists() && !state.exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("weft-lab"), "{mounts}");
}

#[test]
fn two_labs_run_side_by_side() {
    // Named ones don't wait for a free place, of which there may be one only.
    let named = |name: &str| {
        let name = format!("{name}-{}", std::process::id());
        Lab::builder().name(&name).without_agents().start().unwrap()
    };
    let (one, two) = (named("one"), named("two"));
    let inode = |lab: &Lab| lab.node("n1").unwrap().netns().inode().unwrap();
    assert_ne!(inode(&one), inode(&two));
    one.finish().unwrap();
    two.node("n1").unwrap().netns().links(async |links| links.up("eth0").await).unwrap();
    two.finish().unwrap();
}

#[test]
fn a_removed_pods_namespace_is_gone() {
    let lab = bare(1);
    let pod = lab.pod("n1/p1").unwrap();
    let path = pod.netns().path();
    lab.remove_pod(&pod);
    drop(pod);
    assert!(!lab.sandbox().run(|| Ok(path.exists())).unwrap());
    assert_eq!(lab.add_pod(&lab.node("n1").unwrap()).unwrap().full_name(), "n1/p1");
}

#[test]
fn a_process_left_in_a_namespace_is_named() {
    let lab = bare(1);
    let node = lab.node("n1").unwrap();
    let mut sleep = Command::new("sleep");
    sleep.arg("60").stdin(Stdio::null());
    let mut child = lab.sandbox().spawn(node.netns(), sleep).unwrap();
    drop(node);
    let error = lab.finish().unwrap_err().to_string();
    assert!(error.contains(&format!("process {} (sleep)", child.id())), "{error}");
    // The sandbox ended with the lab, and what was started in it ended with the sandbox.
    child.wait().unwrap();
}

#[test]
fn a_link_and_a_route_left_on_the_host_are_named() {
    let sandbox = Arc::new(Sandbox::new().unwrap());
    let host = Netns::create(&sandbox, "host").unwrap();
    let leaks = host.run(|| {
        let before = Host::look()?;
        links::here(async |links| {
            links.bridge("weft").await?;
            links.bridge("wf0123456789ab").await?;
            links.bridge("wlan0").await
        })?;
        before.compare(&BTreeSet::new())
    });
    let leaks: Vec<_> = leaks.unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(leaks, ["link weft on the host", "link wf0123456789ab on the host"]);
}

#[test]
fn processes_started_in_a_sandbox_end_with_it() {
    let sandbox = Arc::new(Sandbox::new().unwrap());
    let netns = Netns::create(&sandbox, "n").unwrap();
    let mut command = Command::new("sleep");
    command.arg("60");
    let mut child = sandbox.spawn(&netns, command).unwrap();
    drop((netns, sandbox));
    let status = wait::until("sleep ends", Duration::from_secs(5), || {
        child.try_wait()?.ok_or_else(|| anyhow::anyhow!("it runs"))
    });
    assert!(!status.unwrap().success());
    assert_eq!(Process::of(Pid::from_raw(child.id().cast_signed())), None);
}

#[test]
fn processes_listen_to_signals_that_their_lab_blocks() {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    // The sandbox's thread inherits this test's mask.
    term.thread_block().unwrap();
    let sandbox = Arc::new(Sandbox::new().unwrap());
    let netns = Netns::create(&sandbox, "n").unwrap();
    let mut command = Command::new("sleep");
    command.arg("60");
    let mut child = sandbox.spawn(&netns, command).unwrap();
    Process::of(Pid::from_raw(child.id().cast_signed())).unwrap().signal(Signal::SIGTERM).unwrap();
    wait::until("sleep ends", Duration::from_secs(5), || {
        child.try_wait()?.ok_or_else(|| anyhow::anyhow!("it runs"))
    })
    .unwrap();
}
