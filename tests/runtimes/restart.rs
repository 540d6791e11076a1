//! Runtimes and agents come and go; pods stay.
use std::{fs, time::Duration};

use weft_lab::traffic::Stream;

use crate::cluster::{Cluster, SOON, attachments, reaches};

#[test]
fn pods_outlive_restarts_of_the_runtime_and_restarts_and_upgrades_of_the_agent() {
    let cluster = Cluster::old_and_new();
    let [old, new] = &cluster.runtimes[..] else { panic!("two nodes") };
    let (a, b) = (old.run_pod("a").unwrap(), new.run_pod("b").unwrap());
    reaches(&a.netns, &b);
    let before: Vec<_> = cluster.runtimes.iter().map(|runtime| attachments(runtime.node())).collect();
    let stream = Stream::start(&a.netns, &b.netns, b.address, u64::MAX, Duration::from_secs(50)).unwrap();
    let goes_on = |after: &str| {
        let advanced = stream.advances(1_000_000, SOON);
        advanced.unwrap_or_else(|error| panic!("after {after}: {error:#}"));
    };
    goes_on("nothing");

    for (runtime, pod) in [(old, &a), (new, &b)] {
        let node = runtime.node();
        runtime.restart().unwrap();
        goes_on("the runtime's restart");

        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        node.wait_ready(SOON).unwrap();
        goes_on("the agent's restart");

        let (other, new_shim) =
            (node.state_dir().with_file_name("weft-next"), runtime.bin_dir().join(".next"));
        fs::copy(&node.binaries().unwrap().weft, &other).unwrap();
        fs::copy(&node.binaries().unwrap().weft_cni, &new_shim).unwrap();
        node.stop_agent().unwrap();
        fs::rename(&new_shim, runtime.bin_dir().join("weft-cni")).unwrap();
        node.configure(|settings| settings.program = Some(other));
        node.start_agent().unwrap();
        node.wait_ready(SOON).unwrap();
        goes_on("the agent's upgrade");

        let status = runtime.client().pod_sandbox_status(&pod.id).unwrap().status.unwrap();
        assert_eq!(status.state, 0, "it is ready as before");
        assert_eq!(status.network.unwrap().ip, pod.address.to_string());
    }
    stream.finish().unwrap();
    let after: Vec<_> = cluster.runtimes.iter().map(|runtime| attachments(runtime.node())).collect();
    assert_eq!(after, before);
    for (runtime, pod) in [(old, &a), (new, &b)] {
        runtime.wait_network(SOON).unwrap();
        let more = runtime.run_pod("more").unwrap();
        reaches(&more.netns, &a);
        reaches(&more.netns, &b);
        runtime.remove(&more.id).unwrap();
        assert_eq!(attachments(runtime.node()).len(), 1, "{} is left", pod.netns.name());
    }
    for (runtime, pod) in [(old, &a), (new, &b)] {
        runtime.remove(&pod.id).unwrap();
    }
    for runtime in &cluster.runtimes {
        assert_eq!(attachments(runtime.node()).len(), 0);
    }
    cluster.finish();
}
