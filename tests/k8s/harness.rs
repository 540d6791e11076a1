//! A server, a way to it, and objects that are gone when the test ends.
//!
//! Of `deploy/weft.yaml` everything but the DaemonSet is applied, under names of the test's own; agents come with their service
//! account's token. So they may do what the manifest allows them and no more, on the lab's server as on a real one.
use std::{
    fs,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::ensure;
use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{ConfigMap, Event, Namespace, Node, Pod, Secret, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams},
    config::{Config, KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::sync::watch;
use weft::kube::{
    View,
    join::{self, Cluster, Settings},
    task::{self, Handle},
};
use weft_lab::{apiserver::ApiServer, relay::Relay};

/// For what takes milliseconds when all is well, on a busy machine.
pub const SOON: Duration = Duration::from_secs(15);

/// A cluster of its own, as far as tests can have one: a namespace, and names that nobody else has.
pub struct Scene {
    pub id: String,
    pub client: Client,
    /// The lab's own server; none where a real one is used.
    pub own: Option<ApiServer>,
    /// With the agents' token.
    config: Kubeconfig,
    server: SocketAddr,
    dir: tempfile::TempDir,
}

/// An agent's share of it, without the agent.
pub struct Member {
    pub handle: Handle,
    pub view: watch::Receiver<Arc<View>>,
    task: tokio::task::JoinHandle<()>,
}

impl Scene {
    pub async fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
        let id = format!("weft-test-{:x}-{}", micros, COUNT.fetch_add(1, Ordering::Relaxed));
        let (own, config) = match std::env::var_os("WEFT_TEST_KUBECONFIG") {
            Some(path) => (None, Kubeconfig::read_from(path).unwrap()),
            None => {
                let own = ApiServer::start().unwrap();
                let config = config_of(&format!("http://{}", own.address()));
                (Some(own), config)
            }
        };
        let loaded =
            Config::from_custom_kubeconfig(config.clone(), &KubeConfigOptions::default()).await.unwrap();
        let (host, port) = (loaded.cluster_url.host().unwrap(), loaded.cluster_url.port_u16().unwrap_or(443));
        let server = (host.trim_matches(['[', ']']), port).to_socket_addrs().unwrap().next().unwrap();
        let client = Client::try_from(loaded).unwrap();
        let mut scene = Self { id, client, own, config, server, dir: tempfile::tempdir().unwrap() };
        let namespace = json!({"metadata": {"name": scene.id}});
        scene.make::<Namespace>(&Api::all(scene.client.clone()), namespace).await;
        for (api, object) in scene.shipped() {
            scene.make(&api, object).await;
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(scene.client.clone(), &scene.id);
        let wish = TokenRequest::default();
        let token = accounts.create_token_request(&scene.id, &PostParams::default(), &wish).await.unwrap();
        let user = json!({"token": token.status.unwrap().token});
        for known in &mut scene.config.auth_infos {
            known.auth_info = Some(serde_json::from_value(user.clone()).unwrap());
        }
        scene
    }

    /// What `deploy/weft.yaml` ships beside the DaemonSet, with our names, and where it goes.
    fn shipped(&self) -> Vec<(Api<DynamicObject>, Value)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/weft.yaml");
        let text = fs::read_to_string(path)
            .unwrap()
            .replace("namespace: kube-system", &format!("namespace: {}", self.id));
        let text = text.replace(" name: weft\n", &format!(" name: {}\n", self.id));
        let documents =
            text.split("\n---\n").map(|document| serde_saphyr::from_str::<Value>(document).unwrap());
        let ours = documents.filter(|object| object["kind"] != "DaemonSet");
        let place = |object: Value| {
            let text = |part: &Value| part.as_str().unwrap().to_string();
            let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
            let (group, version) = version.rsplit_once('/').unwrap_or(("", &version));
            let resource = ApiResource::from_gvk(&kube::api::GroupVersionKind::gvk(group, version, &kind));
            let api = match object["metadata"]["namespace"].as_str() {
                Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
                None => Api::all_with(self.client.clone(), &resource),
            };
            (api, object)
        };
        ours.map(place).collect()
    }

    /// A name that nobody else has.
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.id)
    }

    pub fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.id)
    }

    pub fn maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.id)
    }

    pub fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.id)
    }

    pub async fn make<K>(&self, api: &Api<K>, object: Value) -> K
    where
        K: Clone + serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug,
    {
        api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
    }

    /// A Node as kubelet registers it, with an address and nothing else that matters.
    pub async fn make_node(&self, name: &str, address: &str, spec: Value) -> Node {
        let object = json!({"metadata": {"name": self.name(name)}, "spec": spec});
        self.make(&self.nodes(), object).await;
        let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        let patch = kube::api::Patch::Strategic(status);
        self.nodes().patch_status(&self.name(name), &Default::default(), &patch).await.unwrap()
    }

    /// A pod that is bound to a node already.
    pub async fn make_pod(&self, name: &str, node: &str) -> Pod {
        let spec = json!({"nodeName": self.name(node), "containers": [{"name": "c", "image": "pause"}],
                          "terminationGracePeriodSeconds": 0});
        let pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap();
        // A real server wants the namespace's service account first, which is made a moment after the namespace.
        until("the pod is made", async || Ok(self.pods().create(&PostParams::default(), &pod).await?)).await
    }

    pub async fn delete_pod(&self, name: &str) {
        self.pods().delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }

    pub async fn delete_node(&self, name: &str) {
        self.nodes().delete(&self.name(name), &DeleteParams::default()).await.unwrap();
    }

    pub fn relay(&self) -> Relay {
        Relay::local(self.server).unwrap()
    }

    /// Where the server is for those who cannot use a relay of [`Scene::relay`].
    pub fn server(&self) -> SocketAddr {
        self.server
    }

    /// A file that leads to the server by way of a relay.
    pub fn kubeconfig(&self, relay: &Relay, name: &str) -> PathBuf {
        let mut config = self.config.clone();
        for cluster in config.clusters.iter_mut().filter_map(|cluster| cluster.cluster.as_mut()) {
            let server = cluster.server.clone().unwrap();
            let (scheme, rest) = server.split_once("://").unwrap();
            let host = rest.split(['/']).next().unwrap().rsplit_once(':').map_or(rest, |(host, _)| host);
            cluster.tls_server_name.get_or_insert_with(|| host.into());
            cluster.server = Some(format!("{scheme}://{}", relay.address()));
        }
        let path = self.dir.path().join(format!("{name}.kubeconfig"));
        fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
        path
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What an agent on that node is told.
    pub fn settings(&self, node: &str, relay: &Relay) -> Settings {
        let of_node = |kind: &str| self.dir.path().join(format!("{node}-{kind}"));
        Settings {
            node: self.name(node).parse().unwrap(),
            namespace: self.id.clone(),
            kubeconfig: Some(self.kubeconfig(relay, node)),
            state_dir: of_node("state"),
            keys_dir: Some(of_node("keys")),
            peers: Vec::new(),
            port: 6783,
            step: Duration::from_secs(2),
            elects: true,
        }
    }

    /// What an agent on that node knows before it starts.
    pub async fn join(&self, node: &str, relay: &Relay) -> Cluster {
        tokio::time::timeout(SOON, join::join(self.settings(node, relay)))
            .await
            .expect("joined in time")
            .unwrap()
    }

    /// The agent's part that goes on watching.
    pub async fn member(&self, node: &str, relay: &Relay) -> Member {
        let (handle, task) = task::new(self.join(node, relay).await, 1).unwrap();
        let view = handle.view();
        Member { handle, view, task: tokio::spawn(task.run()) }
    }

    /// Takes everything away that the test has made.
    pub async fn end(self) {
        let nodes = self.nodes().list(&ListParams::default()).await.unwrap();
        for name in nodes.items.into_iter().filter_map(|node| node.metadata.name) {
            if name.starts_with(&self.id) {
                self.nodes().delete(&name, &DeleteParams::default()).await.unwrap();
            }
        }
        let events: Api<Event> = Api::namespaced(self.client.clone(), "default");
        let made = events.list(&ListParams::default()).await.unwrap();
        for name in made.items.into_iter().filter_map(|event| event.metadata.name) {
            if name.starts_with(&self.id) {
                // A real server forgets them by itself.
                let _ = events.delete(&name, &DeleteParams::default()).await;
            }
        }
        for (api, object) in self.shipped() {
            api.delete(object["metadata"]["name"].as_str().unwrap(), &DeleteParams::default()).await.unwrap();
        }
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces.delete(&self.id, &DeleteParams::default()).await.unwrap();
    }
}

impl Member {
    /// Waits until the view is as it should be.
    pub async fn sees(&mut self, what: &str, is_so: impl FnMut(&View) -> bool) {
        let mut is_so = is_so;
        let seen = tokio::time::timeout(SOON, self.view.wait_for(|view| is_so(view))).await;
        seen.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}")).unwrap();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Tries until it works or the time is up.
pub async fn until<T>(what: &str, mut attempt: impl AsyncFnMut() -> anyhow::Result<T>) -> T {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => {
                let late = tokio::time::Instant::now() >= deadline;
                assert!(!late, "{what}: not within {SOON:?}: {error:#}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

pub fn check(is_so: bool, what: impl std::fmt::Display) -> anyhow::Result<()> {
    ensure!(is_so, "{what}");
    Ok(())
}

fn config_of(server: &str) -> Kubeconfig {
    let named = |key: &str, value: Value| json!([{"name": "test", key: value}]);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": named("cluster", json!({"server": server})),
        "contexts": named("context", json!({"cluster": "test", "user": "test"})),
        "users": named("user", json!({})),
    });
    serde_json::from_value(config).unwrap()
}
