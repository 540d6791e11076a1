//! What the commands show. These are the shapes of `--json`: names stay, fields may be added.
//!
//! * `weft status --json`: [`Status`]
//! * `weft peers --json`: [`Peers`]
//! * `weft ipam --json`: [`Ipam`]
//! * `weft pods --json`: [`Pods`]
//! * `weft report --json`: [`Report`]
//! * `weft policy list --json`: [`Policies`]
//! * `weft policy explain --json`: [`Explanation`]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use serde::Serialize;
use std::collections::BTreeMap;
use weft_proto::local;

#[derive(Debug, Serialize)]
pub(super) struct Status {
    pub name: String,
    /// Microseconds since 1970 at the agent's start, or more.
    pub incarnation: u64,
    pub software: String,
    pub universe: String,
    /// `address:port`, best first.
    pub endpoints: Vec<String>,
    /// `off` or `required`.
    pub encryption: String,
    pub ready: bool,
    pub not_ready: Vec<String>,
    pub warnings: Vec<String>,
    /// Other nodes known.
    pub peers: u32,
    /// Control links that are up.
    pub links: u32,
    pub pods: u32,
    /// Of the pods, in bytes.
    pub mtu: u32,
    /// null: none yet.
    pub bridge_address: Option<String>,
    pub addresses_owned: u64,
    pub addresses_free: u64,
    pub uptime_seconds: u64,
    /// `packets_sent`, `bytes_sent`, `packets_received`, `bytes_received`, `repairs`, and `drops/…`, `gossip/…`.
    pub counters: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Policies {
    pub policies: Vec<Policy>,
}

#[derive(Debug, Serialize)]
pub(super) struct Policy {
    /// `namespace/name`.
    pub name: String,
    /// It isolates pods for what comes in, for what goes out.
    pub ingress: bool,
    pub egress: bool,
    /// Of this node, those that it isolates.
    pub pods: Vec<String>,
    /// First packets of connections that it has let begin.
    pub allowed: u64,
    /// Packets dropped of pods that it isolates and no policy let through.
    pub denied: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Explanation {
    pub allowed: bool,
    pub source: String,
    pub destination: String,
    /// What decides at the source, at the destination.
    pub egress: String,
    pub ingress: String,
    pub caveats: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Peers {
    pub peers: Vec<Peer>,
}

#[derive(Debug, Serialize)]
pub(super) struct Peer {
    pub name: String,
    pub endpoints: Vec<String>,
    pub software: String,
    /// This node.
    pub me: bool,
    /// A control link is up; links are not routes.
    pub linked: bool,
    /// `local`, `direct`, `relayed`, `down`.
    pub path: String,
    /// Who relays.
    pub via: Option<String>,
    /// Why it is down.
    pub why: Option<String>,
    /// Mean round trip in µs.
    pub rtt_us: Option<u32>,
    /// Part of the latest probes that were lost, 0 to 1.
    pub loss: Option<f32>,
    /// Bytes.
    pub mtu: u32,
    /// Addresses that it owns.
    pub addresses: u64,
    pub packets_sent: u64,
    pub bytes_sent: u64,
    pub packets_received: u64,
    pub bytes_received: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Ipam {
    pub universe: String,
    /// What this node waits for while it owns nothing; else null.
    pub waiting_for: Option<String>,
    pub ranges: Vec<Range>,
}

#[derive(Debug, Serialize)]
pub(super) struct Range {
    pub prefix: String,
    pub owner: String,
    /// This node is the owner.
    pub mine: bool,
    /// Addresses handed out; null for ranges of others, who alone know.
    pub allocated: Option<u64>,
    /// Addresses freed a moment ago and not handed out yet; null as above.
    pub resting: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Pods {
    pub pods: Vec<Pod>,
}

#[derive(Debug, Serialize)]
pub(super) struct Pod {
    /// Empty where the runtime did not tell, as `name` and `uid`.
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub container_id: String,
    pub ifname: String,
    pub addresses: Vec<String>,
    /// The host's end of its veth.
    pub host_interface: String,
    /// `reserved` or `active`.
    pub state: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Of this command; the agent's is in `status`.
    pub software: String,
    pub kernel: String,
    pub status: Status,
    pub peers: Vec<Peer>,
    pub ipam: Ipam,
    pub pods: Vec<Pod>,
}

impl From<local::StatusReply> for Status {
    fn from(reply: local::StatusReply) -> Self {
        Self {
            name: reply.name,
            incarnation: reply.incarnation,
            software: reply.software,
            universe: reply.universe,
            endpoints: reply.endpoints,
            encryption: reply.encryption,
            ready: reply.ready,
            not_ready: reply.not_ready,
            warnings: reply.warnings,
            peers: reply.peers,
            links: reply.links,
            pods: reply.pods,
            mtu: reply.mtu,
            bridge_address: some(reply.bridge_address),
            addresses_owned: reply.addresses_owned,
            addresses_free: reply.addresses_free,
            uptime_seconds: reply.uptime_seconds,
            counters: reply.counters.into_iter().map(|counter| (counter.name, counter.value)).collect(),
        }
    }
}

impl From<local::PeersReply> for Peers {
    fn from(reply: local::PeersReply) -> Self {
        let peer = |peer: local::Peer| Peer {
            name: peer.name,
            endpoints: peer.endpoints,
            software: peer.software,
            me: peer.me,
            linked: peer.linked,
            path: peer.path,
            via: Some(peer.via).filter(|via| !via.is_empty()),
            why: Some(peer.why).filter(|why| !why.is_empty()),
            rtt_us: (peer.rtt_us != 0).then_some(peer.rtt_us),
            loss: peer.loss,
            mtu: peer.mtu,
            addresses: peer.addresses,
            packets_sent: peer.packets_sent,
            bytes_sent: peer.bytes_sent,
            packets_received: peer.packets_received,
            bytes_received: peer.bytes_received,
        };
        Self { peers: reply.peers.into_iter().map(peer).collect() }
    }
}

impl From<local::IpamReply> for Ipam {
    fn from(reply: local::IpamReply) -> Self {
        let range = |range: local::Range| Range {
            prefix: range.prefix,
            owner: range.owner,
            mine: range.mine,
            allocated: range.mine.then_some(range.allocated),
            resting: range.mine.then_some(range.resting),
        };
        Self {
            universe: reply.universe,
            waiting_for: some(reply.waiting_for),
            ranges: reply.ranges.into_iter().map(range).collect(),
        }
    }
}

impl From<local::PodsReply> for Pods {
    fn from(reply: local::PodsReply) -> Self {
        let entry = |entry: local::PodEntry| {
            let (pod, attachment) = (entry.pod.unwrap_or_default(), entry.attachment.unwrap_or_default());
            Pod {
                namespace: pod.namespace,
                name: pod.name,
                uid: pod.uid,
                container_id: attachment.container_id,
                ifname: attachment.ifname,
                addresses: entry.addresses,
                host_interface: entry.host_interface,
                state: entry.state,
            }
        };
        Self { pods: reply.pods.into_iter().map(entry).collect() }
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl From<local::PolicyListReply> for Policies {
    fn from(reply: local::PolicyListReply) -> Self {
        let policy = |it: local::PolicyEntry| {
            let local::PolicyEntry { name, ingress, egress, pods, allowed, denied } = it;
            Policy { name, ingress, egress, pods, allowed, denied }
        };
        Self { policies: reply.policies.into_iter().map(policy).collect() }
    }
}

impl From<local::PolicyExplainReply> for Explanation {
    fn from(reply: local::PolicyExplainReply) -> Self {
        let local::PolicyExplainReply { allowed, source, destination, egress, ingress, caveats } = reply;
        Self { allowed, source, destination, egress, ingress, caveats }
    }
}
