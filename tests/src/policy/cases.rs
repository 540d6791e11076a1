//! The format of cases, and the cluster that their actions build.
use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt, net::IpAddr};
use weft::policy::model::{Protocol, Service};

#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    pub id: String,
    #[serde(default)]
    pub description: String,
    pub model: Option<Model>,
    pub steps: Vec<Step>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Model {
    #[serde(default)]
    pub namespaces: BTreeMap<String, Labelled>,
    #[serde(default)]
    pub pods: BTreeMap<String, ModelPod>,
    /// Addresses that belong to no pod, by name.
    #[serde(default)]
    pub externals: BTreeMap<String, External>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Labelled {
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct ModelPod {
    pub ip: IpAddr,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub ports: Vec<ModelPort>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct ModelPort {
    #[serde(default)]
    pub name: Option<String>,
    pub port: u16,
    pub protocol: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
pub enum External {
    Address(IpAddr),
    Object { ip: IpAddr },
}

#[derive(Clone, Debug, Deserialize)]
pub struct Step {
    #[serde(default)]
    pub actions: Vec<Action>,
    pub pods: Vec<String>,
    pub expected: Vec<Table>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Table {
    pub on: Vec<String>,
    pub rows: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase")]
pub enum Action {
    CreatePolicy {
        policy: Value,
    },
    UpdatePolicy {
        policy: Value,
    },
    /// One for the cluster has no namespace.
    DeletePolicy {
        #[serde(default)]
        namespace: String,
        name: String,
    },
    CreateNamespace(NamespaceAction),
    SetNamespaceLabels(NamespaceAction),
    DeleteNamespace {
        namespace: String,
    },
    CreatePod(PodAction),
    SetPodLabels(PodLabels),
    DeletePod {
        namespace: String,
        pod: String,
    },
}

#[derive(Clone, Debug, Deserialize)]
pub struct NamespaceAction {
    pub namespace: String,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct PodAction {
    pub namespace: String,
    pub pod: String,
    #[serde(flatten)]
    pub is: ModelPod,
}

#[derive(Clone, Debug, Deserialize)]
pub struct PodLabels {
    pub namespace: String,
    pub pod: String,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What there is after some actions.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: BTreeMap<String, ClusterPod>,
    policies: BTreeMap<String, Value>,
    externals: BTreeMap<String, IpAddr>,
    /// Pods so far: each has a UID of its own.
    born: usize,
}

#[derive(Clone, Debug)]
struct ClusterPod {
    uid: String,
    is: ModelPod,
}

/// One change, as an API server's watch would tell it: objects of Kubernetes.
#[derive(Clone, Debug)]
pub enum News {
    Apply(Value),
    Delete(Value),
}

/// One cell of a table.
pub struct Cell<'a> {
    pub from: &'a str,
    pub to: &'a str,
    pub probe: &'a str,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub service: Service,
    pub expected: char,
}

impl Cluster {
    pub fn of(model: &Model) -> Self {
        let mut cluster = Self::default();
        for (name, labelled) in &model.namespaces {
            cluster.namespaces.insert(name.clone(), labelled.labels.clone());
        }
        for (name, pod) in &model.pods {
            cluster.add_pod(name.clone(), pod.clone());
        }
        let address = |external: &External| match external {
            External::Address(ip) | External::Object { ip } => *ip,
        };
        cluster.externals = model.externals.iter().map(|(name, it)| (name.clone(), address(it))).collect();
        cluster
    }

    /// Takes an action, and returns what a watch would tell of it.
    pub fn act(&mut self, action: &Action) -> anyhow::Result<Vec<News>> {
        Ok(match action {
            Action::CreatePolicy { policy } | Action::UpdatePolicy { policy } => {
                let metadata = &policy["metadata"];
                let name = metadata["name"].as_str().context("a policy has no name")?;
                let namespace = metadata["namespace"].as_str().unwrap_or_default();
                let policy = of_some_kind(policy.clone());
                self.policies.insert(format!("{namespace}/{name}"), policy.clone());
                vec![News::Apply(policy)]
            }
            Action::DeletePolicy { namespace, name } => {
                let gone = self.policies.remove(&format!("{namespace}/{name}"));
                vec![News::Delete(gone.context("no such policy")?)]
            }
            Action::CreateNamespace(it) | Action::SetNamespaceLabels(it) => {
                self.namespaces.insert(it.namespace.clone(), it.labels.clone());
                vec![News::Apply(self.namespace_object(&it.namespace))]
            }
            Action::DeleteNamespace { namespace } => {
                let inside = format!("{namespace}/");
                let pods: Vec<_> =
                    self.pods.keys().filter(|name| name.starts_with(&inside)).cloned().collect();
                let mut news: Vec<_> = pods.iter().map(|name| News::Delete(self.pod_object(name))).collect();
                pods.iter().for_each(|name| drop(self.pods.remove(name)));
                news.push(News::Delete(self.namespace_object(namespace)));
                self.namespaces.remove(namespace);
                news
            }
            Action::CreatePod(it) => {
                let name = format!("{}/{}", it.namespace, it.pod);
                self.add_pod(name.clone(), it.is.clone());
                vec![News::Apply(self.pod_object(&name))]
            }
            Action::SetPodLabels(it) => {
                let name = format!("{}/{}", it.namespace, it.pod);
                self.pods.get_mut(&name).context("no such pod")?.is.labels = it.labels.clone();
                vec![News::Apply(self.pod_object(&name))]
            }
            Action::DeletePod { namespace, pod } => {
                let name = format!("{namespace}/{pod}");
                ensure!(self.pods.contains_key(&name), "there is no pod {name}");
                let news = vec![News::Delete(self.pod_object(&name))];
                self.pods.remove(&name);
                news
            }
        })
    }

    fn add_pod(&mut self, name: String, is: ModelPod) {
        self.born += 1;
        self.pods.insert(name, ClusterPod { uid: format!("pod-{}", self.born), is });
    }

    /// All there is, as objects.
    pub fn objects(&self) -> Vec<Value> {
        let namespaces = self.namespaces.keys().map(|name| self.namespace_object(name));
        let pods = self.pods.keys().map(|name| self.pod_object(name));
        namespaces.chain(pods).chain(self.policies.values().cloned()).collect()
    }

    /// Pods with their addresses, by `namespace/name`.
    pub fn pods(&self) -> impl Iterator<Item = (&str, IpAddr)> {
        self.pods.iter().map(|(name, pod)| (name.as_str(), pod.is.ip))
    }

    pub fn externals(&self) -> impl Iterator<Item = (&str, IpAddr)> {
        self.externals.iter().map(|(name, address)| (name.as_str(), *address))
    }

    /// All cells of a step's tables that say something.
    pub fn cells<'a>(&self, step: &'a Step) -> anyhow::Result<Vec<Cell<'a>>> {
        let mut cells = Vec::new();
        for table in &step.expected {
            for probe in &table.on {
                ensure!(table.rows.len() == step.pods.len(), "there are {} rows", table.rows.len());
                for (from, row) in step.pods.iter().zip(&table.rows) {
                    ensure!(row.chars().count() == step.pods.len(), "a row is `{row}`");
                    for (to, expected) in step.pods.iter().zip(row.chars()) {
                        if expected != '-' {
                            let (source, destination) = (self.address(from)?, self.address(to)?);
                            let Some(service) = self.service(probe, to)? else { continue };
                            cells.push(Cell { from, to, probe, source, destination, service, expected });
                        }
                    }
                }
            }
        }
        Ok(cells)
    }

    fn address(&self, name: &str) -> anyhow::Result<IpAddr> {
        let pod = self.pods.get(name).map(|pod| pod.is.ip);
        pod.or(self.externals.get(name).copied()).with_context(|| format!("nobody is called {name}"))
    }

    /// None for a port's name where nobody gives ports names.
    fn service(&self, probe: &str, to: &str) -> anyhow::Result<Option<Service>> {
        let (port, protocol) = probe.split_once('/').with_context(|| format!("`{probe}` is no probe"))?;
        let protocol: Protocol = protocol.parse()?;
        if let Ok(number) = port.parse() {
            return Ok(Some(Service::Port(protocol, number)));
        }
        if self.externals.contains_key(to) {
            return Ok(None);
        }
        let pod = self.pods.get(to).with_context(|| format!("{to} has no port {port}"))?;
        let named =
            pod.is.ports.iter().find(|it| {
                it.name.as_deref() == Some(port) && it.protocol.eq_ignore_ascii_case(protocol.word())
            });
        let named = named.with_context(|| format!("{to} has no port {probe}"))?;
        Ok(Some(Service::Port(protocol, named.port)))
    }

    fn namespace_object(&self, name: &str) -> Value {
        json!({"kind": "Namespace", "metadata": {"name": name, "labels": self.namespaces.get(name)}})
    }

    fn pod_object(&self, full: &str) -> Value {
        let ClusterPod { uid, is } = &self.pods[full];
        let (namespace, name) = full.split_once('/').unwrap_or(("default", full));
        let ports: Vec<_> = is
            .ports
            .iter()
            .map(|it| json!({"name": it.name, "containerPort": it.port, "protocol": it.protocol}))
            .collect();
        json!({
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": is.labels},
            "spec": {"containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIPs": [{"ip": is.ip}]},
        })
    }
}

fn of_some_kind(mut policy: Value) -> Value {
    if policy["kind"].is_null() {
        policy["kind"] = "NetworkPolicy".into();
    }
    policy
}

impl Cell<'_> {
    /// Whether a connection begins.
    pub fn passes(&self) -> anyhow::Result<bool> {
        match self.expected {
            '.' | '=' => Ok(true),
            'I' | 'E' | 'X' => Ok(false),
            other => bail!("`{other}` is no verdict"),
        }
    }
}

impl fmt::Display for Cell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ▸ {} {}", self.from, self.to, self.probe)
    }
}
