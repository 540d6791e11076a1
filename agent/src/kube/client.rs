//! The way to the API server: the Service's address from the environment or a kubeconfig, else the server's own addresses
//! as they were last known. The Service may not work yet: on many nodes it is this agent's network that it waits for.

use anyhow::{Context, bail};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use std::{net::SocketAddr, path::Path, time::Duration};

/// Ways to the API server, one of which is in use.
#[derive(Clone, Debug)]
pub struct Access {
    ways: Vec<Config>,
    at: usize,
}

/// Two ways of waiting for one server.
#[derive(Clone)]
pub struct Clients {
    /// Gives up a call after seconds.
    pub calls: Client,
    /// Waits through the silence of a watch.
    pub watches: Client,
}

impl Access {
    /// `servers` are the cached addresses of the server itself.
    ///
    /// # Errors
    /// There is neither a kubeconfig nor what a pod is given.
    pub async fn find(kubeconfig: Option<&Path>, servers: &[SocketAddr]) -> anyhow::Result<Self> {
        let first = match kubeconfig {
            Some(path) => {
                let at = || format!("--kubeconfig {}", path.display());
                let read = Kubeconfig::read_from(path).with_context(at)?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.with_context(at)?
            }
            None => Config::incluster().context(
                "--kubernetes: this is no pod with a service account (an agent that is none needs --kubeconfig)",
            )?,
        };
        let mut this = Self { ways: vec![first], at: 0 };
        this.know(servers);
        Ok(this)
    }

    /// The server's own addresses are these.
    pub fn know(&mut self, servers: &[SocketAddr]) {
        self.ways.truncate(1);
        self.at = self.at.min(servers.len());
        let first = &self.ways[0];
        let name = first.tls_server_name.clone().unwrap_or_else(|| match first.cluster_url.host() {
            // A certificate of an API server has its Service's name; its node's address it may lack.
            Some(host) if host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_err() => host.into(),
            _ => SERVER_NAME.into(),
        });
        let scheme = first.cluster_url.scheme_str().unwrap_or("https");
        let way = |server: &SocketAddr| {
            let mut way = first.clone();
            way.cluster_url = format!("{scheme}://{server}").parse().ok()?;
            way.tls_server_name = Some(name.clone());
            Some(way)
        };
        let direct: Vec<_> = servers.iter().filter_map(way).collect();
        self.ways.extend(direct);
    }

    /// For when this way leads nowhere.
    pub fn try_next(&mut self) {
        self.at = (self.at + 1) % self.ways.len();
    }

    pub fn server(&self) -> String {
        self.ways[self.at].cluster_url.to_string()
    }

    /// # Errors
    /// Keys or certificates cannot be used.
    pub fn clients(&self) -> anyhow::Result<Clients> {
        let client = |read: Duration| {
            let mut config = self.ways[self.at].clone();
            config.connect_timeout = Some(CONNECT);
            (config.read_timeout, config.write_timeout) = (Some(read), Some(CALL));
            config.reset_reader_on_write = true;
            Client::try_from(config).with_context(|| format!("API server {}", self.server()))
        };
        Ok(Clients { calls: client(CALL)?, watches: client(WATCH + CALL)? })
    }
}

/// Says what went wrong in a call, without what it carried.
pub fn explain(error: &kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            anyhow::anyhow!("{}: has the manifest's RBAC been applied as a whole?", status.message)
        }
        kube::Error::Api(status) => anyhow::anyhow!("{} ({})", status.message, status.reason),
        error => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text = format!("{text}: {cause_text}");
                }
                source = cause.source();
            }
            anyhow::anyhow!(text)
        }
    }
}

/// Whether an update failed because somebody else was faster.
pub fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

pub fn is_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// # Errors
/// The file cannot be written.
pub fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::{fs, io::Write, os::unix::fs::OpenOptionsExt};
    let Some(directory) = path.parent() else { bail!("{} is no file", path.display()) };
    let new = path.with_extension("new");
    let write = || {
        fs::create_dir_all(directory)?;
        let mut file =
            fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// In every API server's certificate.
const SERVER_NAME: &str = "kubernetes.default.svc";
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(3);
/// Until an answer comes.
const CALL: Duration = Duration::from_secs(10);
/// How long a watch is asked to last. A connection that is silent for longer is dead.
pub const WATCH: Duration = Duration::from_secs(100);
