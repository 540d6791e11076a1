//! Kubernetes objects to our types, from the API server or from a file.
//!
//! Defaults are the API server's: `policyTypes` is `Ingress`, and `Egress` where there are egress rules; a protocol is TCP;
//! `null`, an absent list and an empty one are the same.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    model::{
        Block, ContainerPort, Direction, Namespace, Namespaces, Peer, Pod, PodPeer, Policy, PolicyId, Port,
        Protocol, Rule, Uid, Wanted,
    },
    selector::{Operator, Requirement, Selector},
};
use crate::types::Prefix;
use k8s_openapi::{
    api::{
        core::v1::{Namespace as NamespaceObject, Pod as PodObject},
        networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use std::collections::BTreeSet;

/// An object that the API server would not have taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name}: {why}")]
pub struct Invalid {
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) why: String,
}

/// # Errors
/// It has no name.
pub fn namespace(object: &NamespaceObject) -> Result<Namespace, Invalid> {
    let (name, metadata) = (name("Namespace", &object.metadata)?, &object.metadata);
    let mut labels = metadata.labels.clone().unwrap_or_default();
    // The API server always sets it.
    labels.entry(NAME_LABEL.into()).or_insert_with(|| name.clone());
    let uid = uid(metadata).unwrap_or_else(|| Uid(name.clone()));
    Ok(Namespace { uid, name, labels })
}

/// # Errors
/// It has no name, or no namespace.
pub fn pod(object: &PodObject) -> Result<Pod, Invalid> {
    const KIND: &str = "Pod";
    let (name, metadata) = (name(KIND, &object.metadata)?, &object.metadata);
    let namespace = metadata.namespace.clone().unwrap_or_else(|| DEFAULT.into());
    let (spec, status) = (object.spec.as_ref(), object.status.as_ref());
    let mut uids = vec![uid(metadata).unwrap_or_else(|| Uid(format!("{namespace}/{name}")))];
    let annotations = metadata.annotations.iter().flatten();
    uids.extend(
        annotations.filter(|(key, _)| STATIC_UID.contains(&key.as_str())).map(|(_, v)| Uid(v.clone())),
    );
    let completed =
        status.and_then(|s| s.phase.as_deref()).is_some_and(|p| ["Succeeded", "Failed"].contains(&p));
    let in_nodes_network = spec.is_some_and(|spec| spec.host_network == Some(true));
    let listed =
        status.and_then(|s| s.pod_ips.as_deref()).unwrap_or_default().iter().map(|ip| ip.ip.as_str());
    let single = status.and_then(|s| s.pod_ip.as_deref());
    let containers = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let sidecars = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let sidecars = sidecars.iter().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let ports = ports.filter_map(|port| {
        Some(ContainerPort {
            name: port.name.clone().filter(|name| !name.is_empty())?,
            protocol: port.protocol.as_deref().map_or(Some(Protocol::Tcp), |text| text.parse().ok())?,
            number: port.container_port.try_into().ok()?,
        })
    });
    Ok(Pod {
        uids,
        name,
        namespace,
        labels: metadata.labels.clone().unwrap_or_default(),
        addresses: listed.chain(single).filter_map(|text| text.parse().ok()).collect(),
        ports: ports.collect(),
        matchable: !completed && !in_nodes_network,
    })
}

/// # Errors
/// What the API server would have refused, too.
pub fn policy(object: &NetworkPolicy) -> Result<Policy, Invalid> {
    const KIND: &str = "NetworkPolicy";
    let (name, metadata) = (name(KIND, &object.metadata)?, &object.metadata);
    let namespace = metadata.namespace.clone().unwrap_or_else(|| DEFAULT.into());
    let id = PolicyId { namespace, name };
    let invalid = |why| Invalid { kind: KIND, name: id.to_string(), why };
    plain_name(&id.namespace).and_then(|()| plain_name(&id.name)).map_err(invalid)?;
    let spec = object.spec.as_ref().ok_or_else(|| invalid("it has no spec".into()))?;
    let own = &id.namespace;
    let ingress = spec.ingress.iter().flatten();
    let ingress = ingress.map(|r| rule(own, r.from.as_deref(), r.ports.as_deref(), Direction::Ingress));
    let ingress: Vec<Rule> = ingress.collect::<Result<_, _>>().map_err(invalid)?;
    let egress = spec.egress.iter().flatten();
    let egress = egress.map(|r| rule(own, r.to.as_deref(), r.ports.as_deref(), Direction::Egress));
    let egress: Vec<Rule> = egress.collect::<Result<_, _>>().map_err(invalid)?;
    let types = spec.policy_types.as_deref().unwrap_or_default();
    if let Some(other) = types.iter().find(|kind| !["Ingress", "Egress"].contains(&kind.as_str())) {
        return Err(invalid(format!("`{other}` is not a policy type: Ingress or Egress")));
    }
    let names = |kind: &str| types.iter().any(|listed| listed == kind);
    let subject = selector(spec.pod_selector.as_ref()).map_err(invalid)?;
    Ok(Policy {
        uid: uid(metadata).unwrap_or_else(|| Uid(id.to_string())),
        subject,
        ingress: (types.is_empty() || names("Ingress")).then_some(ingress),
        egress: (names("Egress") || types.is_empty() && !egress.is_empty()).then_some(egress),
        id,
    })
}

fn rule(
    own: &str,
    peers: Option<&[NetworkPolicyPeer]>,
    ports: Option<&[NetworkPolicyPort]>,
    direction: Direction,
) -> Result<Rule, String> {
    let word = direction.word();
    let peers = peers.filter(|list| !list.is_empty()).map(|list| list.iter().map(|p| peer(own, p)).collect());
    let ports = ports.filter(|list| !list.is_empty()).map(|list| list.iter().map(port).collect());
    let within = |why: String| format!("{word}: {why}");
    Ok(Rule { peers: peers.transpose().map_err(within)?, ports: ports.transpose().map_err(within)? })
}

fn peer(own: &str, object: &NetworkPolicyPeer) -> Result<Peer, String> {
    let (pods, namespaces) = (&object.pod_selector, &object.namespace_selector);
    match (&object.ip_block, pods, namespaces) {
        (Some(ip_block), None, None) => block(ip_block).map(Peer::Block),
        (Some(_), ..) => Err("a peer with an ipBlock has no selectors beside it".into()),
        (None, None, None) => Err(
            "a peer needs a podSelector, a namespaceSelector or an ipBlock; leave the list out for everybody"
                .into(),
        ),
        (None, pods, namespaces) => {
            let namespaces = match namespaces {
                Some(_) => Namespaces::Selected(selector(namespaces.as_ref())?),
                None => Namespaces::Named(own.into()),
            };
            Ok(Peer::Pods(PodPeer { namespaces, pods: selector(pods.as_ref())? }))
        }
    }
}

fn block(object: &IPBlock) -> Result<Block, String> {
    let prefix = |text: &str| prefix(text).map_err(|why| format!("ipBlock: {why}"));
    let except = object.except.iter().flatten().map(|text| prefix(text)).collect::<Result<_, _>>()?;
    Ok(Block { cidr: prefix(&object.cidr)?, except })
}

/// Without host bits.
pub(super) fn prefix(text: &str) -> Result<Prefix, String> {
    let parsed = text.parse::<Prefix>().map(|prefix| prefix.trunc());
    parsed.map_err(|_| format!("`{text}` is not a CIDR, such as 192.0.2.0/24"))
}

pub(super) fn number(number: i32) -> Result<u16, String> {
    let port = u16::try_from(number).ok().filter(|number| *number > 0);
    port.ok_or_else(|| format!("port {number} is not one of 1 to 65535"))
}

fn port(object: &NetworkPolicyPort) -> Result<Port, String> {
    let protocol = object.protocol.as_deref().map_or(Ok(Protocol::Tcp), str::parse);
    let wanted = match (&object.port, object.end_port) {
        (None, None) => Wanted::Any,
        (Some(IntOrString::Int(from)), None) => Wanted::Range(number(*from)?, number(*from)?),
        (Some(IntOrString::Int(from)), Some(to)) if to < *from => {
            return Err(format!("endPort {to} is smaller than port {from}"));
        }
        (Some(IntOrString::Int(from)), Some(to)) => Wanted::Range(number(*from)?, number(to)?),
        (Some(IntOrString::String(name)), None) => Wanted::Named(name.clone()),
        (_, Some(to)) => return Err(format!("endPort {to} needs a port that is a number")),
    };
    Ok(Port { protocol: protocol.map_err(|error| error.to_string())?, wanted })
}

pub(super) fn selector(object: Option<&LabelSelector>) -> Result<Selector, String> {
    let Some(LabelSelector { match_labels, match_expressions }) = object else {
        return Ok(Selector::default());
    };
    let equal = match_labels.iter().flatten().map(|(key, value)| {
        Ok(Requirement { key: key.clone(), operator: Operator::In([value.clone()].into()) })
    });
    equal.chain(match_expressions.iter().flatten().map(requirement)).collect()
}

fn requirement(object: &LabelSelectorRequirement) -> Result<Requirement, String> {
    let LabelSelectorRequirement { key, operator, values } = object;
    let values: BTreeSet<String> = values.iter().flatten().cloned().collect();
    let operator = match (operator.as_str(), values.is_empty()) {
        ("In", false) => Operator::In(values),
        ("NotIn", false) => Operator::NotIn(values),
        ("Exists", true) => Operator::Exists,
        ("DoesNotExist", true) => Operator::DoesNotExist,
        ("In" | "NotIn", true) => return Err(format!("the selector of `{key}` by {operator} needs values")),
        ("Exists" | "DoesNotExist", false) => {
            return Err(format!("the selector of `{key}` by {operator} has no values"));
        }
        _ => return Err(format!("`{operator}` is not an operator: In, NotIn, Exists or DoesNotExist")),
    };
    Ok(Requirement { key: key.clone(), operator })
}

pub(super) fn name(kind: &'static str, metadata: &ObjectMeta) -> Result<String, Invalid> {
    let nameless = || Invalid { kind, name: "without a name".into(), why: "metadata.name is missing".into() };
    metadata.name.clone().filter(|name| !name.is_empty()).ok_or_else(nameless)
}

/// Chains and counters are called by it.
pub(super) fn plain_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ['-', '.'].contains(&c);
    match name.chars().all(plain) {
        true => Ok(()),
        false => Err(format!("`{name}` is not made of small letters, digits, dots and dashes")),
    }
}

