//! Flags and environment, parsed once, checked as a whole before anything is touched.
//!
//! ```text
//!   argv, WEFT_* ──clap──▶ Args (text) ─┐
//!                                       ├─ Config::check ──▶ Config, units in the types
//!   netlink, uname ──────▶ HostFacts ───┘                └─▶ ConfigErrors: all of them at once
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod args;
mod check;
mod host;

pub use args::{Args, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, Encryption, Ipam, LogFormat, Switch};
pub use host::{HostAddress, HostFacts, HostLink, HostRoute};

use crate::{
    identity::Source,
    ipam::Seeding,
    types::{Endpoint, PeerAddress, PeerName, Prefix, Universe},
};
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

/// What an agent runs with. One that exists fits the host that it was checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub name: PeerName,
    /// Addresses of this host that peers use, best first; never empty.
    pub endpoints: Vec<Endpoint>,
    /// They are what a flag says, whatever becomes of the host's addresses.
    pub pinned: bool,
    /// Interfaces that carry the endpoints.
    pub underlay: BTreeSet<String>,
    /// TCP for control, UDP for data.
    pub listen: SocketAddr,
    /// Whom to call first, without ourselves.
    pub peers: Vec<PeerAddress>,
    pub max_links: NonZeroUsize,
    pub universe: Universe,
    /// Who shares the universe at the start, in the order given; empty: we join an existing network.
    pub ipam_seed: Vec<PeerName>,
    /// What to do as long as nobody knows who that is.
    pub seeding: Seeding,
    pub ipam: Ipam,
    /// None: not in a cluster.
    pub kubernetes: Option<Kubernetes>,
    /// None: links are in clear.
    pub identity: Option<Source>,
    /// The pods' MTU in bytes.
    pub mtu: u16,
    pub encryption: Encryption,
    pub data_threads: NonZeroUsize,
    /// How long a data thread looks for more packets after work before it sleeps.
    pub poll: Duration,
    pub underlay_forwarding: bool,
    /// Destinations outside the universe that see the pods' own addresses.
    pub no_masquerade: Vec<Prefix>,
    /// Network policies are enforced.
    pub network_policy: bool,
    /// Those for the cluster, too.
    pub cluster_network_policy: bool,
    /// NFLOG group of what they drop.
    pub policy_log: Option<u16>,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    /// None: no probes but on `metrics`.
    pub probe_socket: Option<PathBuf>,
    /// From the agent that runs, if one does.
    pub takeover: bool,
    /// None: the CNI configuration is not written.
    pub cni_conf_dir: Option<PathBuf>,
    pub metrics: SocketAddr,
    pub log_format: LogFormat,
    /// Directives of `tracing_subscriber::EnvFilter`, known to parse.
    pub log_filter: String,
}

/// How to be a part of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    /// Of ConfigMap and Secret.
    pub namespace: String,
    /// None: what a pod is given.
    pub kubeconfig: Option<PathBuf>,
}

impl Config {
    /// Makes a configuration of what was asked for and what the host is like.
    ///
    /// # Errors
    /// Everything that is wrong, not only the first thing.
    pub fn check(args: &Args, host: &HostFacts) -> Result<Self, ConfigErrors> {
        check::check(args, host)
    }

    /// Where peers find this host now, where they found it at `before`: nowhere else as long as it has one of those
    /// addresses, or no other.
    pub fn endpoints_now(&self, before: &[Endpoint], host: &HostFacts) -> Vec<Endpoint> {
        let stay = before.iter().filter(|endpoint| host.device_of(endpoint.0.ip()).is_some()).copied();
        let stay: Vec<_> = stay.collect();
        if self.pinned || !stay.is_empty() {
            return if self.pinned { before.into() } else { stay };
        }
        let heard = |ip: &IpAddr| ip.is_ipv4() || self.listen.is_ipv6();
        let usable = |ip: &IpAddr| heard(ip) && !self.universe.contains(*ip);
        match host.default_address().filter(usable) {
            Some(ip) => vec![Endpoint(SocketAddr::new(ip, self.listen.port()))],
            None => before.into(),
        }
    }

    /// Where the cluster's CA goes; none where the keys come from elsewhere.
    pub fn cluster_keys(&self) -> Option<PathBuf> {
        let dir = cluster_keys_in(&self.run_dir);
        (self.kubernetes.is_some() && self.identity == Some(Source::CaDir(dir.clone()))).then_some(dir)
    }

    /// The socket of the local API.
    pub fn socket(&self) -> PathBuf {
        socket_in(&self.run_dir)
    }
}

/// The socket of the local API in a run directory.
pub fn socket_in(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET)
}

/// Of a cluster's CA, in a run directory: in memory, as Kubernetes keeps its Secrets on nodes.
fn cluster_keys_in(run_dir: &Path) -> PathBuf {
    run_dir.join(CLUSTER_KEYS)
}

/// The directory of a cluster's CA.
pub const CLUSTER_KEYS: &str = "ca";

/// All that is wrong with a configuration; never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

/// One flag that cannot be used, with its value and what it is in conflict with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag}{}{value}: {conflict}", if value.is_empty() { "" } else { " " })]
pub struct ConfigError {
    pub flag: &'static str,
    /// Empty where the conflict's text has it already.
    pub value: String,
    pub conflict: String,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this configuration cannot be used; nothing was changed")?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

/// In the run directory: the local API, and what two agents that start at once fight over.
pub const SOCKET: &str = "weft.sock";
pub const SOCKET_LOCK: &str = "weft.lock";
