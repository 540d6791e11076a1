//! Keeps the view and the cache of what the API server says, and makes the calls of others.
//!
//! ```text
//!   watches ──▶ index ──▶ View ──▶ cache, at most every 5 s
//! ```
//! When all calls fail for long, the next way to the server is tried ([`Access`]).

use super::{
    Node, Pod, Uid, View,
    board::{Board, Takeover},
    cache::Cache,
    client::{Access, Clients, explain, is_conflict, is_missing, write_file},
    convert,
    events::Post,
    index::Index,
    join::{self, Cluster, Settings, cache_file, list, update_board, update_secret},
    keys, report,
    watches::{self, FIRST_PAUSE, LONGEST_PAUSE, Said, is_expired, on_node},
};
use crate::{
    identity::task::CA_CERT,
    types::{PeerAddress, PeerName},
};
use anyhow::Context;
use futures_util::StreamExt;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Event as EventObject, Node as NodeObject, Pod as PodObject, Secret},
    jiff::Timestamp,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
    runtime::watcher::Event,
};
use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::watch,
    time::{sleep, sleep_until},
};
use tracing::{debug, info, warn};

/// What the others see and may ask for; cheap to clone. The task ends when all are dropped.
#[derive(Clone)]
pub struct Handle {
    settings: Arc<Settings>,
    view: watch::Receiver<Arc<View>>,
    trouble: watch::Receiver<Option<String>>,
    clients: watch::Receiver<Clients>,
    /// Tells our Events from those of an agent before.
    agent: u64,
}

pub struct Task {
    settings: Arc<Settings>,
    access: Access,
    index: Index,
    cached: Cache,
    /// Lists that are under way.
    nodes: Vec<Node>,
    pods: Vec<Pod>,
    view: watch::Sender<Arc<View>>,
    trouble: watch::Sender<Option<String>>,
    clients: watch::Sender<Clients>,
    save_at: Option<Instant>,
    /// The Secret as last heard.
    secret: Option<Secret>,
    /// When it is to be looked at again.
    keys_at: Option<Instant>,
}

/// Begins with what was known at the start; run [`Task::run`].
///
/// # Errors
/// The client cannot be made.
pub fn new(cluster: Cluster, agent: u64) -> anyhow::Result<(Handle, Task)> {
    let Cluster { settings, access, cache, .. } = cluster;
    let settings = Arc::new(settings);
    let board = Board { seeds: cache.seeds.clone(), takeovers: cache.takeovers.clone() };
    let index = Index::new(cache.nodes.clone(), board);
    let (view, view_seen) = watch::channel(Arc::new(index.view().clone()));
    let (trouble, trouble_seen) = watch::channel(None);
    let (clients, clients_seen) = watch::channel(access.clients()?);
    let handle = Handle {
        settings: settings.clone(),
        view: view_seen,
        trouble: trouble_seen,
        clients: clients_seen,
        agent,
    };
    let task = Task {
        settings,
        access,
        index,
        cached: cache,
        nodes: Vec::new(),
        pods: Vec::new(),
        view,
        trouble,
        clients,
        save_at: None,
        secret: None,
        keys_at: None,
    };
    Ok((handle, task))
}

impl Handle {
    pub fn node(&self) -> &PeerName {
        &self.settings.node
    }

    /// Whom to call beside the Nodes.
    pub fn peers(&self) -> &[PeerAddress] {
        &self.settings.peers
    }

    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// Why the server cannot be heard, if it cannot.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.clone()
    }

    /// This node's pods as they are now, by the server's word and not by what we have heard.
    pub async fn pods_now(&self) -> anyhow::Result<Vec<Pod>> {
        let api: Api<PodObject> = Api::all(self.client());
        let pods = list(&api, &on_node(&self.settings.node)).await.context("list this node's pods")?;
        Ok(pods.iter().filter_map(convert::pod).collect())
    }

    /// Says that the node's network works, and lets pods onto it.
    pub async fn announce(&self) -> anyhow::Result<()> {
        let api: Api<NodeObject> = Api::all(self.client());
        let (name, params) = (self.settings.node.as_str(), PatchParams::default());
        let status = report::network_available(&now());
        let node = api.patch_status(name, &params, &Patch::Strategic(status)).await;
        let mut node =
            node.map_err(|e| explain(&e)).with_context(|| format!("patch the status of Node {name}"))?;
        for _ in 0..ATTEMPTS {
            let Some(patch) = report::without_taint(&node) else { return Ok(()) };
            match api.patch(name, &params, &Patch::Merge(patch)).await {
                Ok(_) => return Ok(()),
                Err(error) if is_conflict(&error) => {
                    node = api.get(name).await.map_err(|error| explain(&error))?;
                }
                Err(error) => return Err(explain(&error)).with_context(|| format!("patch Node {name}")),
            }
        }
        anyhow::bail!("Node {name} changes too often to take its taint off")
    }

    /// Makes an Event on our Node, or tells one again.
    pub async fn post(&self, post: &Post) -> anyhow::Result<()> {
        let api: Api<EventObject> = Api::namespaced(self.client(), "default");
        let (node, now) = (self.settings.node.as_str(), now());
        if post.again {
            let name = report::event_name(node, self.agent, post);
            let again = Patch::Merge(report::event_again(post, &now));
            match api.patch(&name, &PatchParams::default(), &again).await {
                // The server forgets Events after an hour; then it is a new one.
                Err(error) if is_missing(&error) => {}
                done => return done.map(drop).map_err(|error| explain(&error)).context("patch an Event"),
            }
        }
        let event = serde_json::from_value(report::event(node, self.agent, post, &now))?;
        let made = api.create(&PostParams::default(), &event).await;
        made.map(drop).map_err(|error| explain(&error)).context("make an Event")
    }

    /// Whether a Node is gone for good, by the server's word; another of its name does not count as the same.
    pub async fn is_gone(&self, node: &PeerName, uid: &Uid) -> anyhow::Result<bool> {
        is_gone(&self.client(), node, uid).await
    }

    /// Has the cluster agree that we take a gone node's space; none where another does.
    pub async fn take_over(
        &self,
        node: &PeerName,
        uid: &Uid,
        least: u64,
        needed: impl Fn(&Takeover) -> bool,
    ) -> anyhow::Result<Option<Takeover>> {
        let me = &self.settings.node;
        let change = |board: &Board| board.take_over(node, uid, me, least, &needed);
        let (board, wrote) = update_board(&self.client(), &self.settings.namespace, change).await?;
        Ok(board.takeovers.last().filter(|_| wrote).cloned())
    }

    pub(super) fn clients(&self) -> watch::Receiver<Clients> {
        self.clients.clone()
    }

    fn client(&self) -> kube::Client {
        self.clients.borrow().calls.clone()
    }
}

