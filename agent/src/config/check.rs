//! The checks behind [`Config::check`], in the order of the flags in `--help`.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod underlay;

use super::{
    Args, Config, ConfigError, ConfigErrors, HostFacts, Ipam, Kubernetes, Switch, cluster_keys_in,
    host::is_global, socket_in,
};
use crate::{
    identity::{OPERATOR, Source},
    ipam::{Seeding, election::MOST_NAMES},
    types::{CONTROL_PORT, PeerAddress, PeerName, Prefix, Universe},
};
use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};
use tracing_subscriber::EnvFilter;

pub(super) fn check(args: &Args, host: &HostFacts) -> Result<Config, ConfigErrors> {
    let mut check = Check { args, host, errors: Vec::new() };
    let name = check.name();
    let listen = check.listen();
    let universe = check.universe();
    let endpoints = check.endpoints(listen, universe);
    let peers = check.peers(name.as_ref(), listen, universe);
    let (ipam_seed, seeding) = check.ipam_seed();
    let kubernetes = check.kubernetes();
    let max_links = check.count("--max-links", &args.max_links, 4..=64);
    let identity = check.identity();
    let mtu = check.mtu(&endpoints, universe);
    let data_threads = check.data_threads();
    let poll = check.poll();
    let no_masquerade = check.no_masquerade();
    let policy_log = check.policy_log();
    let [state_dir, run_dir, cni_conf_dir] = check.directories();
    let metrics = check.metrics(listen);
    check.log();
    let parts = (name, listen, universe, max_links, mtu, data_threads, poll, state_dir, run_dir, metrics);
    let Check { errors, .. } = check;
    match parts {
        (
            Some(name),
            Some(listen),
            Some(universe),
            Some(max_links),
            Some(mtu),
            Some(data_threads),
            Some(poll),
            Some(state_dir),
            Some(run_dir),
            Some(metrics),
        ) if errors.is_empty() => Ok(Config {
            name,
            underlay: underlay::devices(host, &endpoints),
            endpoints,
            pinned: !listen.ip().is_unspecified() || items(&args.advertise).next().is_some(),
            listen,
            peers,
            max_links,
            universe,
            ipam_seed,
            seeding,
            ipam: args.ipam,
            probe_socket: args.probe_socket.clone(),
            takeover: args.takeover,
            kubernetes,
            identity,
            mtu,
            data_threads,
            encryption: args.encryption,
            poll,
            underlay_forwarding: args.underlay_forwarding == Switch::On,
            no_masquerade,
            network_policy: args.network_policy == Switch::On,
            cluster_network_policy: args.cluster_network_policy == Switch::On,
            policy_log,
            state_dir,
            run_dir,
            cni_conf_dir,
            metrics,
            log_format: args.log_format,
            log_filter: args.log.clone(),
        }),
        _ => Err(ConfigErrors(errors)),
    }
}

struct Check<'a> {
    args: &'a Args,
    host: &'a HostFacts,
    errors: Vec<ConfigError>,
}

