//! Nodes of a lab that are Nodes of a cluster, each with a way of its own to the API server.
use std::{collections::BTreeSet, fs, net::TcpListener, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod as PodObject;
use serde_json::json;
use tokio::runtime::Runtime;
use weft::kube::TAINT;
use weft_lab::{Lab, node::Node, pod::Pod, relay::Relay, wait};

use crate::harness::Scene;

/// From an agent's start until ADD would work, on a busy machine.
pub const START: Duration = Duration::from_secs(30);
const ECHO: Duration = Duration::from_millis(500);

/// Ends with [`Cluster::end`].
pub struct Cluster {
    pub lab: Lab,
    pub relays: Vec<Relay>,
    pub scene: Scene,
    pub runtime: Runtime,
}

impl Cluster {
    /// Nodes that are registered, with our taint; their agents are not started.
    pub fn new(nodes: usize) -> Self {
        let runtime = Runtime::new().unwrap();
        let scene = runtime.block_on(Scene::new());
        let lab = Lab::builder().nodes(nodes).without_agents().start().unwrap();
        let mut cluster = Self { lab, relays: Vec::new(), scene, runtime };
        for node in cluster.lab.nodes() {
            cluster.register(&node);
            let (relay, kubeconfig) = cluster.way(&node, node.name());
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

    /// A way to the API server for a node, and the file that leads there.
    pub fn way(&self, node: &Node, file: &str) -> (Relay, PathBuf) {
        let listener = node.netns().run(|| Ok(TcpListener::bind("127.0.0.1:0")?)).unwrap();
        let relay = Relay::start(listener, self.scene.server()).unwrap();
        let kubeconfig = self.scene.kubeconfig(&relay, file);
        (relay, kubeconfig)
    }

    pub fn register(&self, node: &Node) {
        let spec = json!({"taints": [{"key": TAINT, "effect": "NoSchedule"}]});
        let address = node.address().to_string();
        self.runtime.block_on(self.scene.make_node(node.name(), &address, spec));
    }

    pub fn start(&self) {
        let nodes = self.lab.nodes();
        nodes.iter().for_each(|node| node.start_agent().unwrap());
        nodes.iter().for_each(|node| node.wait_ready(START).unwrap());
    }

    pub fn attached(&self, node: &Arc<Node>) -> Arc<Pod> {
        let pod = self.lab.add_pod(node).unwrap();
        wait::until("ADD works", START, || pod.attach()).unwrap();
        pod
    }

    /// A pod that the API server knows.
    pub fn make_pod(&self, name: &str, node: &Node) -> PodObject {
        self.runtime.block_on(self.scene.make_pod(name, node.name()))
    }

    /// Attaches it, as a runtime does.
    pub fn attached_as(&self, object: &PodObject, node: &Arc<Node>) -> Arc<Pod> {
        let (pod, meta) = (self.lab.add_pod(node).unwrap(), &object.metadata);
        let [namespace, name, uid] =
            [&meta.namespace, &meta.name, &meta.uid].map(|field| field.as_deref().unwrap());
        let mut call = pod.call("ADD");
        call.args = Some(format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={};\
             K8S_POD_UID={uid}",
            pod.container_id()
        ));
        wait::until("ADD works", START, || call.run(node)?.check("ADD")).unwrap();
        pod
    }

    /// Owners of the ring as a node has it.
    pub fn owners(&self, node: &Node) -> anyhow::Result<BTreeSet<String>> {
        let ranges = node.weft_json("ipam")?;
        let ranges = ranges["ranges"].as_array().context("no ranges")?.clone();
        Ok(ranges.iter().filter_map(|range| range["owner"].as_str().map(Into::into)).collect())
    }

    pub fn is_available(&self, node: &Node) -> anyhow::Result<()> {
        let name = self.scene.name(node.name());
        let object = self.runtime.block_on(self.scene.nodes().get(&name))?;
        let object = weft::kube::node(&object, 6783).context("a Node")?;
        ensure!(object.network_available && !object.tainted, "{object:?}");
        Ok(())
    }

    /// Where the node's agent writes the runtime's configuration.
    pub fn conflist(&self, node: &Node) -> PathBuf {
        self.scene.dir().join(node.name()).join("10-weft.conflist")
    }

    pub fn end(self) {
        self.lab.finish().unwrap();
        self.runtime.block_on(self.scene.end());
    }
}

pub fn all_reach_all(pods: &[Arc<Pod>]) {
    for from in pods {
        for to in pods.iter().filter(|to| to.full_name() != from.full_name()) {
            let what = format!("{} reaches {}", from.full_name(), to.full_name());
            wait::until(&what, START, || from.ping(to.address()?, ECHO)).unwrap();
        }
    }
}
