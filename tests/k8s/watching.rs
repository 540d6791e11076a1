//! What is heard of nodes and pods: by list and watch, through whatever happens on the way.
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Endpoints;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;
use weft::kube::{ENDPOINTS, View, join};
use weft_lab::relay::Quality;

use crate::harness::{Member, SOON, Scene, check, until};

fn endpoints(view: &View, name: &str) -> Vec<String> {
    let node = view.nodes.get(&name.parse().unwrap());
    node.iter().flat_map(|node| &node.endpoints).map(ToString::to_string).collect()
}

async fn sees_address(member: &mut Member, node: &str, address: &str) {
    member
        .sees(&format!("{node} is at {address}"), |view| endpoints(view, node) == [format!("{address}:6783")])
        .await;
}

fn pods(view: &View) -> usize {
    view.pods.as_ref().map_or(0, |pods| pods.len())
}

#[tokio::test]
async fn nodes_come_change_and_go() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    let mut member = scene.member("a", &relay).await;
    member.sees("the nodes are listed", |view| view.listed).await;
    let b = scene.name("b");
    scene.make_node("b", "192.0.2.2", json!({})).await;
    sees_address(&mut member, &b, "192.0.2.2").await;
    let annotated = json!({"metadata": {"annotations": {ENDPOINTS: "198.51.100.2"}}});
    scene.nodes().patch(&b, &PatchParams::default(), &Patch::Merge(annotated)).await.unwrap();
    sees_address(&mut member, &b, "198.51.100.2").await;
    scene.delete_node("b").await;
    member.sees("b is gone", |view| !view.nodes.contains_key(&b.parse().unwrap())).await;
    scene.end().await;
}

#[tokio::test]
async fn only_this_nodes_pods_are_heard_of() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    for (name, address) in [("a", "192.0.2.1"), ("b", "192.0.2.2")] {
        scene.make_node(name, address, json!({})).await;
    }
    let mut member = scene.member("a", &relay).await;
    member.sees("pods are listed", |view| view.pods.is_some()).await;
    scene.make_pod("elsewhere", "b").await;
    let here = scene.make_pod("here", "a").await;
    member.sees("the pod is heard of", |view| pods(view) == 1).await;
    let uid = here.metadata.uid.unwrap();
    let now = member.handle.pods_now().await.unwrap();
    assert!(now.len() == 1 && now[0].uids.iter().any(|known| known.0 == uid), "{now:?}");
    scene.delete_pod("here").await;
    member.sees("the pod is gone", |view| pods(view) == 0).await;
    scene.end().await;
}

#[tokio::test]
async fn many_nodes_come_in_pages() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    for n in 0..520 {
        // More than a page holds; without a status, as nodes are before kubelet has told it.
        scene.make(&scene.nodes(), json!({"metadata": {"name": scene.name(&format!("n{n}"))}})).await;
    }
    let mut member = scene.member("n0", &relay).await;
    let of_ours = |view: &View| view.nodes.keys().filter(|name| name.as_str().starts_with(&scene.id)).count();
    member.sees("all are listed", |view| view.listed && of_ours(view) == 520).await;
    scene.end().await;
}

#[tokio::test]
async fn a_watch_that_is_cut_goes_on_and_nothing_is_missed() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    let mut member = scene.member("a", &relay).await;
    member.sees("the nodes are listed", |view| view.listed).await;
    for n in 1..=5 {
        relay.cut();
        let name = format!("b{n}");
        scene.make_node(&name, &format!("192.0.2.1{n}"), json!({})).await;
        sees_address(&mut member, &scene.name(&name), &format!("192.0.2.1{n}")).await;
    }
    scene.end().await;
}

#[tokio::test]
async fn what_the_server_has_forgotten_is_listed_anew() {
    forgotten(false).await;
}

#[tokio::test]
async fn what_the_server_has_forgotten_is_listed_anew_also_if_it_refuses_the_watch() {
    forgotten(true).await;
}