impl Check<'_> {
    fn name(&mut self) -> Option<PeerName> {
        if self.args.kubernetes {
            return self.node_name();
        }
        match given(&self.args.name) {
            Some(OPERATOR) => {
                self.refuse("--name", OPERATOR, "the name of those who may forget nodes; choose another");
                None
            }
            Some(name) => self.parse("--name", name),
            None => match self.host.host_name.parse() {
                Ok(name) => Some(name),
                Err(error) => {
                    self.refuse("--name", "", format!("the host name {error}; give this node a name"));
                    None
                }
            },
        }
    }

    /// Peers know each other by their Nodes.
    fn node_name(&mut self) -> Option<PeerName> {
        let Some(node) = given(&self.args.node_name) else {
            let conflict = "not given; --kubernetes needs the name of the Node (fieldRef spec.nodeName)";
            self.refuse("--node-name", "", conflict);
            return None;
        };
        let node: PeerName = self.parse("--node-name", node)?;
        if let Some(name) = given(&self.args.name)
            && !name.eq_ignore_ascii_case(node.as_str())
        {
            self.refuse("--name", name, format!("not the name of the Node, {node}; leave it out"));
        }
        Some(node)
    }

    fn listen(&mut self) -> Option<SocketAddr> {
        let Some(text) = given(&self.args.listen) else {
            let any: IpAddr =
                if self.host.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            return Some(SocketAddr::new(any, CONTROL_PORT));
        };
        let listen: SocketAddr = self.socket_address("--listen", text)?;
        if listen.port() == 0 {
            self.refuse("--listen", text, "peers must know the port: name one, such as 6783");
        }
        if listen.is_ipv6() && !self.host.ipv6 {
            self.refuse("--listen", text, "IPv6 is off on this host; use 0.0.0.0 or an IPv4 address");
        } else if !listen.ip().is_unspecified() && self.host.device_of(listen.ip()).is_none() {
            let conflict = format!("not an address of this host, which has {}", self.own_addresses());
            self.refuse("--listen", text, conflict);
        }
        Some(listen)
    }

    fn peers(
        &mut self,
        name: Option<&PeerName>,
        listen: Option<SocketAddr>,
        universe: Option<Universe>,
    ) -> Vec<PeerAddress> {
        let port = listen.map_or(CONTROL_PORT, |listen| listen.port());
        let host = self.host;
        let is_us = |peer: &PeerAddress| {
            let named = |own: &str| peer.host.eq_ignore_ascii_case(own);
            let addressed = |ip: IpAddr| ip.is_loopback() || host.device_of(ip).is_some();
            let us = match peer.host.parse() {
                Ok(ip) => addressed(ip),
                Err(_) => {
                    named(&host.host_name)
                        || named("localhost")
                        || name.is_some_and(|name| named(name.as_str()))
                }
            };
            us && peer.port == port
        };
        let mut peers: Vec<PeerAddress> = Vec::new();
        let (mut given, before) = (0, self.errors.len());
        for text in items(&self.args.peer) {
            let Some(peer) = self.parse::<PeerAddress>("--peer", text) else { continue };
            given += 1;
            if let (Some(universe), Ok(ip)) = (universe, peer.host.parse())
                && universe.contains(ip)
            {
                let conflict = format!("inside --universe {universe}; peers are called on the underlay");
                self.refuse("--peer", text, conflict);
            } else if !is_us(&peer) && !peers.contains(&peer) {
                peers.push(peer);
            }
        }
        if given > 0 && peers.is_empty() && self.errors.len() == before {
            let conflict = "this is only ourselves; name another node, or leave --peer out on the first one";
            let value = items(&self.args.peer).collect::<Vec<_>>().join(",");
            self.refuse("--peer", &value, conflict);
        }
        peers
    }

    fn ipam_seed(&mut self) -> (Vec<PeerName>, Seeding) {
        let given: Vec<_> = items(&self.args.ipam_seed).collect();
        if given == ["observer"] {
            return (Vec::new(), Seeding::Observer);
        }
        if let [text] = given.as_slice()
            && let Some(count) = text.strip_prefix("consensus=")
        {
            let voters = count.parse().ok().filter(|count| (1..=MOST_NAMES).contains(count));
            if voters.is_none() {
                let why = format!("how many nodes vote is a number from 1 to {MOST_NAMES}");
                self.refuse("--ipam-seed", text, why);
            }
            return (Vec::new(), Seeding::Consensus(voters.unwrap_or(1)));
        }
        let mut seed: Vec<PeerName> = Vec::new();
        for text in given {
            let Some(name) = self.parse::<PeerName>("--ipam-seed", text) else { continue };
            if seed.contains(&name) {
                self.refuse("--ipam-seed", text, "named twice; each node has one share of the universe");
            } else {
                seed.push(name);
            }
        }
        (seed, Seeding::Given)
    }

    fn kubernetes(&mut self) -> Option<Kubernetes> {
        let args = self.args;
        if args.ipam == Ipam::Podcidr && !args.kubernetes {
            self.refuse("--ipam", "podcidr", "only with --kubernetes: Nodes have such ranges");
        }
        if args.ipam == Ipam::Podcidr && items(&args.ipam_seed).next().is_some() {
            self.refuse("--ipam-seed", "", "with --ipam podcidr the cluster shares the universe out");
        }
        if !args.kubernetes {
            return None;
        }
        let namespace = args.pod_namespace.trim();
        let is_label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if namespace.is_empty() || namespace.len() > 63 || !namespace.chars().all(is_label) {
            self.refuse("--pod-namespace", namespace, "not the name of a namespace");
        }
        let kubeconfig = match given(&args.kubeconfig) {
            Some(text) => Some(self.absolute("--kubeconfig", text)?),
            None => None,
        };
        Some(Kubernetes { namespace: namespace.into(), kubeconfig })
    }

    /// None with `--insecure`, and where it is refused.
    fn identity(&mut self) -> Option<Source> {
        let args = self.args;
        let dir = given(&args.ca_dir);
        let files = [
            ("--tls-ca", given(&args.tls_ca)),
            ("--tls-cert", given(&args.tls_cert)),
            ("--tls-key", given(&args.tls_key)),
        ];
        match (dir, files.iter().any(|(_, file)| file.is_some()), args.insecure) {
            (None, false, true) => None,
            (Some(dir), false, false) => self.absolute("--ca-dir", dir).map(Source::CaDir),
            (None, true, false) => {
                let [ca, cert, key] = files.map(|(flag, file)| match file {
                    Some(path) => self.absolute(flag, path),
                    None => {
                        let conflict = "not given; --tls-ca, --tls-cert and --tls-key belong together";
                        self.refuse(flag, "", conflict);
                        None
                    }
                });
                let retired = given(&args.tls_retired_ca);
                let retired = retired.and_then(|file| self.absolute("--tls-retired-ca", file));
                Some(Source::Files { ca: ca?, cert: cert?, key: key?, retired })
            }
            (None, false, false) if args.kubernetes => {
                Some(Source::CaDir(cluster_keys_in(&PathBuf::from(&args.run_dir))))
            }
            (None, false, false) => {
                self.refuse("--ca-dir", "", NO_KEYS);
                None
            }
            _ => {
                let conflict = "only one of --ca-dir, the three --tls flags, and --insecure can be in use";
                self.refuse("--ca-dir", dir.unwrap_or_default(), conflict);
                None
            }
        }
    }

    fn data_threads(&mut self) -> Option<NonZeroUsize> {
        match given(&self.args.data_threads) {
            Some(text) => self.count("--data-threads", text, 1..=255),
            None => NonZeroUsize::new(self.host.cores.clamp(1, 255)),
        }
    }

    fn poll(&mut self) -> Option<Duration> {
        let text = &self.args.poll_us;
        let poll = text.parse().ok().map(Duration::from_micros).filter(|poll| *poll <= LONGEST_POLL);
        if poll.is_none() {
            let range = format!("not a number of microseconds from 0 to {}", LONGEST_POLL.as_micros());
            self.refuse("--poll-us", text, range);
        }
        poll
    }

    fn policy_log(&mut self) -> Option<u16> {
        let text = self.args.policy_log.as_ref().filter(|text| !text.trim().is_empty())?;
        let group = text.trim().parse().ok();
        if group.is_none() {
            self.refuse("--policy-log", text, "not a number from 0 to 65535");
        }
        group
    }

    fn no_masquerade(&mut self) -> Vec<Prefix> {
        let mut prefixes: Vec<Prefix> = Vec::new();
        for text in items(&self.args.no_masquerade) {
            // One address stands for its full-length prefix.
            let parsed = text.parse::<Prefix>().or_else(|_| text.parse::<IpAddr>().map(Prefix::from));
            match parsed {
                Ok(prefix) if prefix.trunc() != prefix => {
                    let conflict = format!("not a network address; did you mean {}?", prefix.trunc());
                    self.refuse("--no-masquerade", text, conflict);
                }
                Ok(prefix) if prefixes.contains(&prefix) => {}
                Ok(prefix) => prefixes.push(prefix),
                Err(_) => self.refuse("--no-masquerade", text, "not a prefix; example: 192.0.2.0/24"),
            }
        }
        prefixes
    }

    fn directories(&mut self) -> [Option<PathBuf>; 3] {
        let args = self.args;
        let state = self.absolute("--state-dir", &args.state_dir);
        let run = self.absolute("--run-dir", &args.run_dir);
        let cni = given(&args.cni_conf_dir).and_then(|text| self.absolute("--cni-conf-dir", text));
        if let Some(run) = &run
            && socket_in(run).as_os_str().len() > SOCKET_PATH_LIMIT
        {
            let conflict = format!("too long: a socket's path has at most {SOCKET_PATH_LIMIT} bytes");
            self.refuse("--run-dir", &args.run_dir, conflict);
        }
        if let (Some(state), Some(run)) = (&state, &run)
            && state == run
        {
            let conflict =
                "the same as --run-dir; what is in one outlives a reboot, what is in the other must not";
            self.refuse("--state-dir", &args.state_dir, conflict);
        }
        [state, run, cni]
    }

    fn absolute(&mut self, flag: &'static str, text: &str) -> Option<PathBuf> {
        let path = PathBuf::from(text);
        if !path.is_absolute() {
            self.refuse(flag, text, "not an absolute path");
            return None;
        }
        Some(path)
    }

    fn metrics(&mut self, listen: Option<SocketAddr>) -> Option<SocketAddr> {
        let text = &self.args.metrics_addr;
        let metrics = self.socket_address("--metrics-addr", text)?;
        if let Some(listen) = listen
            && listen.port() == metrics.port()
            && (listen.ip() == metrics.ip() || listen.ip().is_unspecified() || metrics.ip().is_unspecified())
        {
            self.refuse("--metrics-addr", text, format!("the same port as --listen {listen}"));
        }
        Some(metrics)
    }

    fn log(&mut self) {
        if let Err(error) = EnvFilter::try_new(&self.args.log) {
            let conflict = format!("{error}; examples: info, debug, info,weft::mesh=debug");
            self.refuse("--log", &self.args.log, conflict);
        }
    }

    fn socket_address(&mut self, flag: &'static str, text: &str) -> Option<SocketAddr> {
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.refuse(flag, text, "not ADDR:PORT; examples: 0.0.0.0:6783, 192.0.2.1:6783, [::]:6783");
        }
        parsed
    }

    fn count(
        &mut self,
        flag: &'static str,
        text: &str,
        range: RangeInclusive<usize>,
    ) -> Option<NonZeroUsize> {
        let count = text.parse().ok().filter(|count: &NonZeroUsize| range.contains(&count.get()));
        if count.is_none() {
            self.refuse(flag, text, format!("not a number from {} to {}", range.start(), range.end()));
        }
        count
    }

    fn parse<T: FromStr<Err: Display>>(&mut self, flag: &'static str, text: &str) -> Option<T> {
        // These errors cite what they are about.
        text.parse().map_err(|error: T::Err| self.refuse(flag, "", error.to_string())).ok()
    }

    fn refuse(&mut self, flag: &'static str, value: &str, conflict: impl Into<String>) {
        self.errors.push(ConfigError { flag, value: value.into(), conflict: conflict.into() });
    }

    fn own_addresses(&self) -> String {
        let own = self.host.addresses.iter().filter(|a| !a.is_ours() && is_global(a.ip()));
        let list: Vec<_> = own.map(|a| format!("{} on {}", a.ip(), a.device)).collect();
        if list.is_empty() { "no address but loopback".into() } else { list.join(", ") }
    }
}

/// An empty variable in the environment is the same as none.
fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.trim().is_empty())
}

fn items(list: &[String]) -> impl Iterator<Item = &str> {
    list.iter().map(|text| text.trim()).filter(|text| !text.is_empty())
}

const NO_KEYS: &str = "this node has no keys: it would not know its peers, nor they it. Make a CA once with \
    `weft ca init DIR` and give every node --ca-dir DIR with a copy of it; or give each the --tls-ca, --tls-cert and --tls-key \
    that `weft ca issue` makes; or, where nobody else can reach these ports, run all of them with --insecure";
/// To look for packets longer than that saves nothing more.
const LONGEST_POLL: Duration = Duration::from_millis(10);
/// Bytes of `sockaddr_un.sun_path` before its final NUL (unix(7)).
const SOCKET_PATH_LIMIT: usize = 107;

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