impl Task {
    /// Until nobody looks any more.
    pub async fn run(mut self) {
        loop {
            let clients = match self.access.clients() {
                Ok(clients) => clients,
                Err(error) => return self.note(Some(format!("{error:#}"))),
            };
            self.clients.send_replace(clients.clone());
            let mut watches = watches::open(&self.settings, &clients.watches);
            let mut failing = None;
            loop {
                tokio::select! {
                    said = watches.next() => match said {
                        Some(Said::Failed(error)) if is_expired(&error) => {
                            debug!("the server has forgotten what a watch goes on from: all is listed anew");
                            sleep(FIRST_PAUSE).await;
                            break;
                        }
                        Some(Said::Failed(error)) => {
                            let since = *failing.get_or_insert_with(Instant::now);
                            let server = self.access.server();
                            self.note(Some(format!("API server {server}: {error}; what it said last goes on counting")));
                            if since.elapsed() >= GIVE_UP {
                                self.access.try_next();
                                break;
                            }
                        }
                        Some(said) => {
                            if said.is_an_answer() {
                                failing = None;
                                self.note(None);
                            }
                            self.hear(said, &clients).await;
                            self.confirm().await;
                            self.publish();
                        }
                        None => break,
                    },
                    () = until(self.save_at) => self.save(),
                    () = until(self.keys_at) => self.look_at_keys(&clients).await,
                    () = self.view.closed() => return,
                }
            }
        }
    }

    async fn hear(&mut self, said: Said, clients: &Clients) {
        let port = self.settings.port;
        match said {
            Said::Node(Event::Init) => self.nodes.clear(),
            Said::Node(Event::InitApply(node)) => self.nodes.extend(convert::node(&node, port)),
            Said::Node(Event::InitDone) => {
                self.index.reset_nodes(std::mem::take(&mut self.nodes));
                let servers = join::servers(&clients.calls).await;
                if !servers.is_empty() && servers != self.cached.servers {
                    self.access.know(&servers);
                    self.cached.servers = servers;
                }
                self.save_at = Some(Instant::now());
            }
            Said::Node(Event::Apply(node)) => {
                convert::node(&node, port).into_iter().for_each(|node| self.index.apply_node(node));
            }
            Said::Node(Event::Delete(node)) => {
                if let Some(node) = convert::node(&node, port) {
                    info!(node = %node.name, "the Node is deleted");
                    self.index.delete_node(&node.name, &node.uid);
                }
            }
            Said::Pod(Event::Init) => self.pods.clear(),
            Said::Pod(Event::InitApply(pod)) => self.pods.extend(convert::pod(&pod)),
            Said::Pod(Event::InitDone) => self.index.reset_pods(std::mem::take(&mut self.pods)),
            Said::Pod(Event::Apply(pod)) => {
                convert::pod(&pod).into_iter().for_each(|pod| self.index.apply_pod(pod));
            }
            Said::Pod(Event::Delete(pod)) => {
                convert::pod(&pod).iter().for_each(|pod| self.index.delete_pod(pod));
            }
            Said::Map(Event::Apply(map) | Event::InitApply(map)) => self.read_board(map, clients).await,
            Said::Secret(Event::Apply(secret) | Event::InitApply(secret)) => {
                self.secret = Some(secret);
                self.look_at_keys(clients).await;
            }
            // What is agreed on and the CA count for as long as there is a network, whoever removes them.
            Said::Map(_) | Said::Secret(_) | Said::Failed(_) => {}
        }
    }

