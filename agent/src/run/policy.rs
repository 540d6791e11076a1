//! Feeds network policies: from the API server, or on plain hosts from `weft policy apply`; and answers for them.
//!
//! ```text
//!   allocator ── who is attached here ──▶┐
//!   API server, or policies.json ────────┼──▶ policy ──▶ in force? ──▶ ADD
//!   the node's own addresses ────────────┘       └──▶ explain, counts ──▶ `weft policy`, /metrics
//! ```

use crate::{
    config::Config,
    ipam::{self, View},
    kube::{
        policies::{self as watched, Heard, News},
        task::Handle as Cluster,
    },
    mesh::peers::{PeerRecord, PeerSet},
    policy::{
        self, Handle, Index, Nodes,
        cache::Known,
        cluster,
        convert::{self, DEFAULT, Invalid},
        counts::{self, Counts},
        document::{ObjectKey, Objects},
        model::{ContainerPort, Direction, Flow, Pod, PolicyId, Protocol, Service},
    },
    types::{AttachmentKey, PodRef},
};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tonic::{Request, Response, Status};
use tracing::{debug, warn};
use weft_proto::local::{self, policy_server};

/// Network policies of this node; cheap to clone.
#[derive(Clone, Debug)]
pub struct Policies {
    handle: Handle,
    /// ClusterNetworkPolicy objects count.
    cluster_policies: bool,
    /// None: an API server has the objects.
    plain: Option<Arc<Mutex<Plain>>>,
    /// What the API server said last, for starts while it cannot be reached.
    cache: PathBuf,
}

/// Objects that were applied by hand, and the file that keeps them.
#[derive(Debug)]
struct Plain {
    file: PathBuf,
    objects: BTreeMap<ObjectKey, Value>,
}

