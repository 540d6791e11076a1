//! What an agent may do on its node: change the network, and write its own directories.
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use weft_lab::{Lab, fault, node::Node, traffic, wait};

use crate::{
    harness::{SOON, START, attached, lab, reaches},
    kernel::Kernel,
};

/// Every thread of the node's agent has this line in its `status`.
fn all_threads_have(node: &Node, line: &str) {
    let tasks = format!("/proc/{}/task", node.agent_process().unwrap().pid);
    for task in fs::read_dir(tasks).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains(line), "{line} is not in\n{status}");
    }
}

fn has_net_admin_only(node: &Node) {
    for set in ["Inh", "Prm", "Eff", "Bnd", "Amb"] {
        all_threads_have(node, &format!("Cap{set}:\t0000000000001000\n"));
    }
    all_threads_have(node, "NoNewPrivs:\t1\n");
}

fn modes_below(directory: &Path) -> Vec<(String, u32)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    entries.map(|path| (path.display().to_string(), mode(&path))).collect()
}

#[test]
fn an_agent_keeps_net_admin_only_and_its_files_to_itself() {
    let lab = lab(1, 1);
    let node = lab.node("n1").unwrap();
    has_net_admin_only(&node);
    let files = [modes_below(&node.state_dir()), modes_below(&node.run_dir())].concat();
    assert!(files.len() > 3, "{files:?}");
    for (path, mode) in files {
        assert_eq!(mode & 0o077, 0, "{path} has mode {mode:o}");
    }
}

#[test]
fn net_admin_on_a_read_only_file_system_is_enough() {
    let lab = Lab::builder().nodes(2).pods(1).confined(true).start().unwrap();
    let (node, outside) = (lab.node("n1").unwrap(), lab.underlay().outside_address());
    let (here, there) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    has_net_admin_only(&node);
    let mounts =
        fs::read_to_string(format!("/proc/{}/mountinfo", node.agent_process().unwrap().pid)).unwrap();
    // proc_pid_mountinfo(5): id, parent, device, root, mount point, options.
    let root = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|mount| mount[4] == "/");
    assert!(root.is_some_and(|mount| mount[5].starts_with("ro")), "{mounts}");

    reaches(&here, &there);
    reaches(&there, &here);
    let seen = traffic::seen_as(here.netns(), &lab.underlay().outside, outside, SOON).unwrap();
    assert_eq!(seen, node.address(), "masqueraded");

    let whole = Kernel::of(&node).without_handles();
    fault::nft(node.netns(), "flush ruleset").unwrap();
    node.netns().sysctl("net/ipv4/conf/weft/forwarding", "0").unwrap();
    wait::until("all is put right", SOON, || Kernel::of(&node).without_handles().check(&whole)).unwrap();
    reaches(&here, &there);

    node.stop_agent().unwrap();
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    reaches(&here, &there);
    let another = attached(&lab, &node);
    reaches(&there, &another);
    another.detach().unwrap();
    here.detach().unwrap();
    there.detach().unwrap();
    assert!(node.weft(&["reset"]).unwrap().status.success());
    assert!(node.wait_agent_end(SOON).unwrap().success());
}
