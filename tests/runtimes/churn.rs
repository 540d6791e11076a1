//! As many pods as kubelet runs on a node, again and again.
use std::{collections::BTreeSet, thread, time::Instant};

use weft_lab::runtime::{Containerd, Version};

use crate::cluster::{Cluster, attachments};

#[test]
fn a_full_node_comes_and_goes_three_times_without_a_leak_or_an_address_twice() {
    let cluster = Cluster::start(&[Version::V2, Version::V1, Version::V2]);
    let others: Vec<_> =
        cluster.runtimes[1..].iter().map(|runtime| runtime.run_pod("other").unwrap()).collect();
    let full = &cluster.runtimes[0];
    let links = || full.node().netns().links(async |links| links.names().await).unwrap();
    let before = links();
    for round in 1..=3 {
        let start = Instant::now();
        let pods = run(full, round);
        let addresses: BTreeSet<_> = pods.iter().map(|(_, address)| *address).collect();
        assert_eq!(addresses.len(), PODS, "no address twice on the node");
        assert!(others.iter().all(|other| !addresses.contains(&other.address)), "nor in the cluster");
        assert_eq!(attachments(full.node()).len(), PODS);
        let created = start.elapsed();
        let each: Vec<_> = pods.chunks(PODS.div_ceil(AT_ONCE)).collect();
        thread::scope(|scope| {
            for chunk in &each {
                scope.spawn(move || chunk.iter().for_each(|(id, _)| full.remove(id).unwrap()));
            }
        });
        eprintln!("round {round}: {created:?} to create, {:?} in all", start.elapsed());
        assert_eq!(links(), before, "no link is left");
        assert_eq!(attachments(full.node()).len(), 0, "no address is left");
    }
    cluster.finish();
}

/// Ids and addresses.
fn run(runtime: &Containerd, round: usize) -> Vec<(String, std::net::IpAddr)> {
    let numbers: Vec<_> = (0..PODS).collect();
    thread::scope(|scope| {
        let worker = |chunk: &[usize]| {
            let chunk = chunk.to_vec();
            scope.spawn(move || {
                let pod = |number| runtime.run_pod(&format!("p{round}-{number}")).unwrap();
                chunk.into_iter().map(pod).map(|pod| (pod.id, pod.address)).collect::<Vec<_>>()
            })
        };
        let workers: Vec<_> = numbers.chunks(PODS.div_ceil(AT_ONCE)).map(worker).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    })
}

/// kubelet's limit.
const PODS: usize = 110;
const AT_ONCE: usize = 10;
