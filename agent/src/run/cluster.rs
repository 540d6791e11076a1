//! The agent as a part of a Kubernetes cluster: what it knows before it starts, and what it keeps in step afterwards.
//!
//! ```text
//!   before   flags + Nodes, ConfigMap, Secret ──▶ flags as a plain host would have them
//!   after    Nodes ──▶ mesh (whom to call), ipam (with --ipam podcidr)
//!            pods ──▶ cni (whose pod is gone)
//!            ready ──▶ Node (condition, taint)      what an operator should see ──▶ Events
//! ```

mod findings;
mod takeover;

pub use crate::kube::join::Cluster;

use crate::{
    admin::{Observer, Readiness},
    cni,
    config::{Args, Config, HostFacts, Ipam},
    ipam::{self, Assigned, Seeding, View as Ring, deed::Takeover, task::Handle as Addresses},
    kube::{
        Node,
        events::Aggregator,
        join::{self, Settings},
        orphans::{self, Orphans},
        peers,
        task::{self, Handle, Task},
    },
    mesh::task::Handle as Mesh,
    run::{
        attach::{IpamAddresses, LinksPorts},
        steering::Steered,
    },
    types::{PeerAddress, PeerName, Prefix},
};
use anyhow::{Context, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, task::JoinSet, time};
use tracing::{debug, info, warn};

/// Asks the cluster for what a plain host is told by flags, and adds it to them. None where this is no cluster.
///
/// # Errors
/// There is no way to an API server, or the cluster does not fit the flags.
pub async fn join(args: &Args, config: &Config, host: &HostFacts) -> anyhow::Result<Option<(Args, Cluster)>> {
    let Some(kubernetes) = &config.kubernetes else { return Ok(None) };
    let settings = Settings {
        node: config.name.clone(),
        namespace: kubernetes.namespace.clone(),
        kubeconfig: kubernetes.kubeconfig.clone(),
        state_dir: config.state_dir.clone(),
        keys_dir: config.cluster_keys(),
        peers: config.peers.clone(),
        port: config.listen.port(),
        step: CA_STEP,
        elects: config.ipam == Ipam::Ring && config.ipam_seed.is_empty() && config.seeding == Seeding::Given,
    };
    let cluster = join::join(settings).await?;
    let mut args = args.clone();
    let here = |address: &PeerAddress| address.host.parse().is_ok_and(|ip| host.device_of(ip).is_some());
    let others = peers::to_call(&cluster.cache.nodes, &config.name, &BTreeSet::new(), 0);
    args.peer.extend(others.iter().filter(|address| !here(address)).map(PeerAddress::to_string));
    let advertised = args.advertise.iter().any(|text| !text.trim().is_empty());
    if let (Some(node), false) = (cluster.own(), advertised) {
        let own =
            node.endpoints.iter().filter(|e| here(&peers::address(e)) && e.0.port() == config.listen.port());
        args.advertise = own.map(ToString::to_string).collect();
    }
    if cluster.settings.elects {
        args.ipam_seed = cluster.cache.seeds.iter().map(PeerName::to_string).collect();
    }
    if let Some(cidr) = cluster.own().and_then(|node| outside(node, config)) {
        let universe = config.universe;
        if config.ipam == Ipam::Podcidr {
            bail!(
                "--ipam podcidr: this Node's podCIDR {cidr} is outside --universe {universe}; give all agents the cluster's \
                 CIDR as --universe"
            );
        }
        warn!(
            %cidr,
            %universe,
            "this Node's podCIDR is outside the universe: where kube-proxy takes such for the pods' (its clusterCIDR), Services hide \
             pods from each other, also from network policies; set it to the universe"
        );
    }
    Ok(Some((args, cluster)))
}

/// A range of the universe's family that it does not hold.
fn outside(node: &Node, config: &Config) -> Option<Prefix> {
    let universe = config.universe.prefix();
    let same_family = |cidr: &&Prefix| cidr.addr().is_ipv6() == universe.addr().is_ipv6();
    node.pod_cidrs.iter().filter(same_family).find(|cidr| !universe.contains(*cidr)).copied()
}

/// Which Node has which ranges.
pub fn assigned(nodes: &BTreeMap<PeerName, Node>) -> Assigned {
    nodes.values().flat_map(|node| node.pod_cidrs.iter().map(|cidr| (node.name.clone(), *cidr))).collect()
}

/// The takeovers that are believed at the start.
pub fn takeovers(cluster: Option<&Cluster>) -> BTreeSet<Takeover> {
    cluster.iter().flat_map(|cluster| &cluster.cache.takeovers).map(takeover::of_ring).collect()
}

/// Keeps cluster and agent in step.
pub struct Member {
    handle: Handle,
    task: Task,
}

/// What a [`Member`] keeps in step.
pub struct Subjects {
    pub mesh: Mesh,
    pub ipam: Addresses,
    pub cni: cni::Service<IpamAddresses, LinksPorts>,
    pub readiness: Readiness,
    pub observer: Observer,
    pub steered: watch::Receiver<Arc<Steered>>,
    /// Whose deaths the ring's deeds may refer to.
    pub believe: watch::Sender<Arc<BTreeSet<Takeover>>>,
}

impl Member {
    /// # Errors
    /// A client cannot be made.
    pub fn new(cluster: Cluster, agent: u64) -> anyhow::Result<Self> {
        let (handle, task) = task::new(cluster, agent).context("--kubernetes")?;
        Ok(Self { handle, task })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Why the API server cannot be heard, if it cannot.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.handle.trouble()
    }

