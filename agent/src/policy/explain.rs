//! Why somebody may talk to somebody, or may not: a reading of the policies themselves, beside the rules made from them.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    index::Index,
    model::{Action, ClusterRule, Direction, Flow, Peer, Pod, PolicyId, Port, Rule, Service, Tier, Wanted},
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
    /// No policy isolates the pod in this direction, and none for the cluster decides.
    Open,
    /// A rule of a policy for the cluster has decided.
    Ruled {
        tier: Tier,
        policy: PolicyId,
        number: usize,
        rule: ClusterRule,
    },
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
    let ruled = |tier| ruled(index, tier, pod, direction, other, flow);
    if let Some(decided) = ruled(Tier::Admin) {
        return decided;
    }
    let mut policies = Vec::new();
    for policy in index.selecting(pod) {
        let Some(rules) = policy.rules(direction) else { continue };
        if let Some(rule) = rules.iter().position(|rule| allows(index, rule, other, flow)) {
            return Verdict::Allowed { policy: policy.id.clone(), rule };
        }
        policies.push(policy.id.clone());
    }
    match policies.is_empty() {
        true => ruled(Tier::Baseline).unwrap_or(Verdict::Open),
        false => Verdict::Denied { policies },
    }
}

/// What a tier decides; none: nothing, or a rule passes on.
fn ruled(
    index: &Index,
    tier: Tier,
    pod: &Pod,
    direction: Direction,
    other: IpAddr,
    flow: &Flow,
) -> Option<Verdict> {
    let rules = index.ruling(tier, pod).flat_map(|policy| {
        policy.rules(direction).iter().enumerate().map(move |(number, rule)| (policy, number, rule))
    });
    let (policy, number, rule) =
        rules.into_iter().find(|(_, _, rule)| allows(index, &rule.matching, other, flow))?;
    let ruled = Verdict::Ruled { tier, policy: policy.id(), number, rule: rule.clone() };
    (rule.action != Action::Pass).then_some(ruled)
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
        match self {
            Self::Denied { .. } => false,
            Self::Ruled { rule, .. } => rule.action != Action::Deny,
            _ => true,
        }
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
            Self::Ruled { tier, policy, number, rule } => {
                let said = if self.allowed() { "allowed" } else { "denied" };
                write!(f, "{said} by rule {}", number + 1)?;
                if !rule.name.is_empty() {
                    write!(f, " `{}`", rule.name)?;
                }
                write!(f, " of ClusterNetworkPolicy {policy} in the {tier} tier")?;
                match &rule.unknown {
                    Some(what) => write!(f, ", of which {what} is not known here: so it denies everything"),
                    None => Ok(()),
                }
            }
            Self::Denied { policies } => {
                let names: Vec<_> = policies.iter().map(PolicyId::to_string).collect();
                write!(f, "denied: isolated by NetworkPolicy {}, and no rule allows it", names.join(", "))
            }
        }
    }
}
