//! `weft forget`: what is said of the dead, who may say it, and what becomes of their addresses.
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::ensure;
use weft_lab::{Lab, fault::Fault, wait};

use crate::harness::{SOON, START, attach_at, attached, complaint, nth, printed, ranges_of, reaches};

#[test]
fn a_dead_nodes_addresses_stay_its_own_until_it_is_forgotten_and_should_it_return_it_makes_room() {
    let lab = Lab::builder().nodes(3).pods(1).start().unwrap();
    let [n1, n2, n3] = ["n1", "n2", "n3"].map(|name| lab.node(name).unwrap());
    wait::until("all who hear n3 are named", SOON, || {
        let refusal = complaint(n1.weft(&["forget", "n3"])?);
        ensure!(refusal.contains("n3 lives, as n1, n2 can hear") && refusal.contains("--force"), "{refusal}");
        Ok(())
    })
    .unwrap();
    assert!(complaint(n1.weft(&["forget", "n1"]).unwrap()).contains("n1 is this node"));
    assert!(complaint(n1.weft(&["forget", "n9"]).unwrap()).contains("nobody here has heard of n9"));

    let before = ranges_of(&n1, "n3").unwrap();
    n3.kill_agent().unwrap();
    wait::until("nobody hears n3", SOON, || {
        for node in [&n1, &n2] {
            ensure!(node.status()?["links"] == 1);
        }
        Ok(())
    })
    .unwrap();
    let address = nth(&before[0], 77);
    let pod = lab.add_pod(&n1).unwrap();
    let refused = attach_at(&pod, &address).unwrap_err().to_string();
    assert!(refused.contains("n3 owns it"), "{refused}");
    assert_eq!(ranges_of(&n2, "n3").unwrap(), before);

    // Who has heard of its end says so a moment later.
    wait::until("n3 may be forgotten", SOON, || printed(n1.weft(&["forget", "n3"])?)).unwrap();
    let start = Instant::now();
    wait::until("its addresses can be used", SOON, || attach_at(&pod, &address)).unwrap();
    let used = start.elapsed();
    wait::until("all know", SOON, || {
        ensure!(ranges_of(&n2, "n3")?.is_empty());
        ensure!(n2.status()?["peers"] == 1 && n1.status()?["peers"] == 1);
        Ok(())
    })
    .unwrap();
    println!("after `weft forget` an address was used in {used:?}, all knew in {:?}", start.elapsed());
    assert!(start.elapsed() <= Duration::from_secs(1), "{:?}", start.elapsed());
    let again = complaint(n2.weft(&["forget", "n3"]).unwrap());
    assert!(again.contains("n3 has been forgotten already"), "{again}");

    // What is known of deaths outlives restarts.
    for node in [&n1, &n2] {
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        node.wait_ready(START).unwrap();
    }
    // It is not dead after all: its pod keeps its address, and it gets other ranges.
    n3.start_agent().unwrap();
    n3.wait_ready(START).unwrap();
    n3.wait_warning("these addresses are in use here, but belong to others", SOON).unwrap();
    let elder = lab.pod("n3/p1").unwrap();
    for name in ["n1/p1", "n2/p1"] {
        reaches(&lab.pod(name).unwrap(), &elder);
        reaches(&elder, &lab.pod(name).unwrap());
    }
    let younger = wait::until("n3 has addresses to hand out", SOON, || {
        let owned = ranges_of(&n3, "n3")?;
        ensure!(!owned.is_empty() && owned.iter().all(|range| !before.contains(range)), "{owned:?}");
        Ok(attached(&lab, &n3))
    })
    .unwrap();
    reaches(&lab.pod("n2/p1").unwrap(), &younger);
    let addresses: BTreeSet<_> = lab.pods().iter().filter_map(|pod| pod.address().ok()).collect();
    assert_eq!(addresses.len(), 4, "{addresses:?}");
}

