//! ClusterNetworkPolicy objects (`policy.networking.k8s.io/v1alpha2`) to our types.
//!
//! What is not known here, such as peers by `nodes` or `domainNames`, fails closed as the API asks for: a rule that accepts
//! matches nothing then, and one that denies or passes denies everything.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    convert::{Invalid, name, number, plain_name, prefix, selector, uid},
    model::{
        Action, Block, ClusterPolicy, ClusterRule, Direction, Namespaces, Peer, PodPeer, Port, Protocol,
        Rule, Tier, Uid, Wanted,
    },
};
use k8s_openapi::{
    ClusterResourceScope, Metadata, Resource,
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The object, as far as it is read here.
#[derive(Clone, Debug, Deserialize)]
pub struct ClusterNetworkPolicy {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Clone, Debug, Deserialize)]
struct Spec {
    tier: TierText,
    priority: u16,
    subject: BTreeMap<String, Value>,
    #[serde(default)]
    ingress: Option<Vec<RuleObject>>,
    #[serde(default)]
    egress: Option<Vec<RuleObject>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum TierText {
    Admin,
    Baseline,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum ActionText {
    Accept,
    Deny,
    Pass,
}

#[derive(Clone, Debug, Deserialize)]
struct RuleObject {
    #[serde(default)]
    name: String,
    action: ActionText,
    #[serde(default)]
    from: Vec<BTreeMap<String, Value>>,
    #[serde(default)]
    to: Vec<BTreeMap<String, Value>>,
    #[serde(default)]
    protocols: Option<Vec<BTreeMap<String, Value>>>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NamespacedPods {
    namespace_selector: LabelSelector,
    pod_selector: LabelSelector,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Transport {
    #[serde(default)]
    destination_port: Option<PortObject>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PortObject {
    #[serde(default)]
    number: Option<i32>,
    #[serde(default)]
    range: Option<RangeObject>,
}

#[derive(Deserialize)]
struct RangeObject {
    start: i32,
    end: i32,
}

impl Resource for ClusterNetworkPolicy {
    const API_VERSION: &'static str = "policy.networking.k8s.io/v1alpha2";
    const GROUP: &'static str = "policy.networking.k8s.io";
    const KIND: &'static str = KIND;
    const VERSION: &'static str = "v1alpha2";
    const URL_PATH_SEGMENT: &'static str = "clusternetworkpolicies";
    type Scope = ClusterResourceScope;
}

impl Metadata for ClusterNetworkPolicy {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// # Errors
/// What the API server would have refused, too.
pub fn policy(object: &ClusterNetworkPolicy) -> Result<ClusterPolicy, Invalid> {
    let (name, spec) = (name(KIND, &object.metadata)?, &object.spec);
    let invalid = |why| Invalid { kind: KIND, name: name.clone(), why };
    plain_name(&name).map_err(invalid)?;
    if let Some(other) = object.api_version.as_ref().filter(|it| *it != ClusterNetworkPolicy::API_VERSION) {
        return Err(invalid(format!("apiVersion is {other}, not {}", ClusterNetworkPolicy::API_VERSION)));
    }
    if spec.priority > LAST_PRIORITY {
        return Err(invalid(format!("priority {} is not one of 0 to {LAST_PRIORITY}", spec.priority)));
    }
    let rules = |rules: &Option<Vec<RuleObject>>, direction: Direction| {
        let rules = rules.iter().flatten().map(|object| rule(object, direction));
        let within = |why| invalid(format!("{}: {why}", direction.word()));
        rules.collect::<Result<Vec<_>, _>>().map_err(within)
    };
    Ok(ClusterPolicy {
        uid: uid(&object.metadata).unwrap_or_else(|| Uid(name.clone())),
        tier: match spec.tier {
            TierText::Admin => Tier::Admin,
            TierText::Baseline => Tier::Baseline,
        },
        priority: spec.priority,
        subject: match pods(&spec.subject).map_err(|why| invalid(format!("subject: {why}")))? {
            Some(subject) => subject,
            None => return Err(invalid("the subject is neither of namespaces nor of pods".into())),
        },
        ingress: rules(&spec.ingress, Direction::Ingress)?,
        egress: rules(&spec.egress, Direction::Egress)?,
        name,
    })
}

fn rule(object: &RuleObject, direction: Direction) -> Result<ClusterRule, String> {
    let (peers, word) = match direction {
        Direction::Ingress => (&object.from, "from"),
        Direction::Egress => (&object.to, "to"),
    };
    if peers.is_empty() {
        return Err(format!("a rule needs peers in `{word}`"));
    }
    let mut unknown = object.others.keys().next().map(|field| format!("`{field}`"));
    let (mut wanted, mut ports) = (Vec::new(), Vec::new());
    for object in peers {
        match peer(object, direction)? {
            Some(peers) => wanted.extend(peers),
            None => unknown = Some(format!("a peer by {}", fields(object))),
        }
    }
    for object in object.protocols.iter().flatten() {
        match protocol(object)? {
            Some(some) => ports.extend(some),
            None => unknown = Some(format!("a protocol by {}", fields(object))),
        }
    }
    let action = match object.action {
        ActionText::Accept => Action::Accept,
        ActionText::Deny => Action::Deny,
        ActionText::Pass => Action::Pass,
    };
    let known = Rule { peers: Some(wanted), ports: Some(ports).filter(|ports| !ports.is_empty()) };
    let (action, matching) = match (&unknown, action) {
        (None, action) => (action, known),
        (Some(_), Action::Accept) => (action, Rule { peers: Some(Vec::new()), ports: None }),
        (Some(_), Action::Deny | Action::Pass) => (Action::Deny, Rule { peers: None, ports: None }),
    };
    Ok(ClusterRule { name: object.name.clone(), action, matching, unknown })
}

/// None: it is of no kind that is known here.
fn peer(object: &BTreeMap<String, Value>, direction: Direction) -> Result<Option<Vec<Peer>>, String> {
    match only(object) {
        Some(("networks", networks)) if direction == Direction::Egress => {
            let networks: Vec<String> = form("networks", networks)?;
            let block = |text: &String| {
                let cidr = prefix(text).map_err(|why| format!("networks: {why}"))?;
                Ok(Peer::Block(Block { cidr, except: BTreeSet::new() }))
            };
            networks.iter().map(block).collect::<Result<_, _>>().map(Some)
        }
        _ => Ok(pods(object)?.map(|pods| vec![Peer::Pods(pods)])),
    }
}

fn pods(object: &BTreeMap<String, Value>) -> Result<Option<PodPeer>, String> {
    match only(object) {
        Some(("namespaces", namespaces)) => {
            let namespaces: LabelSelector = form("namespaces", namespaces)?;
            let namespaces = Namespaces::Selected(selector(Some(&namespaces))?);
            Ok(Some(PodPeer { namespaces, pods: selector(None)? }))
        }
        Some(("pods", pods)) => {
            let NamespacedPods { namespace_selector, pod_selector } = form("pods", pods)?;
            let namespaces = Namespaces::Selected(selector(Some(&namespace_selector))?);
            Ok(Some(PodPeer { namespaces, pods: selector(Some(&pod_selector))? }))
        }
        _ => Ok(None),
    }
}

/// A name is a port's of whatever protocol.
fn protocol(object: &BTreeMap<String, Value>) -> Result<Option<Vec<Port>>, String> {
    let Some((field, value)) = only(object) else { return Ok(None) };
    if field == "destinationNamedPort" {
        let name: String = form(field, value)?;
        let named = |protocol| Port { protocol, wanted: Wanted::Named(name.clone()) };
        return Ok(Some(PROTOCOLS.map(named).into()));
    }
    let Some(protocol) = PROTOCOLS.into_iter().find(|protocol| protocol.word() == field) else {
        return Ok(None);
    };
    // One that says more is of a later version.
    let Ok(Transport { destination_port }) = form(field, value) else { return Ok(None) };
    let wanted = match destination_port {
        None => Wanted::Any,
        Some(PortObject { number: Some(port), range: None }) => Wanted::Range(number(port)?, number(port)?),
        Some(PortObject { number: None, range: Some(RangeObject { start, end }) }) if start <= end => {
            Wanted::Range(number(start)?, number(end)?)
        }
        Some(_) => {
            return Err(format!(
                "{field}: destinationPort needs a number, or a range that does not end before its start"
            ));
        }
    };
    Ok(Some(vec![Port { protocol, wanted }]))
}

/// The one field that such an object has.
fn only(object: &BTreeMap<String, Value>) -> Option<(&str, &Value)> {
    let mut fields = object.iter().filter(|(_, value)| !value.is_null());
    let (field, value) = fields.next()?;
    fields.next().is_none().then_some((field, value))
}

fn form<T: for<'de> Deserialize<'de>>(field: &str, value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| format!("{field}: {error}"))
}

fn fields(object: &BTreeMap<String, Value>) -> String {
    let fields: Vec<_> = object.keys().map(|field| format!("`{field}`")).collect();
    if fields.is_empty() { "nothing".into() } else { fields.join(" and ") }
}

pub const KIND: &str = "ClusterNetworkPolicy";
const LAST_PRIORITY: u16 = 1000;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(rules: Value) -> Result<ClusterPolicy, Invalid> {
        let mut spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}});
        spec.as_object_mut().unwrap().extend(rules.as_object().unwrap().clone());
        policy(&serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap())
    }

    fn egress(action: &str, to: Value, protocols: Value) -> ClusterRule {
        let rule = json!({"action": action, "to": [to], "protocols": protocols});
        of(json!({"egress": [rule]})).unwrap().egress.remove(0)
    }

    #[test]
    fn what_is_not_known_fails_closed() {
        let everything = Rule { peers: None, ports: None };
        let nothing = Rule { peers: Some(Vec::new()), ports: None };
        for unknown in [json!({"nodes": {}}), json!({"domainNames": ["example.org"]}), json!({})] {
            for (action, becomes, matching) in [
                ("Accept", Action::Accept, &nothing),
                ("Deny", Action::Deny, &everything),
                ("Pass", Action::Deny, &everything),
            ] {
                let rule = egress(action, unknown.clone(), json!(null));
                assert_eq!((rule.action, &rule.matching), (becomes, matching), "{unknown}");
                assert!(rule.unknown.is_some());
            }
        }
        let later =
            egress("Deny", json!({"namespaces": {}}), json!([{"tcp": {"sourcePort": {"number": 1}}}]));
        assert_eq!(later.matching, everything);
        let icmp = egress("Accept", json!({"namespaces": {}}), json!([{"icmp": {}}]));
        assert_eq!(icmp.matching, nothing);
        let networks = json!({"ingress": [{"action": "Deny", "from": [{"networks": ["10.0.0.0/8"]}]}]});
        assert_eq!(of(networks).unwrap().ingress[0].matching, everything);
    }

    #[test]
    fn ports_are_numbers_ranges_names_and_whole_protocols() {
        let protocols = json!([
            {"tcp": {"destinationPort": {"number": 80}}},
            {"udp": {"destinationPort": {"range": {"start": 1, "end": 9}}}},
            {"sctp": {}},
            {"destinationNamedPort": "web"},
        ]);
        let rule = egress("Accept", json!({"networks": ["10.0.0.7/8", "fd00::/8"]}), protocols);
        let ports = rule.matching.ports.unwrap();
        let (wanted, named): (Vec<_>, Vec<_>) = (ports[..3].to_vec(), ports[3..].to_vec());
        assert_eq!(
            wanted,
            [
                Port { protocol: Protocol::Tcp, wanted: Wanted::Range(80, 80) },
                Port { protocol: Protocol::Udp, wanted: Wanted::Range(1, 9) },
                Port { protocol: Protocol::Sctp, wanted: Wanted::Any },
            ]
        );
        assert!(named.iter().all(|port| port.wanted == Wanted::Named("web".into())) && named.len() == 3);
        let block = |cidr: &str| Peer::Block(Block { cidr: cidr.parse().unwrap(), except: BTreeSet::new() });
        assert_eq!(rule.matching.peers.unwrap(), [block("10.0.0.0/8"), block("fd00::/8")]);
    }

    #[test]
    fn what_the_api_server_refuses_is_refused() {
        for (spec, why) in [
            (json!({"priority": 1001}), "priority 1001 is not one of 0 to 1000"),
            (json!({"subject": {}}), "the subject is neither of"),
            (json!({"ingress": [{"action": "Deny", "from": []}]}), "ingress: a rule needs peers in `from`"),
            (json!({"egress": [{"action": "Deny", "to": [{"networks": ["x"]}]}]}), "`x` is not a CIDR"),
        ] {
            let error = of(spec).unwrap_err().to_string();
            assert!(error.contains(why) && error.starts_with("ClusterNetworkPolicy p: "), "{error}");
        }
    }
}