async fn forgotten(bluntly: bool) {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    scene.make_node("b", "192.0.2.2", json!({})).await;
    let mut member = scene.member("a", &relay).await;
    let (b, c) = (scene.name("b"), scene.name("c"));
    sees_address(&mut member, &b, "192.0.2.2").await;
    member.sees("the nodes are listed", |view| view.listed).await;
    relay.close();
    scene.delete_node("b").await;
    scene.make_node("c", "192.0.2.3", json!({})).await;
    // 410 Gone to who was there before. A real server does so by itself, after minutes.
    scene.own.iter().for_each(|server| server.compact(bluntly));
    relay.set(Quality::Good);
    member
        .sees("b has gone and c come", |view| {
            endpoints(view, &b).is_empty() && !endpoints(view, &c).is_empty()
        })
        .await;
    scene.end().await;
}

#[tokio::test]
async fn through_an_outage_everything_counts_that_was_said_before() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    scene.make_node("b", "192.0.2.2", json!({})).await;
    scene.make_pod("here", "a").await;
    let mut member = scene.member("a", &relay).await;
    let b = scene.name("b");
    member
        .sees("all is known", |view| view.listed && pods(view) == 1 && !endpoints(view, &b).is_empty())
        .await;
    relay.close();
    let mut trouble = member.handle.trouble();
    let said = tokio::time::timeout(SOON, trouble.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(said.unwrap().contains("what it said last goes on counting"));
    assert!(member.handle.pods_now().await.is_err(), "nobody can say what is so now");
    let view = member.view.borrow().clone();
    assert!(view.listed && pods(&view) == 1 && !endpoints(&view, &b).is_empty());
    scene.delete_pod("here").await;
    relay.set(Quality::Good);
    member.sees("what has happened meanwhile", |view| pods(view) == 0).await;
    tokio::time::timeout(SOON, trouble.wait_for(Option::is_none)).await.unwrap().unwrap();
    scene.end().await;
}

#[tokio::test]
async fn a_slow_way_is_a_way() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    relay.set(Quality::Slow);
    scene.make_node("a", "192.0.2.1", json!({})).await;
    let mut member = scene.member("a", &relay).await;
    scene.make_node("b", "192.0.2.2", json!({})).await;
    sees_address(&mut member, &scene.name("b"), "192.0.2.2").await;
    scene.end().await;
}

#[tokio::test]
async fn a_server_that_is_silent_is_asked_again() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    relay.set(Quality::Silent);
    let settings = scene.settings("a", &relay);
    let joining = tokio::spawn(join::join(settings));
    // What was asked on a dead connection is never answered; the next is.
    until("it asks", async || check(relay.is_used(), "nobody is there")).await;
    relay.cut();
    relay.set(Quality::Good);
    tokio::time::timeout(SOON, joining).await.expect("it asks again").unwrap().unwrap();
    scene.end().await;
}

#[tokio::test]
async fn who_has_joined_before_starts_without_a_server() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    scene
        .make_node("b", "192.0.2.2", json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}))
        .await;
    let first = scene.join("a", &relay).await;
    relay.close();
    let start = Instant::now();
    let second = scene.join("a", &relay).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    let b = scene.name("b").parse().unwrap();
    assert_eq!((&second.cache.seeds, second.elected), (&first.cache.seeds, false));
    assert_eq!(second.cache.nodes[&b].endpoints, first.cache.nodes[&b].endpoints);
    assert_eq!(second.cache.nodes[&b].pod_cidrs.len(), 1);
    scene.end().await;
}

#[tokio::test]
async fn where_the_service_does_not_work_the_server_itself_is_asked() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    if scene.own.is_some() {
        // A real server tells its own address by itself.
        let server = scene.server();
        let subset = json!({"addresses": [{"ip": server.ip()}], "ports": [{"port": server.port()}]});
        let api: Api<Endpoints> = Api::namespaced(scene.client.clone(), "default");
        scene.make(&api, json!({"metadata": {"name": "kubernetes"}, "subsets": [subset]})).await;
    }
    drop(scene.join("a", &relay).await);
    relay.close();
    let before = relay.calls();
    let mut member = scene.member("a", &relay).await;
    scene.make_node("b", "192.0.2.2", json!({})).await;
    let b = scene.name("b");
    let found = member.view.wait_for(|view| !endpoints(view, &b).is_empty());
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("it is asked").unwrap();
    // Of four watches, each ever more seldom.
    assert!(relay.calls() - before < 60, "{} calls of a server that is not there", relay.calls() - before);
    scene.end().await;
}
