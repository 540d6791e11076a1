//! What the API is told of this node, as the bodies of patches.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{TAINT, events::Post};
use k8s_openapi::api::core::v1::{Node, Taint};
use serde_json::{Value, json};

/// Of `nodes/status`, strategic: conditions are merged by their type.
pub fn network_available(now: &str) -> Value {
    json!({"status": {"conditions": [{
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "WeftIsUp",
        "message": "Weft's agent is ready on this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }]}})
}

/// Takes our taint off, leaving all others; none where it is not there. It fails if the Node has changed meanwhile: the
/// list of taints is replaced as a whole.
pub fn without_taint(node: &Node) -> Option<Value> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let rest: Vec<&Taint> = taints.iter().filter(|taint| taint.key != TAINT).collect();
    let version = node.metadata.resource_version.as_ref()?;
    (rest.len() < taints.len())
        .then(|| json!({"metadata": {"resourceVersion": version}, "spec": {"taints": rest}}))
}

/// The name of the Event, which is the same when it is told again.
pub fn event_name(node: &str, agent: u64, post: &Post) -> String {
    format!("{node}.{agent:x}.{}", post.number)
}

/// An Event about the Node, in the namespace `default` as those of kubelet. Nodes' Events are found by the name in the
/// place of the UID.
pub fn event(node: &str, agent: u64, post: &Post, now: &str) -> Value {
    let kind = if post.finding.reason.is_normal() { "Normal" } else { "Warning" };
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": event_name(node, agent, post), "namespace": "default"},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
        "reason": format!("{:?}", post.finding.reason),
        "message": post.finding.note,
        "type": kind,
        "count": post.count,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": "weft", "host": node},
        "reportingComponent": "weft.dev/agent",
        "reportingInstance": node,
    })
}

/// What changes in an Event that is told again.
pub fn event_again(post: &Post, now: &str) -> Value {
    json!({"count": post.count, "message": post.finding.note, "lastTimestamp": now})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_taint_is_taken_off_and_only_if_nothing_has_changed() {
        let node = |taints: Value| -> Node {
            serde_json::from_value(json!({
                "metadata": {"name": "a", "resourceVersion": "7"}, "spec": {"taints": taints}}))
            .unwrap()
        };
        let other = json!({"key": "dedicated", "effect": "NoSchedule", "value": "db"});
        let both = node(json!([{"key": TAINT, "effect": "NoSchedule"}, other]));
        let expected = json!({"metadata": {"resourceVersion": "7"}, "spec": {"taints": [other]}});
        assert_eq!(without_taint(&both), Some(expected));
        assert_eq!(without_taint(&node(json!([other]))), None);
        assert_eq!(without_taint(&Node::default()), None);
    }
}
