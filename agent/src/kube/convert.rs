//! Kubernetes objects to our types. What cannot be made sense of is left out; nothing here fails.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{ENDPOINTS, Node, Pod, TAINT, Uid};
use crate::types::{Endpoint, Prefix};
use k8s_openapi::{
    api::core::v1::{Node as NodeObject, NodeAddress, Pod as PodObject},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

/// None where the object has no name that a peer can have.
pub fn node(object: &NodeObject, port: u16) -> Option<Node> {
    let (spec, status) = (object.spec.as_ref(), object.status.as_ref());
    let addresses = status.and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    Some(Node {
        name: object.metadata.name.as_ref()?.parse().ok()?,
        uid: uid(&object.metadata),
        endpoints: annotated(&object.metadata, port).unwrap_or_else(|| endpoints(addresses, port)),
        pod_cidrs: spec
            .map(|spec| cidrs(spec.pod_cidrs.as_deref(), spec.pod_cidr.as_deref()))
            .unwrap_or_default(),
        tainted: taints.iter().any(|taint| taint.key == TAINT),
        network_available: conditions.iter().any(|c| c.type_ == "NetworkUnavailable" && c.status == "False"),
    })
}

/// None where the object has neither name nor UID.
pub fn pod(object: &PodObject) -> Option<Pod> {
    let mut uids = BTreeSet::from([uid(&object.metadata)]);
    uids.extend(STATIC_UID.iter().filter_map(|key| Some(Uid(annotation(&object.metadata, key)?.into()))));
    uids.remove(&Uid::default());
    let (namespace, name) = (object.metadata.namespace.clone()?, object.metadata.name.clone()?);
    (!uids.is_empty()).then_some(Pod { namespace, name, uids })
}

fn uid(metadata: &ObjectMeta) -> Uid {
    Uid(metadata.uid.clone().unwrap_or_default())
}

fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// None where there is no such annotation, or nothing in it is an endpoint.
fn annotated(metadata: &ObjectMeta, port: u16) -> Option<Vec<Endpoint>> {
    let endpoint = |text: &str| match text.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(ip) => Some(Endpoint(SocketAddr::new(ip, port))),
        Err(_) => text.parse().ok(),
    };
    let texts = annotation(metadata, ENDPOINTS)?.split(',').map(str::trim);
    let endpoints: Vec<_> = texts.filter_map(endpoint).collect();
    (!endpoints.is_empty()).then_some(endpoints)
}

/// Both families, in the order in which the node has them.
fn endpoints(addresses: &[NodeAddress], port: u16) -> Vec<Endpoint> {
    let of = |kind: &str| -> Vec<Endpoint> {
        let parsed = addresses.iter().filter(|a| a.type_ == kind).filter_map(|a| a.address.parse().ok());
        parsed.map(|ip: IpAddr| Endpoint(SocketAddr::new(ip, port))).collect()
    };
    let internal = of("InternalIP");
    if internal.is_empty() { of("ExternalIP") } else { internal }
}

fn cidrs(list: Option<&[String]>, single: Option<&str>) -> Vec<Prefix> {
    let texts: Vec<&str> = match list {
        Some(list) if !list.is_empty() => list.iter().map(String::as_str).collect(),
        _ => single.into_iter().collect(),
    };
    texts.into_iter().filter_map(|text| text.parse::<Prefix>().ok()).map(|prefix| prefix.trunc()).collect()
}

/// What kubelet calls a static pod, on the object that mirrors it.
const STATIC_UID: [&str; 2] = ["kubernetes.io/config.hash", "kubernetes.io/config.mirror"];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(object: serde_json::Value) -> Node {
        node(&serde_json::from_value(object).unwrap(), 6783).unwrap()
    }

    fn endpoints_of(node: &Node) -> Vec<String> {
        node.endpoints.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_node_is_reached_at_its_internal_addresses_of_both_families() {
        let node = read(json!({
            "metadata": {"name": "worker-1", "uid": "u1"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"],
                     "taints": [{"key": TAINT, "effect": "NoSchedule"}]},
            "status": {"addresses": [
                {"type": "ExternalIP", "address": "203.0.113.7"},
                {"type": "InternalIP", "address": "10.200.0.11"},
                {"type": "InternalIP", "address": "2001:db8::11"},
                {"type": "Hostname", "address": "worker-1"}]}}));
        assert_eq!(endpoints_of(&node), ["10.200.0.11:6783", "[2001:db8::11]:6783"]);
        assert_eq!(node.pod_cidrs, ["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()]);
        assert!(node.tainted && !node.network_available);
        assert_eq!(node.uid, Uid("u1".into()));
    }

    #[test]
    fn without_internal_addresses_the_external_ones_count() {
        let status = json!({"addresses": [{"type": "ExternalIP", "address": "203.0.113.7"}],
                            "conditions": [{"type": "NetworkUnavailable", "status": "False"}]});
        let node = read(json!({"metadata": {"name": "w"}, "status": status}));
        assert_eq!(endpoints_of(&node), ["203.0.113.7:6783"]);
        assert!(node.network_available && node.pod_cidrs.is_empty());
    }

    #[test]
    fn an_annotation_overrides_the_addresses_unless_it_says_nothing() {
        let with = |text: &str| {
            read(json!({
                "metadata": {"name": "w", "annotations": {ENDPOINTS: text}},
                "status": {"addresses": [{"type": "InternalIP", "address": "10.200.0.11"}]}}))
        };
        let many = with("198.51.100.1, [2001:db8::1]:7000 ,2001:db8::2,198.51.100.2:7001");
        let expected = ["198.51.100.1:6783", "[2001:db8::1]:7000", "[2001:db8::2]:6783", "198.51.100.2:7001"];
        assert_eq!(endpoints_of(&many), expected);
        assert_eq!(endpoints_of(&with("not an address")), ["10.200.0.11:6783"]);
    }

    #[test]
    fn a_static_pod_is_known_by_the_uid_that_kubelet_uses_too() {
        let object = json!({"metadata": {"namespace": "kube-system", "name": "etcd-w", "uid": "mirror",
            "annotations": {"kubernetes.io/config.hash": "static", "kubernetes.io/config.mirror": "static"}}});
        let pod = pod(&serde_json::from_value(object).unwrap()).unwrap();
        assert_eq!(pod.uids, [Uid("mirror".into()), Uid("static".into())].into());
    }

    #[test]
    fn what_has_no_name_is_left_out() {
        assert_eq!(node(&NodeObject::default(), 1), None);
        assert_eq!(pod(&PodObject::default()), None);
    }
}
