//! Why somebody may talk to somebody, or may not: a reading of the policies themselves, beside the rules made from them.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    index::Index,
    model::{Direction, Flow, Peer, Pod, PolicyId, Port, Rule, Service, Wanted},
};
use std::{fmt, net::IpAddr};

/// What both ends' policies say of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub egress: Verdict,
    pub ingress: Verdict,
}

/// What decided at one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No pod has the address, so no policy isolates it.
    NoPod,
    /// A pod always reaches itself.
    Itself,
    /// A node always reaches its pods, and they reach it.
    OwnNode,
    /// No policy isolates the pod in this direction.
    Open,
    Allowed {
        policy: PolicyId,
        rule: usize,
    },
    /// None of the policies that isolate the pod allows it.
    Denied {
        policies: Vec<PolicyId>,
    },
}

/// What the policies at both ends say.
pub fn explain(index: &Index, flow: &Flow) -> Explanation {
    Explanation {
        egress: verdict(index, Direction::Egress, flow),
        ingress: verdict(index, Direction::Ingress, flow),
    }
}

fn verdict(index: &Index, direction: Direction, flow: &Flow) -> Verdict {
    let (own, other) = flow.ends(direction);
    let Some(pod) = index.endpoint(own) else { return Verdict::NoPod };
    if own == other {
        return Verdict::Itself;
    }
    if index.attached().contains_key(&own) && index.own().contains(&other) {
        return Verdict::OwnNode;
    }
    let mut policies = Vec::new();
    for policy in index.selecting(pod) {
        let Some(rules) = policy.rules(direction) else { continue };
        if let Some(rule) = rules.iter().position(|rule| allows(index, rule, other, flow)) {
            return Verdict::Allowed { policy: policy.id.clone(), rule };
        }
        policies.push(policy.id.clone());
    }
    if policies.is_empty() { Verdict::Open } else { Verdict::Denied { policies } }
}

fn allows(index: &Index, rule: &Rule, other: IpAddr, flow: &Flow) -> bool {
    let is_peer = |peer: &Peer| match peer {
        Peer::Block(block) => index.block_matches(block, other),
        Peer::Pods(wanted) => index.endpoint(other).is_some_and(|pod| index.pod_matches(wanted, pod)),
    };
    let destination = index.endpoint(flow.destination);
    rule.peers.as_ref().is_none_or(|peers| peers.iter().any(is_peer))
        && rule.ports.as_ref().is_none_or(|ports| {
            ports.iter().any(|port| is_wanted(port, flow.to, destination.map(|pod| &**pod)))
        })
}

fn is_wanted(port: &Port, to: Service, destination: Option<&Pod>) -> bool {
    let Service::Port(protocol, number) = to else { return false };
    protocol == port.protocol
        && match &port.wanted {
            Wanted::Named(name) => destination.is_some_and(|pod| pod.names(name, protocol, number)),
            wanted => wanted.covers(number),
        }
}

impl Explanation {
    pub fn allowed(&self) -> bool {
        self.egress.allowed() && self.ingress.allowed()
    }
}

impl Verdict {
    pub fn allowed(&self) -> bool {
        !matches!(self, Self::Denied { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPod => f.write_str("allowed: no pod that policies see has this address"),
            Self::Itself => f.write_str("allowed: a pod always reaches itself"),
            Self::OwnNode => f.write_str("allowed: a pod and its own node always reach each other"),
            Self::Open => f.write_str("allowed: no policy isolates the pod in this direction"),
            Self::Allowed { policy, rule } => {
                write!(f, "allowed by rule {} of NetworkPolicy {policy}", rule + 1)
            }
            Self::Denied { policies } => {
                let names: Vec<_> = policies.iter().map(PolicyId::to_string).collect();
                write!(f, "denied: isolated by NetworkPolicy {}, and no rule allows it", names.join(", "))
            }
        }
    }
}
