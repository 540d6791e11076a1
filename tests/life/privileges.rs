//! What an agent may do on its node: change the network, and write its own directories.
use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt, chown},
    path::Path,
    process::Command,
};

use anyhow::ensure;
use nix::{
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, makedev, mknod},
};
use weft::{linux::store::Store, types::DataSecret};
use weft_lab::{Lab, fault, node::Node, tools, traffic, wait};

use crate::{
    harness::{Running, SOON, START, attached, lab, reaches},
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

#[test]
fn net_admin_is_enough_for_a_user_who_is_not_root() {
    let lab = Lab::builder().nodes(2).without_agents().start().unwrap();
    let (node, other) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let home = home(&node);
    for (directory, of) in [("ca", Some(lab.ca_dir())), ("state", None), ("run", None)] {
        let made = home.path().join(directory);
        fs::create_dir(&made).unwrap();
        for file in of.into_iter().flat_map(|of| fs::read_dir(of).unwrap()) {
            let copy = made.join(file.as_ref().unwrap().file_name());
            fs::copy(file.unwrap().path(), &copy).unwrap();
            chown(copy, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        chown(made, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    node.configure(|settings| {
        settings.ca_dir = Some(home.path().join("ca"));
        (settings.state_dir, settings.run_dir) = (home.path().join("state"), home.path().join("run"));
    });
    // As on most hosts; here it may be for root only.
    let tun = home.path().join("tun");
    mknod(&tun, SFlag::S_IFCHR, Mode::empty(), makedev(10, 200)).unwrap();
    fs::set_permissions(&tun, fs::Permissions::from_mode(0o666)).unwrap();
    let over = || Ok(mount(Some(&tun), "/dev/net/tun", None::<&str>, MsFlags::MS_BIND, None::<&str>)?);
    node.netns().sandbox().run(over).unwrap();
    let agent = node.agent_command().unwrap();
    let mut command = as_nobody(&home, &["--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin"]);
    command.args(agent.get_args());
    command.envs(agent.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut running = Running::start(&node, command);
    other.start_agent().unwrap();
    let ready = wait::until("the agent is ready", START, || {
        if running.wait_end(std::time::Duration::ZERO).is_ok() {
            return Ok(false);
        }
        let (status, body) = node.http("/readyz")?;
        ensure!(status == 200, "{body}");
        Ok(true)
    });
    assert!(ready.is_ok_and(|ready| ready), "{}", running.said());
    other.wait_ready(START).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
    for line in ["Uid:\t65534\t65534", "CapPrm:\t0000000000001000", "CapEff:\t0000000000001000"] {
        assert!(status.contains(line), "{line} is not in\n{status}");
    }
    let (here, there) = (attached(&lab, &node), attached(&lab, &other));
    reaches(&here, &there);
    reaches(&there, &here);
    here.detach().unwrap();
    there.detach().unwrap();
    drop(running);
}

#[test]
fn the_local_socket_turns_other_users_away_also_where_its_mode_would_let_them_in() {
    let lab = lab(1, 0);
    let node = lab.node("n1").unwrap();
    let home = home(&node);
    let mut ancestors: Vec<_> = node.socket().ancestors().map(Path::to_path_buf).collect();
    ancestors.retain(|path| path.starts_with(lab.claim().run_dir()));
    for path in ancestors {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode | 0o777)).unwrap();
    }
    let status = |mut command: Command| {
        command.arg("status").env("WEFT_RUN_DIR", node.run_dir());
        node.exec(command).unwrap()
    };
    assert!(status(Command::new(&node.binaries().unwrap().weft)).status.success());
    let refused = status(as_nobody(&home, &[]));
    assert!(!refused.status.success(), "{refused:?}");
    assert!(!String::from_utf8_lossy(&refused.stderr).contains("ermission denied"), "{refused:?}");
    let log = node.log();
    assert!(log.contains("refused on the local socket") && log.contains("uid=65534"), "{log}");
}

#[test]
fn no_key_is_ever_logged() {
    let lab = Lab::builder().nodes(2).pods(1).verbosity("trace").start().unwrap();
    reaches(&lab.pod("n1/p1").unwrap(), &lab.pod("n2/p1").unwrap());
    let node = lab.node("n1").unwrap();
    let pem = fs::read_to_string(lab.ca_dir().join("ca.key")).unwrap();
    let ca: Vec<&str> = pem.lines().filter(|line| line.len() > 40 && !line.starts_with('-')).collect();
    assert!(!ca.is_empty());
    node.stop_agent().unwrap();
    let (store, _) =
        Store::open(&node.state_dir(), &"n1".parse().unwrap(), &"10.32.0.0/12".parse().unwrap()).unwrap();
    let secret = store.data_secret(DataSecret::new([0; 32])).unwrap();
    assert_ne!(secret.bytes(), &[0; 32]);
    let half = &secret.bytes()[..16];
    let hex: String = half.iter().map(|byte| format!("{byte:02x}")).collect();
    let listed = format!("{half:?}");
    let log = node.log();
    assert!(log.lines().count() > 100, "it logs everything");
    for key in
        ca.into_iter().chain([&*hex, &hex.to_uppercase(), listed.trim_matches(['[', ']']), "PRIVATE KEY"])
    {
        assert!(!log.contains(key), "a key is logged: {key}");
    }
}

#[test]
fn a_key_that_was_read_does_not_stay_in_memory() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    reaches(&lab.pod("n1/p1").unwrap(), &lab.pod("n2/p1").unwrap());
    let node = lab.node("n1").unwrap();
    let memory = memory_of(node.agent_process().unwrap().pid);
    let holds = |key: &[u8]| memory.windows(key.len()).any(|bytes| bytes == key);
    let pem = fs::read_to_string(lab.ca_dir().join("ca.key")).unwrap();
    let ca: Vec<&str> = pem.lines().filter(|line| line.len() > 40 && !line.starts_with('-')).collect();
    assert!(!ca.is_empty());
    for line in ca {
        assert!(!holds(line.as_bytes()), "the agent has issued its certificate, and has the CA's key still");
    }
    // What it works with it has, and it is found so.
    node.stop_agent().unwrap();
    let (store, _) =
        Store::open(&node.state_dir(), &"n1".parse().unwrap(), &"10.32.0.0/12".parse().unwrap()).unwrap();
    assert!(holds(store.data_secret(DataSecret::new([0; 32])).unwrap().bytes()));
}

/// All that a process can write to.
fn memory_of(pid: impl std::fmt::Display) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut all = Vec::new();
    // proc_pid_maps(5): first-end, rights.
    for map in maps.lines().filter(|map| map.split(' ').nth(1).is_some_and(|rights| rights.starts_with("rw")))
    {
        let (first, end) = map.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [first, end] = [first, end].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut bytes = vec![0; (end - first) as usize];
        // Some mappings are a device's.
        if memory.read_exact_at(&mut bytes, first).is_ok() {
            all.extend(bytes);
        }
    }
    all
}

/// A directory of nobody's, with a copy of `weft`: that user may not see where this one was built.
fn home(node: &Node) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(&node.binaries().unwrap().weft, home.path().join("weft")).unwrap();
    home
}

/// `weft` for a user who is not root.
fn as_nobody(home: &tempfile::TempDir, rights: &[&str]) -> Command {
    let setpriv =
        tools::find("setpriv").expect("there is setpriv (Debian and Ubuntu: apt-get install util-linux)");
    let mut command = Command::new(setpriv);
    let user = NOBODY.to_string();
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]).args(rights).arg("--");
    command.arg(home.path().join("weft"));
    command
}

/// Who owns nothing.
const NOBODY: u32 = 65534;
