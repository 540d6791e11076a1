//! The flags of `weft agent` as the command line and the environment give them: text, not yet checked.

use clap::ValueEnum;
use std::path::PathBuf;

/// What `weft agent` was asked for. Every flag has a twin in the environment, `WEFT_` and its name in capitals;
/// lists are comma separated there. A flag beats its twin; an empty twin is the same as none.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Name of this node among its peers
    ///
    /// Unique in the network: letters, digits, `-`, `.` and `_`, compared in lower case.
    /// A second agent with the name of one that is alive refuses to run.
    ///
    /// Default: the host name.
    #[arg(long, env = "WEFT_NAME", hide_env_values = true, value_name = "NAME", help_heading = NODE)]
    pub name: Option<String>,

    /// Underlay address at which peers reach this node, for control (TCP) and data (UDP) alike
    ///
    /// Repeat it, or separate by commas, for several; best first. It must be an address of this host, outside the universe.
    /// The port is that of --listen if not given.
    ///
    /// Default: the address of the default route's interface, also when it becomes another one.
    ///
    /// Examples: `192.0.2.1`, `192.0.2.1:6783`, `[2001:db8::1]:6783`
    #[arg(long, env = "WEFT_ADVERTISE", hide_env_values = true, value_name = "ADDR[:PORT]", value_delimiter = ',', help_heading = NODE)]
    pub advertise: Vec<String>,

    /// Address and port to listen on: TCP for control, UDP with the same number for data
    ///
    /// Default: `[::]:6783`, all addresses of both families; `0.0.0.0:6783` where IPv6 is off.
    #[arg(long, env = "WEFT_LISTEN", hide_env_values = true, value_name = "ADDR:PORT", help_heading = NODE)]
    pub listen: Option<String>,

    /// A peer to join through; one is enough, the others are learned from it
    ///
    /// Repeat it, or separate by commas. Names are resolved anew at each attempt, to all their addresses.
    /// This node itself may be in the list, so that all nodes can have the same one. The port is 6783 if not given.
    ///
    /// Default: none; the node waits to be called.
    ///
    /// Examples: node-2, 192.0.2.2:6783, weft-peers.kube-system.svc
    #[arg(long, env = "WEFT_PEER", hide_env_values = true, value_name = "HOST[:PORT]", value_delimiter = ',', help_heading = NODE)]
    pub peer: Vec<String>,

    /// Most control links that this agent keeps, 4 to 64
    ///
    /// Up to 16 nodes are linked each to each; beyond, about twice the binary logarithm of their number suffices.
    /// Data needs no links.
    #[arg(long, env = "WEFT_MAX_LINKS", hide_env_values = true, value_name = "COUNT", default_value = "32", help_heading = NODE)]
    pub max_links: String,

    /// The whole overlay range, from which every pod of every node gets its address
    ///
    /// The same on all nodes, a network address, and free of the host's routes and of the service range.
    #[arg(long, env = "WEFT_UNIVERSE", hide_env_values = true, value_name = "CIDR", default_value = "10.32.0.0/12", help_heading = ADDRESSES)]
    pub universe: String,

    /// Names of the nodes that share the universe at the very start, in equal parts
    ///
    /// The same list on all nodes. Nodes that come later are not in it: they ask their peers for addresses.
    ///
    /// Or `consensus=N`, the same on N nodes at the most: as soon as more than half of them have met they agree who shares it, which
    /// may then be fewer than N. Or `observer`: this node never has addresses, nor pods; it gossips, and shows everything.
    /// What a network has begun with counts for ever, whatever is said later.
    ///
    /// Default: none; this node joins an existing network.
    ///
    /// Examples: `node-1,node-2,node-3`, `consensus=3`
    #[arg(long, env = "WEFT_IPAM_SEED", hide_env_values = true, value_name = "NAME,...", value_delimiter = ',', help_heading = ADDRESSES)]
    pub ipam_seed: Vec<String>,

    /// Whence this node's addresses come: the ring that agents share, or the Node's spec.podCIDRs
    ///
    /// The same on all nodes. With `podcidr` the universe is the cluster's CIDR.
    #[arg(long, env = "WEFT_IPAM", hide_env_values = true, value_name = "MODE", default_value = "ring", help_heading = ADDRESSES)]
    pub ipam: Ipam,

    /// Answer /livez and /readyz on this unix socket, too
    ///
    /// While an agent takes over, both may answer on --metrics-addr; this socket is the process's own. See `weft probe`.
    ///
    /// Default: none.
    #[arg(long, env = "WEFT_PROBE_SOCKET", hide_env_values = true, value_name = "PATH", help_heading = NODE)]
    pub probe_socket: Option<PathBuf>,

    /// Take over from the agent that runs on this node, if one does, without losing a packet
    ///
    /// Sockets, sessions and what peers know go over, then the other agent ends (with --kubernetes it waits to be ended).
    /// Name, universe, addresses to listen on and encryption must be the same; the new number of --data-threads has to
    /// wait for a stop and start. If the new agent fails on the way, start it again.
    #[arg(long, env = "WEFT_TAKEOVER", hide_env_values = true, value_parser = clap::builder::FalseyValueParser::new(), help_heading = NODE)]
    pub takeover: bool,

    /// Run as a part of a Kubernetes cluster: peers are its Nodes, the first agent has the universe and makes the CA
    ///
    /// ConfigMap weft-seed and Secret weft-ca must be there, empty, as the manifests ship them. Neither --peer, --ipam-seed
    /// nor keys are needed then; what is given counts all the same.
    #[arg(long, env = "WEFT_KUBERNETES", hide_env_values = true, value_parser = clap::builder::FalseyValueParser::new(), help_heading = KUBERNETES)]
    pub kubernetes: bool,

    /// Name of the Node that this agent runs on: spec.nodeName, by the downward API
    #[arg(long, env = "WEFT_NODE_NAME", hide_env_values = true, value_name = "NAME", help_heading = KUBERNETES)]
    pub node_name: Option<String>,

    /// Namespace of ConfigMap and Secret: metadata.namespace, by the downward API
    #[arg(long, env = "WEFT_POD_NAMESPACE", hide_env_values = true, value_name = "NAME", default_value = "kube-system", help_heading = KUBERNETES)]
    pub pod_namespace: String,

    /// File that says where the API server is and who we are, for an agent that is no pod
    ///
    /// Default: the pod's service account.
    #[arg(long, env = "WEFT_KUBECONFIG", hide_env_values = true, value_name = "FILE", help_heading = KUBERNETES)]
    pub kubeconfig: Option<String>,

    /// Directory of the network's CA, ca.crt and ca.key, of which this node issues its own certificate
    ///
    /// Made once by `weft ca init` and copied to all nodes. Who can read ca.key can be any node: where that is too much, use
    /// the --tls flags. ca.crt may hold several CAs, all of which are believed. Changed files are taken up at once.
    #[arg(long, env = "WEFT_CA_DIR", hide_env_values = true, value_name = "DIR", help_heading = SECURITY)]
    pub ca_dir: Option<String>,

    /// File of the CAs that are believed, in PEM; several while one is replaced by another
    #[arg(long, env = "WEFT_TLS_CA", hide_env_values = true, value_name = "FILE", help_heading = SECURITY)]
    pub tls_ca: Option<String>,

    /// File of CAs of before, in PEM: no link of theirs is taken, but what was signed under them and is kept counts
    ///
    /// Beside ca.crt in --ca-dir it is retired.crt.
    #[arg(long, env = "WEFT_TLS_RETIRED_CA", hide_env_values = true, value_name = "FILE", help_heading = SECURITY)]
    pub tls_retired_ca: Option<String>,

    /// File of this node's certificate, in PEM; its DNS name is the node's name
    ///
    /// `weft ca issue` makes one, or whatever else signs certificates. Changed files are taken up at once.
    #[arg(long, env = "WEFT_TLS_CERT", hide_env_values = true, value_name = "FILE", help_heading = SECURITY)]
    pub tls_cert: Option<String>,

    /// File of the certificate's private key, in PEM: ECDSA P-256 or Ed25519
    #[arg(long, env = "WEFT_TLS_KEY", hide_env_values = true, value_name = "FILE", help_heading = SECURITY)]
    pub tls_key: Option<String>,

    /// Run without keys: links are in clear, and anybody who reaches the port can be any node
    #[arg(long, env = "WEFT_INSECURE", hide_env_values = true, value_parser = clap::builder::FalseyValueParser::new(), help_heading = SECURITY)]
    pub insecure: bool,

    /// The pods' MTU in bytes, from 576 (1280 with an IPv6 universe) to what the underlay carries
    ///
    /// Default: the smallest MTU of the advertised addresses' interfaces, less 60 bytes (80 on an IPv6 underlay) for
    /// encapsulation: 1440 on Ethernet.
    #[arg(long, env = "WEFT_MTU", hide_env_values = true, value_name = "BYTES", help_heading = NETWORK)]
    pub mtu: Option<String>,

    /// Whether pods' packets are sealed between nodes
    ///
    /// Nodes that differ in it exchange no packets, and `weft status` says so.
    #[arg(long, env = "WEFT_ENCRYPTION", hide_env_values = true, value_name = "MODE", default_value = "required", help_heading = NETWORK)]
    pub encryption: Encryption,

    /// Threads that move packets, 1 to 255
    ///
    /// Default: one for each core.
    #[arg(long, env = "WEFT_DATA_THREADS", hide_env_values = true, value_name = "COUNT", help_heading = NETWORK)]
    pub data_threads: Option<String>,

    /// How many microseconds a data thread looks for more packets after work before it sleeps
    ///
    /// Waking up costs more time than a packet's whole way: a longer look answers sooner and takes more of a core while
    /// there is traffic. An idle agent sleeps in any case. 0 turns it off.
    #[arg(long, env = "WEFT_POLL_US", hide_env_values = true, value_name = "MICROSECONDS", default_value = "100", help_heading = NETWORK)]
    pub poll_us: String,

    /// Whether Weft turns on IP forwarding for the underlay's interfaces
    ///
    /// Without it the answers to pods that talk to the outside do not come back. `off` if something else sees to it.
    #[arg(long, env = "WEFT_UNDERLAY_FORWARDING", hide_env_values = true, value_name = "ON|OFF", default_value = "on", help_heading = NETWORK)]
    pub underlay_forwarding: Switch,

    /// A destination outside the universe that sees the pods' own addresses instead of the node's
    ///
    /// Repeat it, or separate by commas. That network needs a way back to the universe.
    ///
    /// Example: 192.0.2.0/24
    #[arg(long, env = "WEFT_NO_MASQUERADE", hide_env_values = true, value_name = "CIDR", value_delimiter = ',', help_heading = NETWORK)]
    pub no_masquerade: Vec<String>,

    /// Whether NetworkPolicy objects are enforced
    ///
    /// In a cluster they come from the API server, elsewhere from `weft policy apply`. `off` if something else enforces them.
    #[arg(long, env = "WEFT_NETWORK_POLICY", hide_env_values = true, value_name = "ON|OFF", default_value = "on", help_heading = NETWORK)]
    pub network_policy: Switch,

    /// Whether ClusterNetworkPolicy objects (policy.networking.k8s.io/v1alpha2) are enforced, too
    ///
    /// In a cluster they need their CRD. Rules with peers by nodes or domainNames fail closed.
    #[arg(long, env = "WEFT_CLUSTER_NETWORK_POLICY", hide_env_values = true, value_name = "ON|OFF", default_value = "off", help_heading = NETWORK)]
    pub cluster_network_policy: Switch,

    /// NFLOG group to which packets are logged that policies drop, 10 a second for each set of policies, 0 to 65535
    ///
    /// Default: none; they are only counted.
    #[arg(long, env = "WEFT_POLICY_LOG", hide_env_values = true, value_name = "GROUP", help_heading = NETWORK)]
    pub policy_log: Option<String>,

    /// Directory of what outlives a reboot: identity, ring, allocations
    #[arg(long, env = "WEFT_STATE_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_STATE_DIR, help_heading = FILES)]
    pub state_dir: String,

    /// Directory of what does not outlive a reboot: the local socket, attachments
    ///
    /// The command line looks for the agent's socket here: give it the same directory.
    #[arg(long, env = "WEFT_RUN_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR, help_heading = FILES)]
    pub run_dir: String,

    /// Directory to which the CNI configuration is written once the agent is ready
    ///
    /// Default: none; it is not written.
    ///
    /// Example: /etc/cni/net.d
    #[arg(long, env = "WEFT_CNI_CONF_DIR", hide_env_values = true, value_name = "DIR", help_heading = FILES)]
    pub cni_conf_dir: Option<String>,

    /// Address and port of /livez, /readyz and /metrics, over HTTP
    #[arg(long, env = "WEFT_METRICS_ADDR", hide_env_values = true, value_name = "ADDR:PORT", default_value = "127.0.0.1:6782", help_heading = DIAGNOSTICS)]
    pub metrics_addr: String,

    /// What log lines look like, on standard error
    #[arg(long, env = "WEFT_LOG_FORMAT", hide_env_values = true, value_name = "FORMAT", default_value = "text", help_heading = DIAGNOSTICS)]
    pub log_format: LogFormat,

    /// Which log lines are written: a level, or levels by module
    ///
    /// Levels: error, warn, info, debug, trace.
    ///
    /// Examples: `debug`, `info,weft::mesh=debug`
    #[arg(long, env = "WEFT_LOG", hide_env_values = true, value_name = "FILTER", default_value = "info", help_heading = DIAGNOSTICS)]
    pub log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ipam {
    /// Agents share the universe out among themselves
    Ring,
    /// Each node has the ranges that the cluster allocated to it
    Podcidr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Encryption {
    /// Sealed, or not at all
    Required,
    /// In clear: whoever sees the underlay reads and forges them
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// Where the agent's socket is unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/weft";
pub const DEFAULT_RUN_DIR: &str = "/run/weft";

const EXAMPLES: &str = "\
Every flag can be given in the environment too, as WEFT_ and its name in capitals; the flag wins.

Examples:
  Once for a network, then copied to all its nodes:
    weft ca init /etc/weft/ca
  The first three nodes, each with the same list:
    weft agent --ca-dir /etc/weft/ca --ipam-seed node-1,node-2,node-3 --peer node-1,node-2,node-3
  A node that joins them; one peer is enough:
    weft agent --ca-dir /etc/weft/ca --peer node-2
  A host with two interfaces, whose pods are to use the second:
    weft agent --ca-dir /etc/weft/ca --peer node-2 --advertise 198.51.100.1
  In a DaemonSet, with WEFT_NODE_NAME in its environment:
    weft agent --kubernetes";

const NODE: &str = "Node and peers";
const ADDRESSES: &str = "Addresses";
const KUBERNETES: &str = "Kubernetes";
const SECURITY: &str = "Keys";
const NETWORK: &str = "Network";
const FILES: &str = "Files";
const DIAGNOSTICS: &str = "Health and logs";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[derive(Parser)]
    struct Agent {
        #[command(flatten)]
        _args: Args,
    }

    #[test]
    fn every_flag_has_a_twin_in_the_environment_and_a_heading() {
        Agent::command().debug_assert();
        let command = Agent::command();
        let flags: Vec<_> = command.get_arguments().filter(|arg| arg.get_help_heading().is_some()).collect();
        assert_eq!(flags.len(), 35);
        for flag in flags {
            let long = flag.get_long().expect("long");
            let twin = format!("WEFT_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(flag.get_env().and_then(|name| name.to_str()), Some(&*twin), "{long}");
        }
    }

    #[test]
    fn short_help_has_a_line_for_each_flag() {
        let help = Agent::command().term_width(160).render_help().to_string();
        for heading in [NODE, ADDRESSES, KUBERNETES, SECURITY, NETWORK, FILES, DIAGNOSTICS] {
            assert!(help.contains(heading), "{heading}\n{help}");
        }
        assert!(help.contains("[default: 10.32.0.0/12]"), "{help}");
        assert!(help.contains("[env: WEFT_IPAM_SEED]"), "{help}");
    }
}
