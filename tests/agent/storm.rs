//! Pods come and go while agents are killed: whatever a kill interrupts, nothing is left of it.
//!
//! ```text
//!   8 runtimes   ADD ─ok─▶ lives ─▶ DEL ┐   1,000 times together
//!                 └─failed─▶ DEL ─▶ ADD ┘
//!   2 agents     ──▶ SIGKILL ──▶ start ──▶ SIGKILL ...  after every 40th pod; now and then while it starts
//! ```
use std::{
    io::Write,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use weft_lab::{Lab, node::Node, pod::Pod, wait};

use crate::{
    living::{Container, Living, address, code},
    seen,
};

/// What happened so far.
#[derive(Default)]
struct Tally {
    pods: AtomicUsize,
    adds: AtomicUsize,
    failed: AtomicUsize,
    dels: AtomicUsize,
}

#[test]
fn a_storm_of_adds_and_dels_under_kills_leaves_nothing() {
    let _machine = crate::one_at_a_time();
    let lab = Lab::builder().nodes(2).pods(1).verbosity("warn").start().unwrap();
    let nodes = lab.nodes();
    let (living, tally) = (Living::default(), Tally::default());
    for steady in lab.pods() {
        living.begins(steady.address().unwrap(), "a steady pod").unwrap();
    }
    let rooms: Vec<_> = (0..RUNTIMES).map(|n| lab.add_pod(&nodes[n % nodes.len()]).unwrap()).collect();
    let look = || -> Vec<_> { nodes.iter().map(|node| seen::kernel(node).unwrap()).collect() };
    let (before, namespaces) = (look(), namespaces(&lab));

    let start = Instant::now();
    let kills = thread::scope(|scope| {
        let runtimes: Vec<_> =
            rooms.iter().map(|room| scope.spawn(|| runtime(room, &living, &tally))).collect();
        let kills = kill(&nodes, &tally, || runtimes.iter().any(|runtime| runtime.is_finished()));
        for runtime in runtimes {
            runtime.join().expect("a runtime does not panic").unwrap();
        }
        kills.unwrap()
    });
    let took = start.elapsed();

    let mut leaks = Vec::new();
    let clean = wait::until("nothing is left of the storm", Duration::from_secs(10), || {
        leaks = left(&nodes)?;
        for (node, (before, now)) in nodes.iter().zip(before.iter().zip(look())) {
            leaks.extend(now.difference(before).map(|line| format!("{}: {line}", node.name())));
            leaks.extend(before.difference(&now).map(|line| format!("{}: no {line}", node.name())));
        }
        ensure!(leaks.is_empty(), "{}", leaks.join("\n"));
        Ok(())
    });
    let count = |counter: &AtomicUsize| counter.load(Relaxed);
    let (adds, dels, failed) = (count(&tally.adds), count(&tally.dels), count(&tally.failed));
    // Past the harness, which keeps what a test that passes says.
    writeln!(
        std::io::stderr(),
        "storm: adds={adds} dels={dels} kills={kills} leaks={} ({failed} of the ADDs failed; {took:.1?})",
        leaks.len()
    )
    .unwrap();
    clean.unwrap();
    assert!(kills >= 20 && adds - failed == PODS && dels == adds, "{kills} kills");
    assert_eq!(namespaces, self::namespaces(&lab));
    for room in &rooms {
        assert_eq!(seen::links(room.netns()).unwrap(), ["lo"], "in {}", room.full_name());
    }
    let (one, other) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    wait::until("the steady pods reach each other", Duration::from_secs(5), || {
        one.ping(other.address()?, Duration::from_millis(300))
    })
    .unwrap();
    lab.finish().unwrap();
}

/// Pods in one namespace, one after another, until there were enough of them.
fn runtime(room: &Pod, living: &Living, tally: &Tally) -> anyhow::Result<()> {
    while tally.pods.fetch_add(1, Relaxed) < PODS {
        while !pod(room, living, tally)? {
            // A runtime that got nothing tries again once there is somebody to ask.
            wait::until("an agent listens", Duration::from_secs(20), || {
                Ok(UnixStream::connect(room.node().socket())?)
            })?;
        }
    }
    Ok(())
}

/// One pod's life; false if ADD failed, after which it was cleaned up like any other.
fn pod(room: &Pod, living: &Living, tally: &Tally) -> anyhow::Result<bool> {
    let number = tally.adds.fetch_add(1, Relaxed);
    let container = Container { pod: room, id: format!("storm-{number}") };
    let added = container.add()?;
    if added.success {
        let address = address(&added)?;
        living.begins(address, &container.id)?;
        if number.is_multiple_of(PINGED) {
            room.ping(address, Duration::from_secs(1)).context("its own address")?;
        }
        living.ends(address);
    } else {
        let code = code(&added)?;
        ensure!(matches!(code, 11 | 100), "not an error that comes and goes: {}", added.stdout);
        let links = seen::links(room.netns())?;
        ensure!(links == ["lo"], "a failed ADD left {links:?}: {}", added.stdout);
        tally.failed.fetch_add(1, Relaxed);
    }
    container.del()?;
    tally.dels.fetch_add(1, Relaxed);
    Ok(added.success)
}

/// Kills one agent after another, as pods come and go, and returns how often.
fn kill(nodes: &[Arc<Node>], tally: &Tally, over: impl Fn() -> bool) -> anyhow::Result<usize> {
    let mut kills = 0;
    for round in 0.. {
        let due = || {
            let pods = tally.pods.load(Relaxed);
            ensure!(pods >= (round + 1) * PODS_PER_KILL || over(), "{pods} pods were begun");
            Ok(())
        };
        wait::until("the next kill is due", Duration::from_secs(60), due)?;
        if over() {
            break;
        }
        let node = &nodes[round % nodes.len()];
        node.kill_agent()?;
        node.start_agent()?;
        kills += 1;
        if round % 4 == 3 {
            // While it starts, or right after.
            let socket = node.socket();
            wait::until("it comes up", Duration::from_secs(20), || Ok(UnixStream::connect(&socket)?))?;
            node.kill_agent()?;
            node.start_agent()?;
            kills += 1;
        }
    }
    for node in nodes {
        node.wait_ready(Duration::from_secs(20))?;
    }
    Ok(kills)
}

/// What the agents still have to do with pods that are gone.
fn left(nodes: &[Arc<Node>]) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    for node in nodes {
        let name = node.name();
        left.extend(seen::tombstones(node).into_iter().map(|file| format!("{name}: tombstone {file}")));
        let gone = seen::pods(node)?.into_iter().filter(|(id, _)| id.starts_with("storm-"));
        left.extend(gone.map(|(id, (address, state))| format!("{name}: {address} {state} for {id}")));
        let ranges = node.weft_json("ipam")?["ranges"].as_array().cloned().unwrap_or_default();
        let allocated: u64 = ranges.iter().filter_map(|range| range["allocated"].as_u64()).sum();
        // The bridge's and the steady pod's.
        if allocated != 2 {
            left.push(format!("{name}: {allocated} addresses are allocated"));
        }
    }
    Ok(left)
}

fn namespaces(lab: &Lab) -> Vec<String> {
    let list = || {
        let files = std::fs::read_dir(Path::new(weft_lab::sandbox::NETNS_DIR))?;
        let mut names: Vec<_> =
            files.flatten().map(|file| file.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(names)
    };
    lab.sandbox().run(list).unwrap()
}

const PODS: usize = 1000;
const RUNTIMES: usize = 8;
/// One kill, or two in a row, for so many pods.
const PODS_PER_KILL: usize = 40;
/// Every so many pods one is tried out.
const PINGED: usize = 10;