    pub fn spawn(self, config: &Config, subjects: Subjects, tasks: &mut JoinSet<anyhow::Result<()>>) {
        let Self { handle, task } = self;
        let Subjects { mesh, ipam, cni, readiness, observer, steered, believe } = subjects;
        tasks.spawn(async move {
            task.run().await;
            bail!("the API server is watched no more")
        });
        tasks.spawn(call_nodes(handle.clone(), mesh.clone()));
        if config.ipam == Ipam::Podcidr {
            tasks.spawn(follow_assignments(handle.clone(), ipam.clone()));
        } else {
            tasks.spawn(takeover::run(handle.clone(), ipam.clone(), mesh, steered, believe));
        }
        tasks.spawn(announce(handle.clone(), readiness));
        tasks.spawn(take_orphans_away(handle.clone(), ipam.view(), cni));
        tasks.spawn(tell(handle, ipam.view(), observer));
    }
}

/// Gives the mesh addresses of Nodes that it does not know.
async fn call_nodes(handle: Handle, mesh: Mesh) -> anyhow::Result<()> {
    let (mut view, mut set, mut told) = (handle.view(), mesh.peers(), Vec::new());
    let (mut tick, mut round) = (time::interval(CALL_OTHERS), 0);
    loop {
        let known: BTreeSet<PeerName> =
            set.borrow_and_update().others().map(|peer| peer.name.clone()).collect();
        let nodes = view.borrow_and_update().nodes.clone();
        let mut addresses = peers::to_call(&nodes, handle.node(), &known, round);
        addresses.extend(handle.peers().iter().cloned());
        if addresses != told {
            mesh.bootstrap(addresses.clone()).await?;
            told = addresses;
        }
        tokio::select! {
            changed = view.changed() => changed.context(NOT_WATCHED)?,
            // Why the mesh has stopped, others say.
            Ok(()) = set.changed() => {}
            _ = tick.tick() => round += 1,
        }
    }
}

async fn follow_assignments(handle: Handle, ipam: Addresses) -> anyhow::Result<()> {
    let mut view = handle.view();
    let mut told = None;
    loop {
        let now = assigned(&view.borrow_and_update().nodes);
        if told.as_ref() != Some(&now) {
            ipam.assigned(now.clone()).await?;
            told = Some(now);
        }
        view.changed().await.context(NOT_WATCHED)?;
    }
}

/// Lets pods onto the node once ADD works for the first time, and again should the Node have been made anew.
async fn announce(handle: Handle, readiness: Readiness) -> anyhow::Result<()> {
    let mut blocks = readiness.subscribe();
    while !readiness.reasons().is_empty() {
        blocks.changed().await.context("nobody asks for readiness")?;
    }
    let mut view = handle.view();
    let mut first = true;
    loop {
        let own = view.borrow_and_update().nodes.get(handle.node()).cloned();
        if first || own.is_some_and(|node| node.tainted || !node.network_available) {
            match handle.announce().await {
                Ok(()) if first => info!("the Node's network is available"),
                Ok(()) => {}
                Err(error) => {
                    warn!(
                        error = format!("{error:#}"),
                        "cannot tell the cluster that this node's network works"
                    );
                    time::sleep(TRY_AGAIN).await;
                    continue;
                }
            }
            first = false;
        }
        view.changed().await.context(NOT_WATCHED)?;
    }
}

/// Frees what pods hold that the cluster does not know any more.
async fn take_orphans_away(
    handle: Handle,
    ring: watch::Receiver<Arc<Ring>>,
    cni: cni::Service<IpamAddresses, LinksPorts>,
) -> anyhow::Result<()> {
    let mut orphans = Orphans::default();
    let mut tick = time::interval(orphans::GRACE / 4);
    tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(pods) = handle.view().borrow().pods.clone() else { continue };
        let (known, began): (Vec<_>, _) = (pods.values().cloned().collect(), Instant::now());
        let allocations = ring.borrow().allocations.clone();
        let attachments = || {
            allocations.values().filter_map(|allocation| match &allocation.owner {
                ipam::Owner::Pod(key) => Some((key, &allocation.pod)),
                ipam::Owner::Bridge => None,
            })
        };
        let suspects = orphans.observe(attachments(), &known, began);
        if suspects.is_empty() {
            continue;
        }
        match handle.pods_now().await {
            Ok(pods) => {
                let missing = orphans::missing(attachments(), &pods);
                cni.abandon(suspects.intersection(&missing).cloned(), began).await;
            }
            Err(error) => debug!(error = format!("{error:#}"), "cannot tell whether pods are gone"),
        }
    }
}

/// Makes Events of what an operator should see.
async fn tell(handle: Handle, ring: watch::Receiver<Arc<Ring>>, observer: Observer) -> anyhow::Result<()> {
    let (mut events, mut was_ready) = (Aggregator::default(), false);
    let mut tick = time::interval(LOOK);
    tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let snapshot = observer.snapshot();
        let found = findings::findings(&snapshot, &ring.borrow(), was_ready);
        was_ready |= snapshot.is_ready();
        for post in events.observe(found, Instant::now()) {
            if let Err(error) = handle.post(&post).await {
                debug!(error = format!("{error:#}"), note = post.finding.note, "an Event was not made");
            }
        }
    }
}

/// Longer than it takes an agent to hear of another CA by a watch that has just broken.
const CA_STEP: Duration = Duration::from_secs(20);
const NOT_WATCHED: &str = "the API server is watched no more";
/// How often others of the Nodes that nobody knows are called.
const CALL_OTHERS: Duration = Duration::from_secs(30);
/// Between attempts to tell the cluster that the network works.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How often is looked for what an operator should see.
const LOOK: Duration = Duration::from_secs(5);
