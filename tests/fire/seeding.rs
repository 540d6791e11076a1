//! How a network begins, and what has nothing to do with it.
use std::time::Instant;

use anyhow::ensure;
use weft_lab::{Lab, node::Node, wait};

use crate::harness::{SOON, START, attached, printed, ranges_of, reaches};

fn consensus(node: &Node, voters: usize) {
    node.configure(|settings| settings.seed = Some(format!("consensus={voters}")));
}

#[test]
fn a_majority_agrees_who_shares_the_universe_and_nothing_changes_that_later() {
    let lab = Lab::builder().nodes(3).without_agents().start().unwrap();
    let [n1, n2, n3] = ["n1", "n2", "n3"].map(|name| lab.node(name).unwrap());
    lab.nodes().iter().for_each(|node| consensus(node, 3));
    n1.start_agent().unwrap();
    wait::until("n1 says whom it waits for", SOON, || {
        let (status, body) = n1.http("/readyz")?;
        let waits = body.contains("consensus): 1 nodes vote, it takes 2") || body.contains("first contact");
        ensure!(status == 503 && waits, "{body}");
        Ok(())
    })
    .unwrap();
    let start = Instant::now();
    n2.start_agent().unwrap();
    n2.wait_ready(START).unwrap();
    n1.wait_ready(START).unwrap();
    println!("two of three agreed after {:?}", start.elapsed());
    n3.start_agent().unwrap();
    n3.wait_ready(START).unwrap();
    let (a, b, c) = (attached(&lab, &n1), attached(&lab, &n2), attached(&lab, &n3));
    reaches(&a, &b);
    reaches(&c, &a);
    wait::until("all know who owns what", SOON, || {
        for owner in ["n1", "n2", "n3"] {
            let owned = ranges_of(&n1, owner)?;
            ensure!(!owned.is_empty() && ranges_of(&n2, owner)? == owned && ranges_of(&n3, owner)? == owned);
        }
        Ok(())
    })
    .unwrap();

    let owned = ranges_of(&n1, "n1").unwrap();
    for seed in ["n1,n2,n3", "consensus=1", "observer"] {
        n1.stop_agent().unwrap();
        n1.configure(|settings| settings.seed = Some(seed.into()));
        n1.start_agent().unwrap();
        n1.wait_ready(START).unwrap();
        assert_eq!(ranges_of(&n1, "n1").unwrap(), owned, "{seed}");
        reaches(&a, &b);
    }
    // Who has lost its disk is told what was decided.
    n3.kill_agent().unwrap();
    std::fs::remove_dir_all(n3.state_dir()).unwrap();
    n3.start_agent().unwrap();
    n3.wait_ready(START).unwrap();
    wait::until("its pod has its address", SOON, || {
        let pods = n3.weft_json("pods")?;
        ensure!(pods.to_string().contains(&c.address()?.to_string()), "{pods}");
        Ok(())
    })
    .unwrap();
    reaches(&b, &c);
    assert_ne!(attached(&lab, &n3).address().unwrap(), c.address().unwrap());
}

#[test]
fn an_observer_sees_everything_and_has_no_pods() {
    let lab = Lab::builder().nodes(2).start().unwrap();
    let observer = lab.add_node().unwrap();
    observer.configure(|settings| settings.seed = Some("observer".into()));
    observer.start_agent().unwrap();
    let n1 = lab.node("n1").unwrap();
    wait::until("it sees who owns what", START, || {
        ensure!(ranges_of(&observer, "n1")? == ranges_of(&n1, "n1")? && observer.status()?["links"] == 2);
        Ok(())
    })
    .unwrap();
    let refused = lab.add_pod(&observer).unwrap().attach().unwrap_err().to_string();
    assert!(refused.contains("this node never has addresses") && refused.contains("code 11"), "{refused}");
    assert_eq!(ranges_of(&observer, "n3").unwrap(), Vec::<String>::new());
    assert!(printed(observer.weft(&["peers"]).unwrap()).unwrap().contains("n2"));
}

#[test]
fn two_networks_that_meet_by_mistake_have_nothing_to_do_with_each_other_and_say_so() {
    let lab = Lab::builder().nodes(4).without_agents().start().unwrap();
    let [n1, n2, n3, n4] = ["n1", "n2", "n3", "n4"].map(|name| lab.node(name).unwrap());
    for (node, other) in [(&n1, &n2), (&n2, &n1), (&n3, &n4), (&n4, &n3)] {
        node.configure(|settings| {
            let mut names = [node.name(), other.name()];
            names.sort();
            (settings.seed, settings.peers) = (Some(names.join(",")), vec![other.address().to_string()]);
        });
    }
    lab.nodes().iter().for_each(|node| node.start_agent().unwrap());
    lab.nodes().iter().for_each(|node| node.wait_ready(START).unwrap());
    let (a, b) = (attached(&lab, &n1), attached(&lab, &n2));
    let (c, d) = (attached(&lab, &n3), attached(&lab, &n4));

    n3.stop_agent().unwrap();
    n3.configure(|settings| settings.peers.push(n1.address().to_string()));
    n3.start_agent().unwrap();
    n3.wait_ready(START).unwrap();
    n3.wait_warning("agent n3 has --ipam-seed n3,n4, not n1,n2", SOON).unwrap();
    n1.wait_warning("192.0.2.3 was turned away: agent n1 has --ipam-seed n1,n2, not n3,n4", SOON).unwrap();
    for node in [&n1, &n3] {
        assert!(node.log().contains("all agents that have one need the list"), "{}", node.name());
        node.wait_ready(SOON).unwrap();
        assert_eq!(node.status().unwrap()["links"], 1);
    }
    for (from, to) in [(&a, &b), (&c, &d), (&d, &c)] {
        reaches(from, to);
    }
    let foreign = ranges_of(&n3, "n1").unwrap();
    assert_eq!((foreign, ranges_of(&n1, "n3").unwrap()), Default::default());
}
