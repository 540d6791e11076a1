//! What the agent says of its own Node: that its network works, and what an operator should see.
use k8s_openapi::api::core::v1::{Event, Node};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use std::time::{Duration, Instant};
use weft::kube::{
    TAINT,
    events::{Aggregator, Finding, Reason},
};

use crate::harness::Scene;

fn condition(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions.iter().find(|condition| condition.type_ == "NetworkUnavailable")?;
    Some(format!("{} {}", condition.status, condition.reason.as_deref()?))
}

fn taints(node: &Node) -> Vec<String> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    // A real server adds some of its own.
    taints.map(|taint| taint.key.clone()).filter(|key| !key.starts_with("node.kubernetes.io/")).collect()
}

#[tokio::test]
async fn a_ready_node_has_its_condition_and_loses_our_taint_only() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    let spec = json!({"taints": [
        {"key": "dedicated", "value": "db", "effect": "NoSchedule"}, {"key": TAINT, "effect": "NoSchedule"}]});
    let before = scene.make_node("a", "192.0.2.1", spec).await;
    assert_eq!((condition(&before), taints(&before)), (None, vec!["dedicated".into(), TAINT.into()]));
    let mut member = scene.member("a", &relay).await;
    // Others change the Node all the time.
    let others = async {
        for n in 0..20 {
            let patch = Patch::Merge(json!({"metadata": {"annotations": {"test": n.to_string()}}}));
            scene.nodes().patch(&scene.name("a"), &PatchParams::default(), &patch).await.unwrap();
        }
    };
    let (announced, ()) = tokio::join!(member.handle.announce(), others);
    announced.unwrap();
    let after = scene.nodes().get(&scene.name("a")).await.unwrap();
    assert_eq!(
        (condition(&after), taints(&after)),
        (Some("False WeftIsUp".into()), vec!["dedicated".into()])
    );
    assert_eq!(after.status.unwrap().addresses.unwrap()[0].address, "192.0.2.1");
    let me = member.handle.node().clone();
    member
        .sees("the agent sees it", |view| {
            view.nodes.get(&me).is_some_and(|n| n.network_available && !n.tainted)
        })
        .await;
    // Twice does no harm.
    member.handle.announce().await.unwrap();
    scene.end().await;
}

#[tokio::test]
async fn what_happens_a_thousand_times_is_one_event() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    let member = scene.member("a", &relay).await;
    let (mut events, start) = (Aggregator::default(), Instant::now());
    for second in 0..1000 {
        let note = format!("10.32.0.{} is in use elsewhere", second % 7);
        let found = if second % 2 == 0 {
            [Finding { reason: Reason::AddressDispute, note }].into()
        } else {
            [].into()
        };
        for post in events.observe(found, start + Duration::from_secs(second)) {
            member.handle.post(&post).await.unwrap();
        }
    }
    let api: Api<Event> = Api::namespaced(scene.client.clone(), "default");
    let fields = format!("involvedObject.name={},involvedObject.kind=Node", scene.name("a"));
    let made = api.list(&ListParams::default().fields(&fields)).await.unwrap().items;
    let ours: Vec<_> =
        made.iter().filter(|event| event.reason.as_deref() == Some("AddressDispute")).collect();
    assert_eq!(ours.len(), 1, "{ours:?}");
    assert_eq!(ours[0].type_.as_deref(), Some("Warning"));
    assert!(ours[0].count.unwrap() > 400, "{ours:?}");
    drop(member);
    scene.end().await;
}