pub(super) fn uid(metadata: &ObjectMeta) -> Option<Uid> {
    metadata.uid.clone().filter(|uid| !uid.is_empty()).map(Uid)
}

/// What the API server labels each namespace with.
pub const NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// Where an object without a namespace is.
pub const DEFAULT: &str = "default";
/// What kubelet calls a static pod, on the object that mirrors it.
const STATIC_UID: [&str; 2] = ["kubernetes.io/config.hash", "kubernetes.io/config.mirror"];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(spec: serde_json::Value) -> Result<Policy, Invalid> {
        let object = json!({"metadata": {"name": "p", "namespace": "x"}, "spec": spec});
        policy(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn types_that_are_not_listed_follow_from_the_rules() {
        let directions = |spec| {
            let policy = of(spec).unwrap();
            (policy.ingress.is_some(), policy.egress.is_some())
        };
        assert_eq!(directions(json!({})), (true, false));
        assert_eq!(directions(json!({"policyTypes": [], "egress": []})), (true, false));
        assert_eq!(directions(json!({"policyTypes": null, "egress": [{}]})), (true, true));
        assert_eq!(directions(json!({"policyTypes": ["Egress"], "ingress": [{}]})), (false, true));
        assert_eq!(directions(json!({"policyTypes": ["Ingress"], "egress": [{}]})), (true, false));
    }

    #[test]
    fn null_absent_and_empty_lists_are_everybody() {
        for spec in [json!({"ingress": [{}]}), json!({"ingress": [{"from": null, "ports": []}]})] {
            assert_eq!(of(spec).unwrap().ingress, Some(vec![Rule { peers: None, ports: None }]));
        }
        assert_eq!(of(json!({"ingress": null})).unwrap().ingress, Some(Vec::new()));
    }

    #[test]
    fn what_the_api_server_refuses_is_refused() {
        for (spec, why) in [
            (json!({"ingress": [{"from": [{}]}]}), "a peer needs a podSelector"),
            (json!({"ingress": [{"ports": [{"port": "web", "endPort": 90}]}]}), "endPort 90 needs a port"),
            (json!({"ingress": [{"ports": [{"port": 90, "endPort": 80}]}]}), "endPort 80 is smaller"),
            (json!({"ingress": [{"ports": [{"port": 0}]}]}), "port 0 is not one of"),
            (json!({"ingress": [{"ports": [{"protocol": "ICMP"}]}]}), "`ICMP` is not a protocol"),
            (json!({"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0"}}]}]}), "`10.0.0.0` is not a CIDR"),
            (json!({"policyTypes": ["Both"]}), "`Both` is not a policy type"),
            (json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}), "needs values"),
        ] {
            let error = of(spec).unwrap_err().to_string();
            assert!(error.contains(why) && error.starts_with("NetworkPolicy x/p: "), "{error}");
        }
    }

    #[test]
    fn completed_pods_and_those_in_the_nodes_network_match_nothing() {
        let matchable = |spec, phase| {
            let object = json!({"metadata": {"name": "p"}, "spec": spec, "status": {"phase": phase}});
            pod(&serde_json::from_value(object).unwrap()).unwrap().matchable
        };
        let plain = || json!({"containers": []});
        assert!(matchable(plain(), "Running") && matchable(plain(), "Pending"));
        assert!(!matchable(plain(), "Succeeded") && !matchable(plain(), "Failed"));
        assert!(!matchable(json!({"containers": [], "hostNetwork": true}), "Running"));
    }

    #[test]
    fn host_bits_of_a_block_do_not_count() {
        let spec =
            json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.7/8", "except": ["10.1.2.3/16"]}}]}]});
        let rules = of(spec).unwrap().ingress.unwrap();
        let block =
            Block { cidr: "10.0.0.0/8".parse().unwrap(), except: ["10.1.0.0/16".parse().unwrap()].into() };
        assert_eq!(rules, [Rule { peers: Some(vec![Peer::Block(block)]), ports: None }]);
    }
}