#[test]
fn nobody_is_forgotten_while_others_cannot_be_asked_but_by_force() {
    let lab = Lab::builder().nodes(4).pods(1).start().unwrap();
    let [n1, n2, n3, n4] = ["n1", "n2", "n3", "n4"].map(|name| lab.node(name).unwrap());
    n4.kill_agent().unwrap();
    let fault = Fault::partition(lab.underlay(), &[&n1, &n2], &[&n3]).unwrap();
    let refused = |name: &str, why: &str| {
        wait::until(why, SOON * 2, || {
            let refusal = complaint(n1.weft(&["forget", name])?);
            ensure!(refusal.contains(why), "{refusal}");
            Ok(())
        })
        .unwrap();
    };
    refused("n3", "n4 can not be reached");
    refused("n4", "n3 can not be reached");
    // An operator who insists is believed, also where he is wrong: n3 lives, and gives way when it hears of it.
    let said = printed(n1.weft(&["forget", "n4", "n3", "--force"]).unwrap()).unwrap();
    assert!(said.starts_with("n4, n3 forgotten; this node now has"), "{said}");
    assert!(!ranges_of(&n3, "n3").unwrap().is_empty());
    drop(fault);
    wait::until("n3 has made room", SOON * 2, || {
        let owned = ranges_of(&n1, "n3")?;
        ensure!(ranges_of(&n3, "n3")? == owned && ranges_of(&n2, "n3")? == owned && owned.len() == 1);
        ensure!(n1.status()?["peers"] == 2);
        Ok(())
    })
    .unwrap();
    reaches(&lab.pod("n1/p1").unwrap(), &lab.pod("n3/p1").unwrap());
    reaches(&lab.pod("n3/p1").unwrap(), &attached(&lab, &n3));
}

#[test]
fn where_nodes_do_not_have_the_cas_key_an_operator_signs() {
    let lab = Lab::builder().nodes(3).without_agents().start().unwrap();
    let dir = lab.claim().state_dir().join("pki");
    let path = dir.to_str().unwrap();
    let n1 = lab.node("n1").unwrap();
    let run = |arguments: &[&str]| printed(n1.weft(arguments).unwrap()).unwrap();
    run(&["ca", "init", path]);
    let ca = format!("{path}/ca.crt");
    for name in ["n1", "n2", "n3", "weft-operator"] {
        run(&["ca", "issue", name, "--ca-dir", path, "--out", path]);
    }
    let keys = |name: &str| {
        let (cert, key) = (format!("{path}/{name}.crt"), format!("{path}/{name}.key"));
        ["--tls-ca".into(), ca.clone(), "--tls-cert".into(), cert, "--tls-key".into(), key]
    };
    for node in lab.nodes() {
        node.configure(|settings| {
            settings.ca_dir = None;
            settings.more = keys(node.name()).into();
        });
        node.start_agent().unwrap();
    }
    lab.nodes().iter().for_each(|node| node.wait_ready(START).unwrap());
    wait::until("all are linked", SOON, || {
        ensure!(n1.status()?["links"] == 2);
        Ok(())
    })
    .unwrap();
    lab.node("n3").unwrap().kill_agent().unwrap();
    wait::until("who cannot sign is told how", SOON, || {
        let refusal = complaint(n1.weft(&["forget", "n3"])?);
        ensure!(refusal.contains("`weft ca issue weft-operator`"), "{refusal}");
        Ok(())
    })
    .unwrap();
    let with = |name: &str| {
        let keys = keys(name);
        n1.weft(&[&["forget", "n3"], &*keys.iter().map(String::as_str).collect::<Vec<_>>()].concat()).unwrap()
    };
    let refusal = complaint(with("n1"));
    assert!(refusal.contains("names n1, not this node, weft-operator"), "{refusal}");
    printed(with("weft-operator")).unwrap();
    let n2 = lab.node("n2").unwrap();
    wait::until("all know", SOON, || {
        ensure!(ranges_of(&n2, "n3")?.is_empty() && ranges_of(&n1, "n3")?.is_empty());
        Ok(())
    })
    .unwrap();
}
