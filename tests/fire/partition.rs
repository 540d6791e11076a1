//! Both sides of a partition go on, and are one network again when it heals.
use std::{
    collections::BTreeSet,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde_json::Value;
use weft_lab::{Lab, fault::Fault, node::Node, pod::Pod, wait};

use crate::harness::{SOON, reaches};

#[test]
fn both_sides_of_a_partition_hand_out_addresses_and_agree_when_it_heals() {
    // Small enough that each side has to move space between its nodes.
    let lab = Lab::builder().nodes(5).universe("10.32.0.0/23").pods(1).start().unwrap();
    let nodes = lab.nodes();
    let (left, right) = nodes.split_at(2);
    let fault =
        Fault::partition(lab.underlay(), &left.iter().collect::<Vec<_>>(), &right.iter().collect::<Vec<_>>())
            .unwrap();
    let added: Vec<Arc<Pod>> = thread::scope(|scope| {
        let sides = [&left[1], &right[0]].map(|node| scope.spawn(|| churn(&lab, node)));
        sides.into_iter().flat_map(|side| side.join().unwrap()).collect()
    });
    let at_all = added.len();
    drop(fault);
    let start = Instant::now();
    wait::until("there is one topology", SOON * 2, || {
        let ranges = ranges(&nodes[0])?;
        for node in &nodes {
            ensure!(self::ranges(node)? == ranges && node.status()?["links"] == 4, "{}", node.name());
        }
        Ok(())
    })
    .unwrap();
    let took = start.elapsed();
    println!("{at_all} pods were attached in the partition; one topology {took:?} after it healed");
    assert!(took <= Duration::from_secs(2), "{took:?}");
    let attached: Vec<_> = lab.pods().into_iter().filter(|pod| pod.address().is_ok()).collect();
    let addresses: BTreeSet<_> = attached.iter().map(|pod| pod.address().unwrap()).collect();
    assert_eq!(addresses.len(), attached.len(), "an address is there twice");
    for pair in attached.windows(2).step_by(20) {
        reaches(&pair[0], &pair[1]);
    }
    for pod in &added {
        pod.detach().unwrap();
    }
    lab.finish().unwrap();
}

/// Ten ADDs a second for ten seconds, with a DEL for every fourth.
fn churn(lab: &Lab, node: &Arc<Node>) -> Vec<Arc<Pod>> {
    let (start, mut pods) = (Instant::now(), Vec::new());
    for n in 0..100 {
        let pod = lab.add_pod(node).unwrap();
        // It may have to ask its neighbour for space first; runtimes try again, too.
        wait::until("ADD", SOON, || pod.attach()).unwrap();
        match n % 4 {
            3 => {
                pod.detach().unwrap();
                lab.remove_pod(&pod);
            }
            _ => pods.push(pod),
        }
        thread::sleep((Duration::from_millis(100) * (n + 1)).saturating_sub(start.elapsed()));
    }
    pods
}

fn ranges(node: &Node) -> anyhow::Result<Vec<(Value, Value)>> {
    let ipam = node.weft_json("ipam")?;
    let ranges = ipam["ranges"].as_array().cloned().unwrap_or_default();
    Ok(ranges.into_iter().map(|range| (range["prefix"].clone(), range["owner"].clone())).collect())
}
