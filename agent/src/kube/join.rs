//! What an agent has to know before it starts, from the API server, or from what was cached of it.
//!
//! A node that has run an agent since it booted starts from the cache at once: its pods must not wait for a server. Another
//! asks until it is answered: for the nodes, for who shares the universe (if nobody has been elected yet, for the place),
//! and for the CA (if there is none yet, it makes one).

use super::{
    CACHE, CONFIG_MAP, Node, SECRET,
    board::{Board, Data, Takeover},
    cache::Cache,
    client::{Access, explain, is_conflict, is_missing, write_file},
    convert, keys,
};
use crate::{
    identity::{
        Ca,
        task::{CA_CERT, CA_KEY, RETIRED_CERT},
    },
    types::{PeerAddress, PeerName},
};
use anyhow::{Context, anyhow, bail};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Endpoints, Node as NodeObject, Secret},
};
use kube::{
    Api, Client, Resource,
    api::{ListParams, PostParams},
};
use serde::de::DeserializeOwned;
use std::{
    collections::BTreeMap,
    fmt::Debug,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::sleep;
use tracing::{debug, info, warn};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `spec.nodeName` of our own pod.
    pub node: PeerName,
    /// Of ConfigMap and Secret.
    pub namespace: String,
    /// None: what a pod is given.
    pub kubeconfig: Option<PathBuf>,
    /// Of the cache.
    pub state_dir: PathBuf,
    /// Where the CA's files go; none: the node's keys come from elsewhere.
    pub keys_dir: Option<PathBuf>,
    /// Called beside the Nodes.
    pub peers: Vec<PeerAddress>,
    /// Where agents listen unless a Node says otherwise.
    pub port: u16,
    /// How long all have to hear of another CA, before any shows its certificates.
    pub step: Duration,
    /// Agents agree by the ConfigMap on who shares the universe at the start.
    pub elects: bool,
}

/// What is known at the start, and the way to more.
#[derive(Debug)]
pub struct Cluster {
    pub settings: Settings,
    pub access: Access,
    pub cache: Cache,
    /// This agent has just been elected: nobody has given or been given addresses yet.
    pub elected: bool,
}

impl Cluster {
    /// Our own Node.
    pub fn own(&self) -> Option<&Node> {
        self.cache.nodes.get(&self.settings.node)
    }
}

