//! Builds a running agent from a configuration. The only place that knows all subjects.
//!
//! ```text
//!            items, unicasts                 View                    Table
//!   mesh ◀──── switchboard ────▶ ipam ─────────┬──▶ steering ──────────────────▶ datapath
//!     └───────────── PeerSet ──────────────────┘      │  └─ gateways, ranges ──▶ links
//!                                                     └─ readiness ──▶ admin, cni
//!   shim ──▶ cni ── Addresses ──▶ ipam                Snapshot ◀── observe ◀── everybody
//!             └──── Ports ──────▶ links             cluster ◀─▶ kube, in a cluster
//! ```
//! Ports, sockets and the name are taken before anything of the kernel's is touched, so that a refusal leaves no trace.

mod addresses;
mod alive;
mod attach;
mod beginning;
mod cluster;
mod footing;
mod forget;
mod forwarding;
mod host;
mod install;
mod observe;
mod policy;
mod porch;
mod reset;
mod serve;
mod slim;
mod steering;
mod switchboard;
mod takeover;

pub use cluster::Cluster;
pub use host::facts;
pub use install::{InstallCniArgs, UninstallArgs, install_cni, uninstall};
pub use reset::{ResetArgs, reset};

use footing::{Footing, Same};
use porch::Porch;
use takeover::{Door, Inheritance, Listeners, Predecessor, Successor};

