//! Pods, namespaces and policies, as far as they decide who may talk.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::selector::{Labels, Selector};
use crate::types::Prefix;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt, net::IpAddr, str::FromStr};

/// `metadata.uid`: tells an object from a later one of the same name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Uid(pub String);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    pub uid: Uid,
    pub name: String,
    pub labels: Labels,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The object's first, then other names of it: a static pod has one of its own on the node.
    pub uids: Vec<Uid>,
    pub namespace: String,
    pub name: String,
    pub labels: Labels,
    pub addresses: BTreeSet<IpAddr>,
    pub ports: Vec<ContainerPort>,
    /// False of a pod that has completed, or that is in its node's network: no policy sees it.
    pub matchable: bool,
}

/// A port that has a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerPort {
    pub name: String,
    pub protocol: Protocol,
    pub number: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub uid: Uid,
    pub id: PolicyId,
    /// Of the pods of its namespace, those that it isolates.
    pub subject: Selector,
    /// None: the policy does not concern this direction.
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

/// For the whole cluster: decides before the policies of a namespace, or where there are none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPolicy {
    pub uid: Uid,
    pub name: String,
    pub tier: Tier,
    /// From 0 to 1000; the lower one is asked first.
    pub priority: u16,
    /// The pods that it is for.
    pub subject: PodPeer,
    /// The first one that matches decides. Without any the policy does not concern this direction.
    pub ingress: Vec<ClusterRule>,
    pub egress: Vec<ClusterRule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tier {
    Admin,
    Baseline,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRule {
    pub name: String,
    pub action: Action,
    pub matching: Rule,
    /// What in it is not known here, for which reason it fails closed: it accepts nothing, or denies everything.
    pub unknown: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    Accept,
    Deny,
    /// On to the next tier.
    Pass,
}

/// `namespace/name`; `name` of a policy for the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyId {
    /// Empty for the whole cluster.
    pub namespace: String,
    pub name: String,
}

/// What may come or go: any of the peers on any of the ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// None: everybody.
    pub peers: Option<Vec<Peer>>,
    /// None: whatever the protocol.
    pub ports: Option<Vec<Port>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Peer {
    Pods(PodPeer),
    Block(Block),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodPeer {
    pub namespaces: Namespaces,
    pub pods: Selector,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Namespaces {
    /// The policy's own.
    Named(String),
    Selected(Selector),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "BlockText", try_from = "BlockText")]
pub struct Block {
    /// Without host bits, as the exceptions.
    pub cidr: Prefix,
    pub except: BTreeSet<Prefix>,
}

/// As a file has it.
#[derive(Serialize, Deserialize)]
struct BlockText {
    cidr: String,
    except: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    pub protocol: Protocol,
    pub wanted: Wanted,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    Any,
    /// Both ends included.
    Range(u16, u16),
    /// The destination pod's port of that name and the rule's protocol.
    Named(String),
}

/// Which end's policies are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    Ingress,
    Egress,
}

/// Who begins to talk to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub to: Service,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    Port(Protocol, u16),
    /// A protocol that knows no ports, or none that policies know.
    Other,
}

impl Policy {
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }

    /// Whether it isolates a pod in some direction.
    pub fn selects(&self, pod: &Pod) -> bool {
        self.id.namespace == pod.namespace && self.subject.matches(&pod.labels)
    }
}

impl ClusterPolicy {
    pub fn rules(&self, direction: Direction) -> &[ClusterRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    pub fn id(&self) -> PolicyId {
        PolicyId { namespace: String::new(), name: self.name.clone() }
    }
}

impl PolicyId {
    pub fn kind(&self) -> &'static str {
        if self.namespace.is_empty() { "ClusterNetworkPolicy" } else { "NetworkPolicy" }
    }
}

impl Block {
    pub fn contains(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address) && !self.except.iter().any(|except| except.contains(&address))
    }
}

impl From<Block> for BlockText {
    fn from(block: Block) -> Self {
        Self { cidr: block.cidr.to_string(), except: block.except.iter().map(Prefix::to_string).collect() }
    }
}

impl TryFrom<BlockText> for Block {
    type Error = ipnet::AddrParseError;

    fn try_from(text: BlockText) -> Result<Self, Self::Error> {
        let except = text.except.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        Ok(Self { cidr: text.cidr.parse()?, except })
    }
}

impl Wanted {
    /// Whether a port number is wanted; a named one can't tell.
    pub fn covers(&self, number: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Range(from, to) => (*from..=*to).contains(&number),
            Self::Named(_) => false,
        }
    }
}

impl Pod {
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Whether it calls one of its ports so.
    pub fn names(&self, name: &str, protocol: Protocol, number: u16) -> bool {
        let wanted = |port: &ContainerPort| port.name == name && port.protocol == protocol;
        self.ports.iter().any(|port| wanted(port) && port.number == number)
    }
}

impl Flow {
    /// The end whose policies are asked, and the other.
    pub fn ends(&self, direction: Direction) -> (IpAddr, IpAddr) {
        match direction {
            Direction::Ingress => (self.destination, self.source),
            Direction::Egress => (self.source, self.destination),
        }
    }
}

impl Direction {
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    pub fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

impl Protocol {
    /// As nftables writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// Of an IP header's number.
    pub fn of_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a protocol: TCP, UDP or SCTP")]
pub struct InvalidProtocol(String);

impl FromStr for Protocol {
    type Err = InvalidProtocol;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [Self::Tcp, Self::Udp, Self::Sctp];
        known.into_iter().find(|p| p.word().eq_ignore_ascii_case(text)).ok_or(InvalidProtocol(text.into()))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.word().to_ascii_uppercase())
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Admin => "Admin",
            Self::Baseline => "Baseline",
        })
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(protocol, number) => write!(f, "{number}/{protocol}"),
            Self::Other => f.write_str("no port"),
        }
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => f.write_str(&self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}