impl Policies {
    /// Begins to enforce; none where that is not wanted.
    ///
    /// # Errors
    /// There is no `nft`, or the file of applied objects cannot be read.
    pub async fn start(config: &Config) -> anyhow::Result<Option<Self>> {
        if !config.network_policy {
            policy::remove().await?;
            return Ok(None);
        }
        let mut index = Index::new(config.kubernetes.is_none());
        let cluster_policies = config.cluster_network_policy;
        let cache = config.state_dir.join(CACHE);
        let plain = match config.kubernetes {
            Some(_) => {
                if let Some(known) = fs::read_to_string(&cache).ok().and_then(|text| Known::read(&text)) {
                    known.teach(&mut index);
                    if !cluster_policies {
                        index.reset_cluster_policies(Vec::new());
                    }
                }
                None
            }
            None => {
                let plain = Plain::load(&config.state_dir)?;
                let objects = plain.parsed()?;
                if !(cluster_policies || objects.cluster_policies.is_empty()) {
                    warn!("ClusterNetworkPolicy objects do not count without --cluster-network-policy on");
                }
                reset(&mut index, objects, cluster_policies);
                Some(Arc::new(Mutex::new(plain)))
            }
        };
        let handle = policy::spawn(index, config.policy_log, config.run_dir.join(SCRIPT)).await?;
        Ok(Some(Self { handle, cluster_policies, plain, cache }))
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Takes in what a runtime says of a pod, but where something was applied by hand. An API server knows better.
    pub async fn label(
        &self,
        attachment: &AttachmentKey,
        pod: &PodRef,
        labels: &BTreeMap<String, String>,
    ) -> anyhow::Result<()> {
        let Some(plain) = &self.plain else { return Ok(()) };
        let mut plain = plain.lock().await;
        let PodRef { namespace, name, .. } = whole(pod, attachment.container_id());
        let key = ObjectKey { kind: "Pod".into(), name: format!("{namespace}/{name}") };
        if plain.objects.get(&key).is_some_and(|object| object["metadata"]["annotations"][BY].is_null()) {
            return Ok(());
        }
        let by = json!({BY: attachment.to_string()});
        let metadata = json!({"namespace": namespace, "name": name, "labels": labels, "annotations": by});
        let mut objects = plain.objects.clone();
        objects.insert(key, json!({"kind": "Pod", "metadata": metadata}));
        plain.take_up(objects, self).await
    }

    /// Forgets that again.
    pub async fn forget_labels(&self, attachment: &AttachmentKey) -> anyhow::Result<()> {
        let Some(plain) = &self.plain else { return Ok(()) };
        let (mut plain, by) = (plain.lock().await, attachment.to_string());
        let mut objects = plain.objects.clone();
        objects.retain(|_, object| object["metadata"]["annotations"][BY] != *by);
        if objects.len() == plain.objects.len() {
            return Ok(());
        }
        plain.take_up(objects, self).await
    }

    /// Follows who is attached here, and by which addresses nodes speak.
    pub fn follow(
        &self,
        peers: watch::Receiver<Arc<PeerSet>>,
        ring: watch::Receiver<Arc<View>>,
        tasks: &mut JoinSet<anyhow::Result<()>>,
    ) {
        tasks.spawn(follow_nodes(self.handle.clone(), ring.clone(), peers.clone()));
        tasks.spawn(follow_attachments(self.handle.clone(), peers, ring));
    }

    /// Follows what the API server says.
    pub fn follow_cluster(&self, cluster: Cluster, tasks: &mut JoinSet<anyhow::Result<()>>) {
        let (tell, heard) = mpsc::channel(HEARD);
        let cluster_policies = self.cluster_policies;
        tasks.spawn(async move {
            watched::hear(cluster, cluster_policies, tell).await;
            bail!("network policies are watched no more")
        });
        tasks.spawn(follow_cluster(self.clone(), heard));
    }
}

async fn follow_attachments(
    handle: Handle,
    mut peers: watch::Receiver<Arc<PeerSet>>,
    mut ring: watch::Receiver<Arc<View>>,
) -> anyhow::Result<()> {
    loop {
        let underlay = peers.borrow_and_update().own().endpoints.clone();
        let view = ring.borrow_and_update().clone();
        let attached: BTreeMap<_, _> =
            view.allocations.iter().filter_map(|(a, it)| Some((*a, pod(it)?))).collect();
        let own: BTreeSet<_> = underlay.iter().map(|endpoint| endpoint.0.ip()).chain(view.bridge).collect();
        let change = move |index: &mut Index| {
            index.set_own(own);
            index.settle(attached);
        };
        match handle.update(change).await {
            Err(policy::PolicyError::Stopped) => bail!("network policies are enforced no more"),
            // It is tried again, and has been told.
            Ok(()) | Err(policy::PolicyError::Failed(_)) => {}
        }
        tokio::select! {
            changed = ring.changed() => changed.context("the allocator has stopped")?,
            // Why the mesh has stopped, others say.
            Ok(_) = peers.wait_for(|set| set.own().endpoints != underlay) => {}
        }
    }
}

/// A bridge's address counts where the ring gives it to that node, or the node holds it.
async fn follow_nodes(
    handle: Handle,
    mut ring: watch::Receiver<Arc<View>>,
    mut peers: watch::Receiver<Arc<PeerSet>>,
) -> anyhow::Result<()> {
    let mut told = Nodes::new();
    loop {
        let nodes = nodes(&ring.borrow_and_update().clone(), &peers.borrow_and_update().clone());
        if nodes != told {
            told.clone_from(&nodes);
            if handle.update(move |index| index.set_nodes(nodes)).await == Err(policy::PolicyError::Stopped) {
                bail!("network policies are enforced no more");
            }
        }
        tokio::select! {
            changed = ring.changed() => changed.context("the allocator has stopped")?,
            // Why the mesh has stopped, others say.
            Ok(()) = peers.changed() => {}
        }
    }
}

fn nodes(view: &View, peers: &PeerSet) -> Nodes {
    let with_bridge = peers.others().filter_map(|record| Some((&record.name, (record, record.bridge?))));
    let with_bridge: BTreeMap<_, _> = with_bridge.collect();
    let of_ring = view
        .ranges
        .iter()
        .filter_map(|(range, owner)| with_bridge.get(owner).filter(|(_, bridge)| range.contains(bridge)));
    let held = with_bridge.values().filter(|(record, bridge)| record.held.contains(bridge));
    let own = |record: &PeerRecord| record.endpoints.iter().map(|endpoint| endpoint.0.ip()).collect();
    of_ring.chain(held).map(|(record, bridge)| (*bridge, own(record))).collect()
}

/// Where a runtime does not say whose an attachment is, it is a pod of its own.
fn pod(allocation: &ipam::Allocation) -> Option<PodRef> {
    let ipam::Owner::Pod(key) = &allocation.owner else { return None };
    Some(whole(&allocation.pod, key.container_id()))
}

pub fn whole(pod: &PodRef, container_id: &str) -> PodRef {
    let or = |text: &str, default: &str| if text.is_empty() { default.into() } else { text.to_string() };
    PodRef { uid: pod.uid.clone(), namespace: or(&pod.namespace, DEFAULT), name: or(&pod.name, container_id) }
}

/// Nothing is enforced before all kinds have been listed once: half a picture would let pass what the whole forbids. A server
/// that says nothing for long leaves us with what it said to the agent before.
async fn follow_cluster(policies: Policies, mut heard: mpsc::Receiver<Heard>) -> anyhow::Result<()> {
    let handle = &policies.handle;
    let mut listed = [false, false, false, !policies.cluster_policies];
    let was_known = handle.look(|index| !index.is_empty()).await?;
    let silent = sleep(SILENT);
    tokio::pin!(silent);
    let (mut waiting, mut save_at) = (was_known, None);
    loop {
        let first = tokio::select! {
            first = heard.recv() => first.context("network policies are watched no more")?,
            () = &mut silent, if waiting => {
                waiting = false;
                warn!("the API server has not said which network policies there are: what it said last is enforced");
                // What fails is tried again, and told.
                let _ = handle.update(Index::complete).await;
                continue;
            }
            () = sleep_until(save_at.unwrap_or_else(Instant::now)), if save_at.is_some() => {
                save_at = None;
                policies.save().await;
                continue;
            }
        };
        let mut batch = vec![first];
        while let Ok(more) = heard.try_recv() {
            batch.push(more);
        }
        for news in &batch {
            match news {
                Heard::Policy(News::All(_)) => listed[0] = true,
                Heard::Namespace(News::All(_)) => listed[1] = true,
                Heard::Pod(News::All(_)) => listed[2] = true,
                Heard::ClusterPolicy(News::All(_)) => listed[3] = true,
                _ => {}
            }
        }
        let complete = listed.iter().all(|it| *it);
        if complete {
            waiting = false;
            save_at.get_or_insert_with(|| Instant::now() + SAVE);
        }
        let change = move |index: &mut Index| {
            batch.into_iter().for_each(|news| take_in(index, news));
            if complete {
                index.complete();
            }
        };
        if handle.update(change).await == Err(policy::PolicyError::Stopped) {
            bail!("network policies are enforced no more");
        }
    }
}

fn take_in(index: &mut Index, news: Heard) {
    match news {
        Heard::Policy(News::All(objects)) => index.reset_policies(readable(&objects, convert::policy)),
        Heard::Policy(News::Applied(object)) => {
            readable(&[object], convert::policy).into_iter().for_each(|it| index.apply_policy(it));
        }
        Heard::Policy(News::Gone(object)) => {
            readable(&[object], convert::policy).iter().for_each(|it| index.delete_policy(&it.id, &it.uid));
        }
        Heard::ClusterPolicy(News::All(objects)) => {
            index.reset_cluster_policies(readable(&objects, cluster::policy));
        }
        Heard::ClusterPolicy(News::Applied(object)) => {
            readable(&[object], cluster::policy).into_iter().for_each(|it| index.apply_cluster_policy(it));
        }
        Heard::ClusterPolicy(News::Gone(object)) => {
            readable(&[object], cluster::policy)
                .iter()
                .for_each(|it| index.delete_cluster_policy(&it.name, &it.uid));
        }
        Heard::Namespace(News::All(objects)) => {
            index.reset_namespaces(readable(&objects, convert::namespace))
        }
        Heard::Namespace(News::Applied(object)) => {
            readable(&[object], convert::namespace).into_iter().for_each(|it| index.apply_namespace(it));
        }
        Heard::Namespace(News::Gone(object)) => {
            readable(&[object], convert::namespace)
                .iter()
                .for_each(|it| index.delete_namespace(&it.name, &it.uid));
        }
        Heard::Pod(News::All(objects)) => index.reset_pods(readable(&objects, convert::pod)),
        Heard::Pod(News::Applied(object)) => {
            readable(&[object], convert::pod).into_iter().for_each(|it| index.apply_pod(it));
        }
        Heard::Pod(News::Gone(object)) => {
            readable(&[object], convert::pod).iter().for_each(|it| index.delete_pod(&it.uids[0]));
        }
    }
}

fn readable<K, T>(objects: &[K], read: fn(&K) -> Result<T, Invalid>) -> Vec<T> {
    let read = |object| read(object).inspect_err(|error| warn!(%error, "an object is passed over")).ok();
    objects.iter().filter_map(read).collect()
}

impl Plain {
    fn load(state_dir: &Path) -> anyhow::Result<Self> {
        let file = state_dir.join(FILE);
        let objects = match fs::read_to_string(&file) {
            Ok(text) => Objects::split(&text)
                .with_context(|| format!("{}: remove it, and apply the policies anew", file.display()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        };
        Ok(Self { file, objects })
    }

    fn text(objects: &BTreeMap<ObjectKey, Value>) -> String {
        json!({"kind": "List", "items": objects.values().collect::<Vec<_>>()}).to_string()
    }

    fn parsed(&self) -> anyhow::Result<Objects> {
        Ok(Objects::parse(&Self::text(&self.objects))?)
    }

    /// Writes down first what then holds.
    async fn take_up(
        &mut self,
        objects: BTreeMap<ObjectKey, Value>,
        policies: &Policies,
    ) -> anyhow::Result<()> {
        let cluster_policies = policies.cluster_policies;
        let text = Self::text(&objects);
        let parsed = Objects::parse(&text)?;
        write(&self.file, &text)?;
        self.objects = objects;
        Ok(policies.handle.update(move |index| reset(index, parsed, cluster_policies)).await?)
    }
}

fn reset(index: &mut Index, objects: Objects, cluster_policies: bool) {
    index.reset_namespaces(objects.namespaces);
    index.reset_pods(objects.pods);
    index.reset_policies(objects.policies);
    index.reset_cluster_policies(if cluster_policies { objects.cluster_policies } else { Vec::new() });
}

#[tonic::async_trait]
impl policy_server::Policy for Policies {
    async fn apply(
        &self,
        request: Request<local::PolicyApplyRequest>,
    ) -> Result<Response<local::PolicyApplyReply>, Status> {
        let local::PolicyApplyRequest { text, only } = request.into_inner();
        let mut plain = self.plain().map_err(refused)?.lock().await;
        let new = Objects::split(&text).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if !self.cluster_policies && new.keys().any(|key| key.kind == cluster::KIND) {
            return Err(refused(
                "ClusterNetworkPolicy objects need an agent with --cluster-network-policy on",
            ));
        }
        let mut objects = plain.objects.clone();
        if only {
            // What runtimes say was not applied.
            objects.retain(|_, object| !object["metadata"]["annotations"][BY].is_null());
        }
        let applied = new.iter().filter(|(key, object)| plain.objects.get(*key) != Some(*object));
        let applied = applied.map(|(key, _)| key.to_string()).collect();
        objects.extend(new);
        let deleted = plain.objects.keys().filter(|key| !objects.contains_key(*key)).map(ToString::to_string);
        let deleted = deleted.collect();
        plain.take_up(objects, self).await.map_err(failed)?;
        Ok(Response::new(local::PolicyApplyReply { applied, deleted }))
    }

    async fn delete(
        &self,
        request: Request<local::PolicyDeleteRequest>,
    ) -> Result<Response<local::PolicyDeleteReply>, Status> {
        let local::PolicyDeleteRequest { kind, name } = request.into_inner();
        let mut plain = self.plain().map_err(refused)?.lock().await;
        let (mut objects, key) = (plain.objects.clone(), ObjectKey { kind, name });
        if objects.remove(&key).is_none() {
            return Err(Status::not_found(format!("there is no {key}")));
        }
        plain.take_up(objects, self).await.map_err(failed)?;
        Ok(Response::new(local::PolicyDeleteReply {}))
    }

    async fn list(
        &self,
        _: Request<local::PolicyListRequest>,
    ) -> Result<Response<local::PolicyListReply>, Status> {
        let counts = self.handle.counts().await.map_err(|error| failed(error.into()))?;
        let policies = self.handle.look(move |index| entries(index, &counts)).await;
        let policies = policies.map_err(|error| failed(error.into()))?;
        Ok(Response::new(local::PolicyListReply { policies }))
    }

    async fn explain(
        &self,
        request: Request<local::PolicyExplainRequest>,
    ) -> Result<Response<local::PolicyExplainReply>, Status> {
        let request = request.into_inner();
        let reply = self.handle.look(move |index| explained(index, &request)).await;
        let reply = reply.map_err(|error| failed(error.into()))?;
        reply.map(Response::new).map_err(Status::invalid_argument)
    }
}

impl Policies {
    async fn save(&self) {
        let written = async {
            let known = self.handle.look(Known::of).await?;
            let file = self.cache.clone();
            tokio::task::spawn_blocking(move || write(&file, &known.write())).await?
        };
        if let Err(error) = written.await {
            warn!(error = format!("{error:#}"), "what the API server says of network policies is not kept");
        }
    }

    fn plain(&self) -> Result<&Arc<Mutex<Plain>>, &'static str> {
        self.plain.as_ref().ok_or("in a cluster policies are objects of the API server: use kubectl")
    }
}

fn entries(index: &Index, counts: &Counts) -> Vec<local::PolicyEntry> {
    let here = || index.attached().keys().filter_map(|address| index.endpoint(*address));
    let entry = |id: PolicyId, [ingress, egress]: [bool; 2], selects: &dyn Fn(&Pod) -> bool| {
        let (allowed, denied) = counts::of_policy(counts, &id);
        local::PolicyEntry {
            name: id.to_string(),
            ingress,
            egress,
            pods: here().filter(|pod| selects(pod)).map(|pod| pod.full_name()).collect(),
            denied: denied.packets,
            allowed: allowed.packets,
        }
    };
    let cluster = index.cluster_policies().map(|policy| {
        let concerns = Direction::BOTH.map(|direction| !policy.rules(direction).is_empty());
        entry(policy.id(), concerns, &|pod| index.pod_matches(&policy.subject, pod))
    });
    let own = index.policies().values().map(|policy| {
        let concerns = Direction::BOTH.map(|direction| policy.rules(direction).is_some());
        entry(policy.id.clone(), concerns, &|pod| policy.selects(pod))
    });
    cluster.chain(own).collect()
}

fn explained(
    index: &Index,
    request: &local::PolicyExplainRequest,
) -> Result<local::PolicyExplainReply, String> {
    let local::PolicyExplainRequest { source, destination, port, protocol } = request;
    let (source, destination) = (end(index, source)?, end(index, destination)?);
    let protocol: Protocol =
        protocol.parse().map_err(|error: policy::model::InvalidProtocol| error.to_string())?;
    let number = match port.parse() {
        Ok(number) => number,
        Err(_) => {
            let named = |it: &&ContainerPort| it.name == *port && it.protocol == protocol;
            let found = destination.1.iter().flat_map(|pod| &pod.ports).find(named);
            found
                .map(|it| it.number)
                .ok_or_else(|| format!("the destination has no {protocol} port `{port}`"))?
        }
    };
    let flow = Flow { source: source.0, destination: destination.0, to: Service::Port(protocol, number) };
    let said = policy::explain(index, &flow);
    let shown = |(address, pod): &(IpAddr, Option<Arc<Pod>>)| match pod {
        Some(pod) => format!("{} ({address})", pod.full_name()),
        None => address.to_string(),
    };
    let mut caveats = Vec::new();
    if !index.is_complete() {
        caveats.push("not all of the cluster's policies have been heard yet".into());
    }
    Ok(local::PolicyExplainReply {
        allowed: said.allowed(),
        source: shown(&source),
        destination: format!("{}, {}", shown(&destination), flow.to),
        egress: said.egress.to_string(),
        ingress: said.ingress.to_string(),
        caveats,
    })
}

/// An address, or a pod's first one.
fn end(index: &Index, text: &str) -> Result<(IpAddr, Option<Arc<Pod>>), String> {
    if let Ok(address) = text.parse() {
        return Ok((address, index.endpoint(address).cloned()));
    }
    let found = index.endpoints().iter().find(|(_, pod)| pod.full_name() == text);
    let (address, pod) = found.ok_or_else(|| {
        format!("`{text}` is neither an address nor NAMESPACE/POD of a pod that is known here")
    })?;
    Ok((*address, Some(pod.clone())))
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    let new = file.with_extension("new");
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, file));
    written.with_context(|| format!("write {}", file.display()))
}

fn refused(why: &str) -> Status {
    Status::failed_precondition(why)
}

fn failed(error: anyhow::Error) -> Status {
    debug!(error = format!("{error:#}"), "a question about policies was not answered");
    Status::internal(format!("{error:#}"))
}

/// In the state directory: what was applied by hand.
pub const FILE: &str = "policies.json";
/// In the run directory: what was written to the kernel last, where the table has an owner.
pub const SCRIPT: &str = "policy.nft";
/// The annotation of a pod that its runtime has described: for which attachment.
const BY: &str = "weft/attachment";
/// In the state directory: what the API server said last.
pub const CACHE: &str = "policy-cache.json";
/// After a change, until that is written down.
const SAVE: Duration = Duration::from_secs(10);
/// How long the API server may say nothing until what is written down counts.
const SILENT: Duration = Duration::from_secs(5);
/// What the server has said and nobody has taken in yet; it waits when this is full.
const HEARD: usize = 1024;