/// Waits until enough is known to start.
///
/// # Errors
/// There is no way to an API server, or a file cannot be written.
pub async fn join(settings: Settings) -> anyhow::Result<Cluster> {
    let cached = fs::read_to_string(cache_file(&settings)).ok().and_then(|text| Cache::read(&text));
    let cached = cached.unwrap_or_default();
    let mut access = Access::find(settings.kubeconfig.as_deref(), &cached.servers).await?;
    let has_keys = settings.keys_dir.as_ref().is_none_or(|dir| dir.join(CA_CERT).exists());
    if has_keys && cached.nodes.contains_key(&settings.node) && (!cached.seeds.is_empty() || !settings.elects)
    {
        info!(nodes = cached.nodes.len(), "starting with what the API server said before");
        return Ok(Cluster { settings, access, cache: cached, elected: false });
    }
    let mut pause = FIRST_PAUSE;
    loop {
        match ask(&settings, &access, &cached).await {
            Ok((cache, elected)) => {
                write_file(&cache_file(&settings), &cache.write())?;
                access.know(&cache.servers);
                return Ok(Cluster { settings, access, cache, elected });
            }
            Err(error) => {
                warn!(server = access.server(), error = format!("{error:#}"), "waiting for the API server");
                access.try_next();
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn ask(settings: &Settings, access: &Access, cached: &Cache) -> anyhow::Result<(Cache, bool)> {
    let client = access.clients()?.calls;
    let nodes = list::<NodeObject>(&Api::all(client.clone()), "").await.context("list the nodes")?;
    let nodes: BTreeMap<_, _> = nodes
        .iter()
        .filter_map(|node| convert::node(node, settings.port))
        .map(|n| (n.name.clone(), n))
        .collect();
    if !nodes.contains_key(&settings.node) {
        bail!("there is no Node {}: is --node-name (spec.nodeName) right?", settings.node);
    }
    if let Some(dir) = &settings.keys_dir {
        let keys = keys_of(&client, &settings.namespace).await.with_context(|| format!("Secret {SECRET}"))?;
        write_keys(dir, &keys, settings.step)?;
    }
    let (mut seeds, mut elected, mut takeovers) = (cached.seeds.clone(), false, Vec::new());
    if settings.elects {
        // Who has been part of the network before knows better than an empty ConfigMap, which somebody may have replaced.
        let candidates = if seeds.is_empty() { vec![settings.node.clone()] } else { seeds };
        let (board, wrote) =
            update_board(&client, &settings.namespace, |board| board.elect(&candidates)).await?;
        elected = wrote && cached.seeds.is_empty();
        seeds = board.seeds;
        let is_gone = |t: &Takeover| nodes.get(&t.node).is_none_or(|node| node.uid != t.uid);
        takeovers = board.takeovers.into_iter().filter(is_gone).collect();
        info!(
            seed = seeds.first().map(PeerName::as_str),
            elected, "who has the universe at the start is settled"
        );
    }
    Ok((Cache { nodes, seeds, servers: servers(&client).await, takeovers }, elected))
}

/// Changes what the agents have agreed on, again and again until nobody was faster; returns what it is then, and whether
/// we have written it. `change` returns none where nothing is to be written.
pub async fn update_board(
    client: &Client,
    namespace: &str,
    change: impl Fn(&Board) -> Option<Board>,
) -> anyhow::Result<(Board, bool)> {
    let at = || format!("ConfigMap {namespace}/{CONFIG_MAP}");
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for _ in 0..ATTEMPTS {
        let mut map = api.get(CONFIG_MAP).await.map_err(shipped).with_context(at)?;
        let mut data: Data = map.data.take().unwrap_or_default();
        let board = Board::read(&data)?;
        let Some(changed) = change(&board) else { return Ok((board, false)) };
        changed.write(&mut data);
        map.data = Some(data);
        match api.replace(CONFIG_MAP, &PostParams::default(), &map).await {
            Ok(_) => return Ok((changed, true)),
            Err(error) if is_conflict(&error) => debug!("another agent was faster; reading again"),
            Err(error) => return Err(explain(&error)).with_context(at),
        }
    }
    bail!("{}: others were faster {ATTEMPTS} times", at())
}

/// The CA in the Secret; if there is none, one that we make.
async fn keys_of(client: &Client, namespace: &str) -> anyhow::Result<keys::Keys> {
    let made = Ca::create(SystemTime::now())?;
    let (data, wrote) = update_secret(client, namespace, |data| {
        let empty = keys::read(data).is_ok_and(|files| files.is_none());
        if empty {
            keys::fill(data, &made.cert, &made.key);
        }
        empty
    })
    .await?;
    if wrote {
        info!("made the network's CA");
    }
    keys::read(&data)?.context("it is empty")
}

/// As [`update_board`]; `change` says whether it has changed anything.
pub async fn update_secret(
    client: &Client,
    namespace: &str,
    change: impl Fn(&mut keys::Data) -> bool,
) -> anyhow::Result<(keys::Data, bool)> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    for _ in 0..ATTEMPTS {
        let mut secret = api.get(SECRET).await.map_err(shipped)?;
        let mut data = secret_data(&secret);
        if !change(&mut data) {
            return Ok((data, false));
        }
        secret.data =
            Some(data.iter().map(|(key, value)| (key.clone(), ByteString(value.clone()))).collect());
        match api.replace(SECRET, &PostParams::default(), &secret).await {
            Ok(_) => return Ok((data, true)),
            Err(error) if is_conflict(&error) => debug!("another agent was faster; reading again"),
            Err(error) => return Err(explain(&error)),
        }
    }
    bail!("others were faster {ATTEMPTS} times")
}

pub fn secret_data(secret: &Secret) -> keys::Data {
    let data = secret.data.iter().flatten();
    data.map(|(key, value)| (key.clone(), value.0.clone())).collect()
}

/// Puts the CA where `identity` looks for it; what is the same is not touched. Says when to call again, if at all.
///
/// # Errors
/// A file cannot be written.
pub fn write_keys(dir: &Path, keys: &keys::Keys, step: Duration) -> anyhow::Result<Option<Duration>> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let there =
        keys::Files { ca_cert: read(CA_CERT), ca_key: read(CA_KEY).into(), retired: read(RETIRED_CERT) };
    let (files, changes) = keys.files(&there, unix_time(), step);
    let write = |name: &str, text: &str, there: &str| match text == there {
        true => Ok(()),
        false => write_file(&dir.join(name), text),
    };
    write(RETIRED_CERT, &files.retired, &there.retired)?;
    write(CA_KEY, &files.ca_key, &there.ca_key)?;
    write(CA_CERT, &files.ca_cert, &there.ca_cert)?;
    Ok(changes)
}

/// In seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Where the API server itself listens; empty where that cannot be told, which is no harm while its Service works.
pub async fn servers(client: &Client) -> Vec<SocketAddr> {
    let api: Api<Endpoints> = Api::namespaced(client.clone(), "default");
    let endpoints = match api.get("kubernetes").await {
        Ok(endpoints) => endpoints,
        Err(error) => {
            debug!(error = %explain(&error), "the API server's own addresses are not known");
            return Vec::new();
        }
    };
    let mut servers = Vec::new();
    for subset in endpoints.subsets.unwrap_or_default() {
        let Some(port) = subset.ports.iter().flatten().next() else { continue };
        let Ok(port) = u16::try_from(port.port) else { continue };
        let addresses = subset.addresses.iter().flatten().filter_map(|address| address.ip.parse().ok());
        servers.extend(addresses.map(|ip| SocketAddr::new(ip, port)));
    }
    servers
}

/// All objects, a page at a time; as they are now, not as some cache of the server has them.
pub async fn list<K>(api: &Api<K>, fields: &str) -> anyhow::Result<Vec<K>>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut params = ListParams::default().fields(fields).limit(PAGE);
    let mut all = Vec::new();
    loop {
        let page = api.list(&params).await.map_err(|error| explain(&error))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(all),
        }
    }
}

pub fn cache_file(settings: &Settings) -> PathBuf {
    settings.state_dir.join(CACHE)
}

/// What the manifests ship must be there.
fn shipped(error: kube::Error) -> anyhow::Error {
    match is_missing(&error) {
        true => anyhow!("it is not there; apply the manifests, which ship it empty"),
        false => explain(&error),
    }
}

/// How often an update may find that somebody was faster: more often than agents start at once.
const ATTEMPTS: usize = 50;
const PAGE: u32 = 500;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