    async fn read_board(&mut self, map: ConfigMap, clients: &Clients) {
        let known = &self.index.view().board;
        match Board::read(&map.data.unwrap_or_default()) {
            Ok(board) if board.seeds.is_empty() && !known.seeds.is_empty() && self.settings.elects => {
                // Somebody has emptied it; a node that comes new would elect itself.
                warn!("the ConfigMap is empty: writing down anew who had the universe at the start");
                let seeds = known.seeds.clone();
                let written =
                    update_board(&clients.calls, &self.settings.namespace, |board| board.elect(&seeds));
                if let Err(error) = written.await {
                    warn!(error = format!("{error:#}"), "cannot write the ConfigMap");
                }
            }
            Ok(board) => self.index.set_board(board),
            Err(error) => warn!(%error, "what the agents have agreed on cannot be read"),
        }
    }

    /// Makes sure of each death that a takeover is agreed on for: not everybody who can write the ConfigMap need be right.
    async fn confirm(&mut self) {
        let client = self.clients.borrow().calls.clone();
        for takeover in self.index.unconfirmed() {
            match is_gone(&client, &takeover.node, &takeover.uid).await {
                Ok(true) => {
                    info!(node = %takeover.node, taker = %takeover.taker, "the Node's space is taken over");
                    self.index.believe(takeover);
                }
                Ok(false) => warn!(node = %takeover.node, "a takeover is agreed on, but the Node is there"),
                Err(error) => debug!(error = format!("{error:#}"), "cannot make sure that a Node is gone"),
            }
        }
    }

    async fn look_at_keys(&mut self, clients: &Clients) {
        let again = self.read_keys(clients).await.unwrap_or_else(|error| {
            warn!(error = format!("{error:#}"), "the CA in the Secret is not taken up");
            Some(LONGEST_PAUSE)
        });
        self.keys_at = again.map(|pause| Instant::now() + pause);
    }

    /// Says when to look again.
    async fn read_keys(&self, clients: &Clients) -> anyhow::Result<Option<Duration>> {
        let Settings { keys_dir, namespace, step, .. } = self.settings.as_ref();
        let (Some(dir), Some(secret)) = (keys_dir, &self.secret) else { return Ok(None) };
        let Some(mut keys) = keys::read(&join::secret_data(secret))? else { return Ok(None) };
        let before = fs::read_to_string(dir.join(CA_CERT)).unwrap_or_default();
        if before != keys.ca_cert() && !before.is_empty() {
            let retire = |data: &mut keys::Data| keys::retire(data, &before, join::unix_time());
            let (data, wrote) = update_secret(&clients.calls, namespace, retire).await?;
            if wrote {
                warn!("the CA in the Secret is another: it replaces the one before, whose seals still count");
            }
            keys = keys::read(&data)?.context("the Secret is empty")?;
        }
        join::write_keys(dir, &keys, *step)
    }

    fn publish(&mut self) {
        let view = self.index.view();
        let changed = self.view.send_if_modified(|shown| {
            let changed = **shown != *view;
            if changed {
                *shown = Arc::new(view.clone());
            }
            changed
        });
        if changed {
            self.save_at = Some(self.save_at.unwrap_or_else(|| Instant::now() + SAVE));
        }
    }

    fn save(&mut self) {
        self.save_at = None;
        let view = self.index.view();
        let (seeds, servers) = (view.board.seeds.clone(), self.cached.servers.clone());
        let takeovers = view.believed.iter().filter(|t| view.board.takeovers.contains(t)).cloned().collect();
        let cache = Cache { nodes: view.nodes.as_ref().clone(), seeds, servers, takeovers };
        if cache == self.cached && cache_file(&self.settings).exists() {
            return;
        }
        self.cached = cache;
        if let Err(error) = write_file(&cache_file(&self.settings), &self.cached.write()) {
            warn!(error = format!("{error:#}"), "cannot cache what the API server says");
        }
    }

    fn note(&self, trouble: Option<String>) {
        self.trouble.send_if_modified(|noted| {
            let changed = *noted != trouble;
            match &trouble {
                Some(trouble) if changed => warn!("{trouble}"),
                None if changed => debug!("the API server answers"),
                _ => {}
            }
            *noted = trouble;
            changed
        });
    }
}

/// For ever where there is no such moment.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn is_gone(client: &kube::Client, node: &PeerName, uid: &Uid) -> anyhow::Result<bool> {
    let api: Api<NodeObject> = Api::all(client.clone());
    let found = api.get_opt(node.as_str()).await.map_err(|error| explain(&error))?;
    Ok(found.is_none_or(|found| found.metadata.uid.as_deref() != Some(&uid.0)))
}

fn now() -> String {
    // Kubernetes' times of this kind have whole seconds.
    format!("{:.0}", Timestamp::now())
}

/// After so long without an answer another way to the server is tried.
const GIVE_UP: Duration = Duration::from_secs(15);
/// How long a change may wait for others before it is cached.
const SAVE: Duration = Duration::from_secs(5);
/// How often a Node may change while its taint is being taken off.
const ATTEMPTS: usize = 50;
