//! State files that are damaged while no agent runs.
use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::ensure;
use weft_lab::{Lab, fault::Fault, node::Node, pod::Pod, traffic::Stream, wait};

use crate::{living::code, seen};

type Damage = (&'static str, fn(&mut Vec<u8>));

const DAMAGES: [Damage; 4] = [
    ("empty", |bytes| bytes.clear()),
    // What is in use lies at the beginning, and the file grows ahead of it.
    ("cut short", |bytes| bytes.truncate(bytes.len() / 16)),
    ("another file", |bytes| *bytes = b"[Unit]\nDescription=not a database\n".repeat(300)),
    // Behind the first page, by which a database is known.
    ("with bytes that changed", |bytes| bytes[4096..].iter_mut().step_by(61).for_each(|byte| *byte ^= 0xff)),
];

#[test]
fn a_node_whose_state_file_is_damaged_learns_it_anew() {
    let lab = Lab::builder().nodes(2).pods(2).start().unwrap();
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    // A joiner has space that once was a seed's: the seed must not take it for its own again.
    let n3 = lab.add_node().unwrap();
    n3.start_agent().unwrap();
    n3.wait_ready(Duration::from_secs(20)).unwrap();
    let joiners = lab.add_pod(&n3).unwrap();
    joiners.attach().unwrap();
    let (here, there) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let stream =
        Stream::start(here.netns(), there.netns(), there.address().unwrap(), u64::MAX, PATIENCE * 4).unwrap();
    let ranges = owned(&n1);

    for (name, damage) in DAMAGES {
        let before = seen::pods(&n1).unwrap();
        n1.kill_agent().unwrap();
        harm(&n1, damage);
        n1.start_agent().unwrap();
        n1.wait_ready(PATIENCE).unwrap();
        assert_eq!(aside(&n1).len(), 1, "{name}: it is moved aside");
        fs::remove_file(&aside(&n1)[0]).unwrap();
        let log = n1.log();
        let last_start = log.rsplit("the state file is damaged").next().unwrap();
        assert!(log.contains("ERROR") && last_start.contains("moved_to"), "{name}: not loud:\n{last_start}");
        assert_eq!(seen::pods(&n1).unwrap(), before, "{name}: addresses are re-claimed");
        wait::until(&format!("{name}: its ranges are learnt"), PATIENCE, || {
            let now = owned(&n1);
            ensure!(now == ranges, "{now:?} instead of {ranges:?}");
            Ok(())
        })
        .unwrap();
        reach(&here, &joiners);
        reach(&joiners, &here);
        stream.advances(1 << 20, PATIENCE).unwrap();
        // New pods on all nodes get what nobody has.
        let mut taken: BTreeSet<IpAddr> = lab.nodes().iter().map(|node| bridge(node)).collect();
        for pod in lab.pods() {
            assert!(
                taken.insert(pod.address().unwrap()),
                "{name}: {} has another's address",
                pod.full_name()
            );
        }
        for node in [&n1, &n2, &n3] {
            let pod = lab.add_pod(node).unwrap();
            let address = pod.attach().unwrap().address;
            assert!(taken.insert(address), "{name}: {address} of {} is another's", pod.full_name());
            reach(&pod, &there);
        }
    }
    stream.finish().unwrap();
    lab.finish().unwrap();
}

#[test]
fn a_seed_that_lost_its_state_hands_nothing_out_before_it_has_heard_from_a_peer() {
    let lab = Lab::builder().nodes(2).pods(2).start().unwrap();
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let before = seen::pods(&n1).unwrap();
    let (one, two) = (lab.pod("n1/p1").unwrap(), lab.pod("n1/p2").unwrap());
    let cut = Fault::partition(lab.underlay(), &[&n1], &[&n2]).unwrap();
    n1.kill_agent().unwrap();
    harm(&n1, |bytes| bytes.truncate(1000));
    n1.start_agent().unwrap();

    let pod = lab.add_pod(&n1).unwrap();
    // Before it serves, the shim finds nobody (100); from then on it is told to come again, and soon why.
    wait::until("ADD is refused by the agent", PATIENCE, || {
        let answer = pod.call("ADD").run(&n1)?;
        assert!(!answer.success, "handed out without a peer: {}", answer.stdout);
        ensure!(
            code(&answer)? == 11 && answer.stdout.contains("first contact with a peer"),
            "{}",
            answer.stdout
        );
        Ok(())
    })
    .unwrap();
    assert_eq!(seen::pods(&n1).unwrap(), before, "its pods' addresses are known from their veths");
    reach(&one, &two);

    drop(cut);
    n1.wait_ready(PATIENCE).unwrap();
    pod.attach().unwrap();
    assert!(before.values().all(|(address, _)| *address != pod.address().unwrap()));
    reach(&pod, &lab.pod("n2/p1").unwrap());
    lab.finish().unwrap();
}

fn harm(node: &Node, damage: fn(&mut Vec<u8>)) {
    let file = node.state_dir().join(STATE);
    let mut bytes = fs::read(&file).unwrap();
    damage(&mut bytes);
    fs::write(&file, bytes).unwrap();
}

/// State files that were moved aside.
fn aside(node: &Node) -> Vec<PathBuf> {
    let files = fs::read_dir(node.state_dir()).unwrap().map(|file| file.unwrap().path());
    let damaged = |path: &Path| path.to_string_lossy().contains(&format!("{STATE}.damaged-"));
    files.filter(|path| damaged(path)).collect()
}

/// The ranges of a node, as it knows them.
fn owned(node: &Node) -> BTreeSet<String> {
    let ipam = node.weft_json("ipam").unwrap();
    let mine = ipam["ranges"].as_array().unwrap().iter().filter(|range| range["mine"] == true);
    mine.map(|range| range["prefix"].as_str().unwrap().to_owned()).collect()
}

fn bridge(node: &Node) -> IpAddr {
    node.status().unwrap()["bridge_address"].as_str().unwrap().parse().unwrap()
}

fn reach(from: &Pod, to: &Pod) {
    let (what, address) = (format!("{} reaches {}", from.full_name(), to.full_name()), to.address().unwrap());
    wait::until(&what, PATIENCE, || from.ping(address, Duration::from_millis(300))).unwrap();
}

const STATE: &str = "weft.redb";
const PATIENCE: Duration = Duration::from_secs(20);
