//! Real agents on nodes of a cluster, each with a way of its own to the API server. Needs root.
use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::runtime::Runtime;
use weft::kube::TAINT;
use weft_lab::{
    Lab,
    node::Node,
    pod::Pod,
    relay::{Quality, Relay},
    wait,
};

use crate::harness::Scene;

/// From an agent's start until ADD would work, on a busy machine.
const START: Duration = Duration::from_secs(30);
const ECHO: Duration = Duration::from_millis(500);

struct Cluster {
    lab: Lab,
    relays: Vec<Relay>,
    scene: Scene,
    runtime: Runtime,
}

impl Cluster {
    /// Nodes that are registered, with our taint; their agents are not started.
    fn new(nodes: usize) -> Self {
        let runtime = Runtime::new().unwrap();
        let scene = runtime.block_on(Scene::new());
        let lab = Lab::builder().nodes(nodes).without_agents().start().unwrap();
        let mut cluster = Self { lab, relays: Vec::new(), scene, runtime };
        for node in cluster.lab.nodes() {
            cluster.register(&node);
            let listener = node.netns().run(|| Ok(TcpListener::bind("127.0.0.1:0")?)).unwrap();
            let relay = Relay::start(listener, cluster.scene.server()).unwrap();
            let kubeconfig = cluster.scene.kubeconfig(&relay, node.name());
            let name = cluster.scene.name(node.name());
            node.configure(|settings| {
                // Pods are attached here that the API server has never heard of.
                settings.more.extend(["--network-policy".into(), "off".into()]);
                settings.more.extend(["--kubernetes".into(), "--node-name".into(), name.clone()]);
                settings.more.extend(["--pod-namespace".into(), cluster.scene.id.clone()]);
                settings.more.extend(["--kubeconfig".into(), kubeconfig.display().to_string()]);
                let conf_dir = cluster.scene.dir().join(node.name());
                fs::create_dir(&conf_dir).unwrap();
                settings.more.extend(["--cni-conf-dir".into(), conf_dir.display().to_string()]);
                settings.name = name;
                (settings.seed, settings.ca_dir) = (None, None);
                settings.peers.clear();
            });
            cluster.relays.push(relay);
        }
        cluster
    }

    fn register(&self, node: &Node) {
        let spec = json!({"taints": [{"key": TAINT, "effect": "NoSchedule"}]});
        let address = node.address().to_string();
        self.runtime.block_on(self.scene.make_node(node.name(), &address, spec));
    }

    fn start(&self) {
        let nodes = self.lab.nodes();
        nodes.iter().for_each(|node| node.start_agent().unwrap());
        nodes.iter().for_each(|node| node.wait_ready(START).unwrap());
    }

    fn attached(&self, node: &Arc<Node>) -> Arc<Pod> {
        let pod = self.lab.add_pod(node).unwrap();
        wait::until("ADD works", START, || pod.attach()).unwrap();
        pod
    }

    /// Owners of the ring as a node has it.
    fn owners(&self, node: &Node) -> anyhow::Result<BTreeSet<String>> {
        let ranges = node.weft_json("ipam")?;
        let ranges = ranges["ranges"].as_array().context("no ranges")?.clone();
        Ok(ranges.iter().filter_map(|range| range["owner"].as_str().map(Into::into)).collect())
    }

    fn is_available(&self, node: &Node) -> anyhow::Result<()> {
        let name = self.scene.name(node.name());
        let object = self.runtime.block_on(self.scene.nodes().get(&name))?;
        let object = weft::kube::node(&object, 6783).context("a Node")?;
        ensure!(object.network_available && !object.tainted, "{object:?}");
        Ok(())
    }

    /// Where the node's agent writes the runtime's configuration.
    fn conflist(&self, node: &Node) -> PathBuf {
        self.scene.dir().join(node.name()).join("10-weft.conflist")
    }

    fn end(self) {
        self.lab.finish().unwrap();
        self.runtime.block_on(self.scene.end());
    }
}

fn all_reach_all(pods: &[Arc<Pod>]) {
    for from in pods {
        for to in pods.iter().filter(|to| to.full_name() != from.full_name()) {
            let what = format!("{} reaches {}", from.full_name(), to.full_name());
            wait::until(&what, START, || from.ping(to.address()?, ECHO)).unwrap();
        }
    }
}

#[test]
fn the_nodes_of_a_cluster_become_a_network_and_outlive_its_api_server() {
    let cluster = Cluster::new(3);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    for node in &nodes {
        wait::until("the Node is available", START, || cluster.is_available(node)).unwrap();
    }

    // Nobody answers any more: pods come, agents start again, and find each other.
    cluster.relays.iter().for_each(Relay::close);
    pods.push(cluster.attached(&nodes[0]));
    nodes[1].stop_agent().unwrap();
    nodes[1].start_agent().unwrap();
    nodes[1].wait_ready(START).unwrap();
    pods.push(cluster.attached(&nodes[1]));
    all_reach_all(&pods);
    let warned = |node: &Node| -> anyhow::Result<()> {
        let status = node.status()?.to_string();
        ensure!(status.contains("what it said last goes on counting"), "{status}");
        Ok(())
    };
    wait::until("the status says so", START, || warned(&nodes[1])).unwrap();
    cluster.relays.iter().for_each(|relay| relay.set(Quality::Good));
    wait::until("it answers again", START, || {
        ensure!(warned(&nodes[1]).is_err());
        Ok(())
    })
    .unwrap();
    cluster.end();
}

