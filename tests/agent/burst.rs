//! Many pods at once.
use std::{
    collections::BTreeSet,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use anyhow::ensure;
use weft_lab::{Lab, pod::Pod, traffic, wait};

use crate::seen;

#[test]
fn two_hundred_pods_are_attached_at_once() {
    let _machine = crate::one_at_a_time();
    let lab = Lab::builder().nodes(2).verbosity("warn").start().unwrap();
    let nodes = lab.nodes();
    let look = || -> Vec<_> { nodes.iter().map(|node| seen::kernel(node).unwrap()).collect() };
    let before = look();
    let pods: Vec<_> = (0..PODS).map(|n| lab.add_pod(&nodes[n % nodes.len()]).unwrap()).collect();

    on_all_runtimes(&pods, |pod| pod.attach().map(drop));
    let addresses: BTreeSet<_> = pods.iter().map(|pod| pod.address().unwrap()).collect();
    assert_eq!(addresses.len(), PODS, "an address was given twice");
    for node in &nodes {
        let pods = seen::pods(node).unwrap();
        assert_eq!(pods.len(), PODS / nodes.len(), "on {}", node.name());
        assert!(pods.values().all(|(_, state)| state == "active"), "{pods:?}");
    }
    // Everybody is reached from the other node's first pod, and from its own node.
    for (n, pod) in pods.iter().enumerate() {
        let address = pod.address().unwrap();
        let other = &pods[(n + 1) % 2];
        wait::until(&format!("{} is reached", pod.full_name()), Duration::from_secs(5), || {
            other.ping(address, Duration::from_millis(500))?;
            traffic::ping(pod.node().netns(), address, Duration::from_millis(500))
        })
        .unwrap();
    }

    on_all_runtimes(&pods, |pod| pod.detach().map(drop));
    for (node, (before, now)) in nodes.iter().zip(before.iter().zip(look())) {
        assert_eq!(now, *before, "left behind on {}", node.name());
        assert!(seen::pods(node).unwrap().is_empty() && seen::tombstones(node).is_empty());
        let ipam = node.weft_json("ipam").unwrap();
        let mine = ipam["ranges"].as_array().unwrap().iter().filter(|range| range["mine"] == true);
        let (allocated, resting) = mine.fold((0, 0), |(allocated, resting), range| {
            (allocated + range["allocated"].as_u64().unwrap(), resting + range["resting"].as_u64().unwrap())
        });
        // The bridge's; and some may have rested enough on a busy machine.
        assert!(allocated == 1 && resting <= PODS as u64 / 2, "{ipam}");
    }
    for pod in &pods {
        assert_eq!(seen::links(pod.netns()).unwrap(), ["lo"], "in {}", pod.full_name());
    }
    lab.finish().unwrap();
}

/// Has eight runtimes, each with its own share of the pods, do it as fast as they can.
fn on_all_runtimes(pods: &[Arc<Pod>], work: impl Fn(&Pod) -> anyhow::Result<()> + Sync) {
    let start = Barrier::new(RUNTIMES);
    let share = |runtime: usize| {
        start.wait();
        let failed: Vec<_> = pods
            .iter()
            .skip(runtime)
            .step_by(RUNTIMES)
            .filter_map(|pod| work(pod).err().map(|error| format!("{error:#}")))
            .collect();
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        Ok(())
    };
    thread::scope(|scope| {
        let runtimes: Vec<_> = (0..RUNTIMES)
            .map(|runtime| {
                scope.spawn({
                    let share = &share;
                    move || share(runtime)
                })
            })
            .collect();
        for runtime in runtimes {
            runtime.join().expect("a runtime does not panic").unwrap();
        }
    });
}

const PODS: usize = 200;
const RUNTIMES: usize = 8;