use crate::{
    admin::{Front, Heartbeats, HttpServer, Observer, Pages, Readiness},
    cni,
    config::{Args, Config, Encryption, Ipam, LogFormat},
    datapath::{
        self,
        handshake::{self, Estate},
        path_task::{self, Health},
        seal::Algorithm,
        session_task::{self, Handshakes},
    },
    identity::{
        self, Checker, Sealer,
        task::{Keeper, OWN_LIFETIME},
    },
    ipam::{
        self, Found, death::DeathGossip, deed::Takeovers, election::VoteGossip, span::Layout,
        token::RingGossiper,
    },
    links,
    mesh::{
        self,
        gossip::Gossiper,
        peers::PeerRecord,
        task::{Handle as Mesh, Incoming},
    },
    types::{DataId, DataSecret, TUN},
};
use anyhow::{Context, anyhow, bail};
use arc_swap::ArcSwap;
use futures_util::{FutureExt, TryFutureExt};
use std::{
    future::pending,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tracing::{info, warn};

/// What `weft agent` does, until SIGTERM, SIGINT, or something that it cannot go on without fails.
pub async fn agent(args: &Args) -> anyhow::Result<()> {
    let host = host::facts().await.context("look at the host")?;
    let config = Config::check(args, &host)?;
    start_logging(&config)?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let started = async {
        let porch = Porch::open(&config)?;
        let (config, cluster) = match cluster::join(args, &config, &host).await? {
            None => (config, None),
            Some((args, cluster)) => {
                // What the cluster says of the own address it says for now.
                let pinned = config.pinned;
                (Config { pinned, ..Config::check(&args, &host)? }, Some(cluster))
            }
        };
        let before = if config.takeover { Predecessor::find(&config).await? } else { None };
        let running = build(config.clone(), cluster, before, porch).await?;
        anyhow::Ok((running, Door::open(&config)?))
    };
    let (mut running, door) = tokio::select! {
        running = started => running?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tokio::spawn(slim::slim());
    let outcome = tokio::select! {
        outcome = running.ended() => outcome,
        successor = door.knock() => {
            running.hand_over(&successor).await.context("hand over to the next agent")?;
            if args.kubernetes {
                // A container that ends by itself is started again, against the next agent: this one waits to be told.
                tokio::select! {
                    rested = rest(args.probe_socket.as_deref()) => rested?,
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            return Ok(());
        }
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    running.stop().await;
    outcome
}

/// An agent at work. Dropped without [`Running::stop`] it ends as abruptly as by SIGKILL.
pub struct Running {
    mesh: Mesh,
    /// Ends once it has written everything, and nobody uses it any more.
    allocator: JoinHandle<()>,
    datapath: datapath::task::Datapath,
    /// None where packets go in clear.
    handshakes: Option<Handshakes>,
    health: Health,
    listeners: Listeners,
    /// Each ends by itself only when the agent cannot or need not go on.
    tasks: JoinSet<anyhow::Result<()>>,
    /// End, with their last answers given, when told to.
    servers: JoinSet<anyhow::Result<()>>,
    stopping: watch::Sender<bool>,
}

/// Starts an agent in the network namespace of the calling thread; in a cluster, with what it says already in the
/// configuration; after an agent that has begun to hand over, in its place.
///
/// # Errors
/// What was refused or failed, and which flag is concerned.
pub async fn build(
    config: Config,
    cluster: Option<Cluster>,
    before: Option<(Predecessor, Inheritance)>,
    porch: Porch,
) -> anyhow::Result<Running> {
    let started = Instant::now();
    host::check_means()?;
    let keys = config.identity.clone().map(|source| Keeper::new(config.name.clone(), source, OWN_LIFETIME));
    let (keeper, identity) = keys.transpose()?.unzip();
    let (predecessor, inheritance) = before.unzip();
    let footing = match inheritance {
        Some(inheritance) => Footing::inherited(inheritance, &config)?,
        None => Footing::new(&config).await?,
    };
    let listeners = footing.listeners()?;
    let Footing { same, items, control, http, local, queues, sockets } = footing;
    let threads = sockets.len();
    let Porch { mut servers, stopping, http: http_front } = porch;
    let (local_front, stopped) = (Front::default(), stopping.subscribe());
    servers.spawn(http.serve(http_front.router(Pages::starting), serve::until(&stopped)).map(Ok));
    servers.spawn(local.serve(local_front.router(serve::starting).into(), serve::until(&stopped)).err_into());
    let (store, fresh) = beginning::open_store(&config)?;
    let seeds = beginning::seeds(config.ipam_seed.iter().cloned().collect(), &store)?;

    let (believe, believed) = watch::channel(Arc::new(cluster::takeovers(cluster.as_ref())));
    let same = match same {
        Some(same) => same,
        None => Same {
            incarnation: store.next_incarnation(unix_time().as_micros() as u64)?,
            version: 1,
            data_id: DataId(rand::random()),
        },
    };
    let incarnation = same.incarnation;
    let secret = store.data_secret(DataSecret::new(rand::random()))?;
    let (sealed, data_key) = (config.encryption == Encryption::Required, identity::data_key(&secret));
    let record = PeerRecord {
        endpoints: config.endpoints.clone(),
        data_key: sealed.then_some(data_key),
        data_id: same.data_id,
        version: same.version,
        mtu: config.mtu,
        software: crate::SOFTWARE.into(),
        ..PeerRecord::new(config.name.clone(), incarnation)
    };
    // Who has just been elected by the whole cluster knows that there is no network yet, and nobody to wait for.
    let elected = cluster.as_ref().is_some_and(|cluster| cluster.elected);
    let bootstrap = if elected { Vec::new() } else { config.peers.clone() };
    let has_bootstrap = !bootstrap.is_empty();
    let mesh_config = mesh::machine::Config {
        record,
        universe: config.universe,
        identity: identity.clone(),
        seeds: seeds.names().into(),
        bootstrap,
        max_links: config.max_links.get(),
        items,
        gossipers: gossipers(&config, identity.as_ref(), believed),
        seed: rand::random(),
    };
    let (mesh, mut incoming) = mesh::task::spawn(mesh_config, vec![control]).context("start the mesh")?;
    let marker = config.run_dir.join(BOOT_MARKER);
    let rebooted = !marker.exists();
    let early = match rebooted {
        true => match join(&mut incoming).await {
            // Or the name or the universe that was refused would stand in the way of the right one.
            Err(refused) if fresh => return Err(store.discard().map_or_else(Into::into, |()| refused)),
            joined => joined?,
        },
        false => Vec::new(),
    };

    let observed = links::look().await.context("look at links and routes")?;
    let found = Found {
        veths: observed.veths().into_iter().map(|veth| veth.alias).collect(),
        macs: beginning::neighbours(&observed),
        bridge: beginning::bridge_address(&observed, &config),
        rebooted,
        continues: predecessor.is_some() || config.kubernetes.is_some(),
    };
    let ipam_config = ipam::Config {
        name: config.name.clone(),
        universe: config.universe,
        seeds,
        seeding: config.seeding,
        sealer: identity.clone().map(Sealer::new),
        has_bootstrap,
        assigned: cluster
            .as_ref()
            .filter(|_| config.ipam == Ipam::Podcidr)
            .map(|cluster| cluster::assigned(&cluster.cache.nodes)),
    };
    let member = cluster.map(|cluster| cluster::Member::new(cluster, incarnation.0)).transpose()?;
    let (outgoing_sender, outgoing) = mpsc::channel(QUEUE);
    let deaths = config.kubernetes.is_none().then(|| believe.clone());
    let (ipam, allocator) = ipam::task::start(ipam_config, store, found, outgoing_sender, deaths).await?;
    // What the agent before this one has left is in force until then.
    let policies = policy::Policies::start(&config).await.context("start network policies")?;
    let (queues, offloads) = match queues {
        Some(adopted) => adopted,
        None => datapath::task::open(TUN, threads)?,
    };
    let desired = beginning::desired(&config, &observed, &ipam.view().borrow());
    let links = links::spawn(config.state_dir.clone(), desired).await.context("set up links")?;
    let tables = Arc::new(ArcSwap::default());
    let (sealing_peers, sealing_watch) = watch::channel(Vec::new());
    std::fs::write(&marker, incarnation.0.to_string())
        .with_context(|| format!("--run-dir: write {}", marker.display()))?;

    let (readiness, starting) = Readiness::new();
    let heartbeats = Heartbeats::new(started);
    let mut tasks = JoinSet::new();
    if let Some(keeper) = keeper {
        tasks.spawn(async move {
            keeper.run().await;
            bail!("nobody uses the keys any more")
        });
    }
    let (leave, leaving) = mpsc::channel(1);
    let (forget, forgetting) = mpsc::channel(1);
    tasks.spawn(forget::Forgetter::new(&config, &mesh, &ipam, identity.clone()).run(forgetting));
    let board = switchboard::Switchboard {
        mesh: mesh.clone(),
        ipam: ipam.clone(),
        identity: identity.clone(),
        incoming,
        outgoing,
        leaving,
    };
    tasks.spawn(board.run(early));
    let (probed, probed_watch) = watch::channel(Default::default());
    let (views_sender, views) = watch::channel(Default::default());
    let (revived, mut revivals) = mpsc::channel(QUEUE);
    let ways =
        steering::Ways { tables: tables.clone(), sealing: sealing_peers, probed, views: views.clone() };
    let state = steering::State::new(&config, &mesh, &ipam, &links, (&readiness, starting), ways);
    let call_again = mesh.clone();
    tasks.spawn(async move {
        while let Some(peer) = revivals.recv().await {
            // Why the mesh has stopped, others say.
            let _ = call_again.heard(peer).await;
        }
        bail!("paths are no longer probed")
    });
    let (steered, node, cni_readiness) = (state.steered(), state.node(), state.cni_readiness());
    let beat = heartbeats.register("steering", Instant::now());
    tasks.spawn(state.run(beat, Instant::now));
    tasks.spawn(addresses::follow(config.clone(), mesh.clone(), links.clone()));

    let estate = match predecessor {
        Some(predecessor) => {
            // Packets that wait are to find their way.
            let steered = timeout(PATIENCE, steered.clone().changed()).await;
            steered.context("take over: the forwarding table was not made in time")??;
            Some(predecessor.sessions().await?)
        }
        None => None,
    };
    let agree = || {
        let handshake_config = handshake::Config {
            name: config.name.clone(),
            secret: secret.clone(),
            key: data_key,
            incarnation,
            algorithm: Algorithm::preferred(),
            lanes: u8::try_from(sockets.iter().map(Vec::len).sum::<usize>()).context("--data-threads")?,
            random: session_task::random(),
        };
        session_task::spawn(handshake_config, &sockets[0][0], sealing_watch, threads, tables.clone(), estate)
    };
    let handshakes = sealed.then(agree).transpose().context("start the handshakes")?;
    let sealing = handshakes.as_ref().map(|handshakes| handshakes.sealing().clone());
    let sessions = sealing.as_ref().map(|sealing| sealing.sessions.clone());
    let refusals = handshakes.as_ref().map(Handshakes::refusals);
    let probing = path_task::bind(&sockets).context("--listen")?;
    let datapath_config =
        datapath::task::Config { tun: TUN.into(), queues, offloads, sockets, linger: config.poll, sealing };
    let datapath = datapath::task::spawn(datapath_config, tables.clone())?;
    let health_config = path_task::Config {
        secret: sealed.then_some(secret),
        sockets: probing,
        tables,
        traffic: datapath.reader(),
        handshakes: handshakes.as_ref().map(|handshakes| handshakes.sealing().requests.clone()),
        since: unix_time(),
    };
    let health =
        path_task::spawn(health_config, probed_watch, views_sender, revived).context("probe paths")?;

    let cni_config = cni::Config {
        run_dir: config.run_dir.clone(),
        socket: config.socket(),
        conf_dir: config.cni_conf_dir.clone(),
    };
    let addresses = attach::IpamAddresses { ipam: ipam.clone(), policies: policies.clone() };
    if let Some(policies) = &policies {
        policies.follow(mesh.peers(), ipam.view(), &mut tasks);
    }
    let in_force = policies.as_ref().map(|policies| policies.handle().watch());
    let ports =
        attach::LinksPorts { links: links.clone(), steered: steered.clone(), policies: in_force.clone() };
    let cni = cni::Service::new(cni_config, addresses, ports, node, cni_readiness)?;
    tasks.spawn(cni.clone().run());

    let observer: Observer = Arc::new(observe::Sources {
        config: config.clone(),
        incarnation,
        started,
        identity,
        view: ipam.view(),
        peers: mesh.peers(),
        steered: steered.clone(),
        packets: datapath.reader(),
        sessions,
        refusals,
        views,
        probes: health.passed(),
        readiness: readiness.clone(),
        links: links.watch(),
        cni_warnings: cni.warnings(),
        policies: in_force,
        cluster: member.as_ref().map(cluster::Member::trouble),
    });
    if let Some(member) = member {
        let (mesh, ipam, cni) = (mesh.clone(), ipam.clone(), cni.clone());
        let readiness = readiness.clone();
        let (observer, steered) = (observer.clone(), steered.clone());
        let subjects = cluster::Subjects { mesh, ipam, cni, readiness, observer, steered, believe };
        if let Some(policies) = &policies {
            policies.follow_cluster(member.handle().clone(), &mut tasks);
        }
        member.spawn(&config, subjects, &mut tasks);
    }
    let answers = serve::Answers { cni, observer, policies, readiness, heartbeats };
    http_front.open(answers.pages().router());
    local_front.open(answers.local(leave, forget));
    let endpoints: Vec<_> = config.endpoints.iter().map(ToString::to_string).collect();
    info!(name = %config.name, %incarnation, universe = %config.universe, endpoints = endpoints.join(","), "started");
    Ok(Running { mesh, allocator, datapath, handshakes, health, listeners, tasks, servers, stopping })
}

impl Running {
    /// Returns when the agent need not go on (it has left) or cannot, and why.
    pub async fn ended(&mut self) -> anyhow::Result<()> {
        tokio::select! {
            why = self.datapath.failed() => Err(anyhow!(why)),
            Some(ended) = self.tasks.join_next() => ended.context("a task panicked")?,
            Some(ended) = self.servers.join_next() => ended.context("a server panicked")?,
            ended = &mut self.allocator => {
                ended.context("the allocator's task panicked")?;
                bail!("the allocator has stopped")
            }
        }
    }

    /// Ends the agent; pods, links and routes stay as they are.
    pub async fn stop(mut self) {
        self.end_control().await;
        self.datapath.stop();
        info!("stopped; pods, links and routes stay");
    }

    /// Ends the agent, step by step, as the next one begins.
    ///
    /// # Errors
    /// The next one ended before it had begun: then neither carries packets.
    pub async fn hand_over(mut self, successor: &Successor) -> anyhow::Result<()> {
        info!("handing over to the next agent");
        let own = self.mesh.peers().borrow().own().clone();
        let items = self.mesh.items().await.context("ask the mesh for what it knows")?;
        self.end_control().await;
        timeout(GRACE, &mut self.allocator)
            .await
            .context("the allocator does not end")?
            .context("the allocator")?;
        let workers = self.datapath.descriptors();
        let agent = takeover::agent(&own, workers.len());
        successor.hand_over(agent, &self.listeners, workers, items).await?;
        successor.ready().await?;
        self.datapath.stop();
        drop(self.health);
        let estate = match self.handshakes {
            Some(handshakes) => handshakes.release().await?,
            None => Estate::default(),
        };
        successor.hand_over_sessions(estate).await?;
        info!("handed over");
        Ok(())
    }

    /// Ends all but what carries packets.
    async fn end_control(&mut self) {
        self.stopping.send_replace(true);
        if timeout(GRACE, async { while self.servers.join_next().await.is_some() {} }).await.is_err() {
            warn!("calls under way were not answered in time");
        }
        self.servers.shutdown().await;
        self.mesh.stop().await;
        self.tasks.shutdown().await;
    }
}

/// Only answers probes, for ever.
async fn rest(probe_socket: Option<&Path>) -> anyhow::Result<()> {
    if let Some(path) = probe_socket {
        let over = Front::default().router(Pages::over);
        HttpServer::bind_probes(path)?.serve(over, pending()).await;
    }
    pending().await
}

/// Waits for the first exchange with a peer, or until it is clear that there is nobody; what came meanwhile is returned.
async fn join(incoming: &mut mpsc::Receiver<Incoming>) -> anyhow::Result<Vec<Incoming>> {
    let mut early = Vec::new();
    loop {
        match incoming.recv().await {
            Some(Incoming::Fatal(why)) => bail!(why),
            Some(message) => {
                let joined = message == Incoming::Joined;
                early.push(message);
                if joined {
                    return Ok(early);
                }
            }
            None => bail!("the mesh has stopped"),
        }
    }
}

/// The subjects' channels. In a cluster its server says who is dead.
fn gossipers(
    config: &Config,
    identity: Option<&identity::task::Current>,
    believed: Takeovers,
) -> Vec<Box<dyn Gossiper>> {
    let checker = || identity.cloned().map(Checker::new);
    let ring = RingGossiper::new(Layout::new(config.universe), checker().map(|checker| (checker, believed)));
    let mut gossipers: Vec<Box<dyn Gossiper>> = vec![Box::new(ring), Box::new(VoteGossip(checker()))];
    if config.kubernetes.is_none() {
        gossipers.push(Box::new(DeathGossip(checker())));
    }
    gossipers
}

fn start_logging(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log_filter).context("--log")?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Json => lines.json().init(),
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
    }
    Ok(())
}

fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// In the run directory, which a reboot empties: without it pods from before are gone.
const BOOT_MARKER: &str = "boot";
/// Messages between subjects; senders wait when it is full, and merge what waits.
const QUEUE: usize = 64;
/// How long a part of the start may take while another agent waits for it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long calls under way may take to be answered at the end.
const GRACE: Duration = Duration::from_secs(3);