#[test]
fn pods_can_run_within_three_seconds_of_an_agents_start() {
    let cluster = Cluster::new(3);
    let nodes = cluster.lab.nodes();
    // Before the clock runs, as nothing is built while images are pulled.
    nodes[0].binaries().unwrap();
    let start = Instant::now();
    nodes.iter().for_each(|node| node.start_agent().unwrap());
    for node in &nodes {
        wait::until("the node is free for pods", START, || {
            ensure!(cluster.conflist(node).exists(), "no conflist yet");
            cluster.is_available(node)
        })
        .unwrap();
        let took = start.elapsed();
        println!("{} is free for pods after {took:.2?}", node.name());
        assert!(took < Duration::from_secs(3), "{took:?}; {}", node.log_tail());
    }
    cluster.end();
}

#[test]
fn with_podcidr_a_nodes_pods_have_addresses_of_its_range_also_without_a_server() {
    let cluster = Cluster::new(2);
    let nodes = cluster.lab.nodes();
    for (node, range) in nodes.iter().zip(["10.99.1.0/24", "10.99.2.0/24"]) {
        let patch = Patch::Merge(json!({"spec": {"podCIDR": range, "podCIDRs": [range]}}));
        let (api, name) = (cluster.scene.nodes(), cluster.scene.name(node.name()));
        cluster.runtime.block_on(api.patch(&name, &PatchParams::default(), &patch)).unwrap();
        node.configure(|settings| {
            settings.universe = Some("10.99.0.0/16".into());
            settings.more.extend(["--ipam".into(), "podcidr".into()]);
        });
    }
    cluster.start();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    cluster.relays.iter().for_each(Relay::close);
    nodes[1].stop_agent().unwrap();
    nodes[1].start_agent().unwrap();
    nodes[1].wait_ready(START).unwrap();
    pods.push(cluster.attached(&nodes[1]));
    all_reach_all(&pods);
    for (pod, range) in pods.iter().zip(["10.99.1.", "10.99.2.", "10.99.2."]) {
        let address = pod.address().unwrap().to_string();
        assert!(address.starts_with(range), "{} has {address}", pod.full_name());
    }
    cluster.end();
}

#[test]
fn an_agent_is_alive_while_it_waits_for_the_api_server() {
    let cluster = Cluster::new(1);
    let node = &cluster.lab.nodes()[0];
    let socket = cluster.scene.dir().join("probe.sock").display().to_string();
    node.configure(|settings| settings.more.extend(["--probe-socket".into(), socket.clone()]));
    cluster.relays[0].close();
    node.start_agent().unwrap();
    wait::until("it has asked in vain, more than once", START, || {
        ensure!(node.log().matches("waiting for the API server").count() > 1);
        Ok(())
    })
    .unwrap();
    let probe = |what: &str| node.weft(&["probe", what, "--probe-socket", &socket]).unwrap().status.code();
    assert_eq!((probe("live"), probe("ready")), (Some(0), Some(1)));
    cluster.relays[0].set(Quality::Good);
    wait::until("it is ready", START, || {
        ensure!(probe("ready") == Some(0));
        Ok(())
    })
    .unwrap();
    cluster.end();
}

#[test]
fn a_deleted_nodes_space_is_taken_over_and_the_node_comes_back() {
    let cluster = Cluster::new(3);
    cluster.start();
    let nodes = cluster.lab.nodes();
    let mut pods: Vec<_> = nodes.iter().map(|node| cluster.attached(node)).collect();
    all_reach_all(&pods);
    // Whoever has not been elected: the elected one's space is most of the universe, that of another a part.
    let gone = &nodes[2];
    let name = cluster.scene.name(gone.name());
    wait::until("it owns space", START, || {
        ensure!(cluster.owners(&nodes[0])?.contains(&name));
        Ok(())
    })
    .unwrap();
    gone.kill_agent().unwrap();
    cluster.runtime.block_on(cluster.scene.delete_node(gone.name()));
    for node in &nodes[..2] {
        wait::until("its space is another's", Duration::from_secs(45), || {
            let owners = cluster.owners(node)?;
            ensure!(!owners.contains(&name), "{owners:?}");
            Ok(())
        })
        .unwrap();
    }
    let map = cluster.runtime.block_on(cluster.scene.maps().get("weft-seed")).unwrap();
    assert!(map.data.unwrap()["takeovers"].contains(&name));

    // Its pod still has its address, which nobody else uses; and it gets space of its own again.
    cluster.register(gone);
    gone.start_agent().unwrap();
    gone.wait_ready(START).unwrap();
    pods.push(cluster.attached(gone));
    all_reach_all(&pods);
    let owners = cluster.owners(&nodes[0]).unwrap();
    assert!(owners.contains(&name), "{owners:?}");
    cluster.end();
}
