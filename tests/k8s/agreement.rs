//! What agents agree on by conditional updates: who has the universe at the start, the CA, whose space goes to whom.
use std::{fs, sync::Arc};

use k8s_openapi::{ByteString, api::core::v1::ConfigMap};
use kube::api::{Patch, PatchParams};
use serde_json::json;
use weft::{
    identity::{Ca, Trust},
    kube::{Uid, join},
};

use crate::harness::{Scene, check, until};

async fn data(scene: &Scene, key: &str) -> anyhow::Result<String> {
    let map = scene.maps().get("weft-seed").await?;
    map.data.and_then(|mut data| data.remove(key)).ok_or_else(|| anyhow::anyhow!("no {key} yet"))
}

#[tokio::test]
async fn of_many_that_start_at_once_one_is_elected_and_one_makes_the_ca() {
    let scene = Arc::new(Scene::new().await);
    let relay = Arc::new(scene.relay());
    for n in 0..10 {
        scene.make_node(&format!("n{n}"), &format!("192.0.2.{n}"), json!({})).await;
    }
    let joining = (0..10).map(|n| {
        let (scene, relay) = (scene.clone(), relay.clone());
        tokio::spawn(async move { scene.join(&format!("n{n}"), &relay).await })
    });
    let mut joined = Vec::new();
    for cluster in joining.collect::<Vec<_>>() {
        joined.push(cluster.await.unwrap());
    }
    let elected: Vec<_> = joined.iter().filter(|cluster| cluster.elected).collect();
    assert_eq!(elected.len(), 1);
    let keys = |n: usize, file| fs::read(scene.dir().join(format!("n{n}-keys")).join(file)).unwrap();
    for (n, cluster) in joined.iter().enumerate() {
        assert_eq!(cluster.cache.seeds, std::slice::from_ref(&elected[0].settings.node));
        assert_eq!((keys(n, "ca.crt"), keys(n, "ca.key")), (keys(0, "ca.crt"), keys(0, "ca.key")));
    }
    let ca = Ca::load(&keys(0, "ca.crt"), &keys(0, "ca.key")).unwrap();
    ca.issue(&"n0".parse().unwrap(), std::time::Duration::from_secs(60), std::time::SystemTime::now())
        .unwrap();
    drop(relay);
    Arc::into_inner(scene).unwrap().end().await;
}

#[tokio::test]
async fn a_secret_that_somebody_filled_is_used_as_it_is() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    let now = std::time::SystemTime::now();
    let (made, root) = (Ca::create(now).unwrap(), Ca::create(now).unwrap());
    // As cert-manager does: the CA, its key, and who signed it.
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let filled = json!({"data": {"tls.crt": bytes(&made.cert), "tls.key": bytes(&made.key), "ca.crt": bytes(&root.cert)}});
    scene.secrets().patch("weft-ca", &PatchParams::default(), &Patch::Merge(filled)).await.unwrap();
    let before = scene.secrets().get("weft-ca").await.unwrap();
    let mut member = scene.member("a", &relay).await;
    let cert = || fs::read_to_string(scene.dir().join("a-keys/ca.crt")).unwrap();
    assert_eq!(Trust::from_pem(cert().as_bytes(), None).unwrap().cas(), 1);
    assert_eq!(cert().trim(), made.cert.trim().replace("\r\n", "\n"));
    member.sees("the nodes are listed", |view| view.listed).await;
    let after = scene.secrets().get("weft-ca").await.unwrap();
    assert_eq!(before.metadata.resource_version, after.metadata.resource_version);

    // It is replaced: the one before is retired, for all that come later, too.
    let next = Ca::create(now).unwrap();
    let replaced = json!({"data": {"tls.crt": bytes(&next.cert), "tls.key": bytes(&next.key)}});
    scene.secrets().patch("weft-ca", &PatchParams::default(), &Patch::Merge(replaced)).await.unwrap();
    let lf = |pem: &str| pem.trim().replace("\r\n", "\n");
    until("both are believed, and the old one signs", async || {
        check(Trust::from_pem(cert().as_bytes(), None)?.cas() == 2, "not yet")
    })
    .await;
    assert_eq!(lf(&fs::read_to_string(scene.dir().join("a-keys/ca.key")).unwrap()), lf(&made.key));
    until("the CA is taken up and the other retired", async || {
        let retired = fs::read_to_string(scene.dir().join("a-keys/retired.crt")).unwrap_or_default();
        let noted =
            scene.secrets().get("weft-ca").await?.data.is_some_and(|data| data.contains_key("retired.crt"));
        check(cert().trim() == lf(&next.cert), "not taken up")?;
        check(noted && retired.trim() == lf(&made.cert), "not retired")
    })
    .await;
    scene.end().await;
}

#[tokio::test]
async fn an_agreement_that_somebody_removes_is_written_down_again() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    scene.make_node("a", "192.0.2.1", json!({})).await;
    scene.make_node("b", "192.0.2.2", json!({})).await;
    let mut member = scene.member("a", &relay).await;
    member.sees("the nodes are listed", |view| view.listed).await;
    let seed = data(&scene, "seed").await.unwrap();
    assert_eq!(seed, format!(r#"{{"nodes":["{}"]}}"#, scene.name("a")));
    let emptied = ConfigMap { data: None, ..scene.maps().get("weft-seed").await.unwrap() };
    scene.maps().replace("weft-seed", &Default::default(), &emptied).await.unwrap();
    until("it is there again", async || check(data(&scene, "seed").await? == seed, "another")).await;
    // Also before anybody who runs has seen it: who has been part of it knows.
    drop(member);
    scene
        .maps()
        .patch("weft-seed", &PatchParams::default(), &Patch::Merge(json!({"data": null})))
        .await
        .unwrap();
    fs::remove_dir_all(scene.dir().join("a-keys")).unwrap();
    let rebooted = scene.join("a", &relay).await;
    assert!(!rebooted.elected);
    assert_eq!(scene.join("b", &relay).await.cache.seeds, rebooted.cache.seeds);
    scene.end().await;
}

#[tokio::test]
async fn a_gone_nodes_space_goes_to_one_of_many_that_want_it() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    let mut members = Vec::new();
    for n in 0..5 {
        scene.make_node(&format!("n{n}"), &format!("192.0.2.{n}"), json!({})).await;
        members.push(scene.member(&format!("n{n}"), &relay).await);
    }
    let gone = scene.make_node("gone", "192.0.2.9", json!({})).await.metadata;
    let (name, uid) = (gone.name.unwrap().parse().unwrap(), Uid(gone.uid.unwrap()));
    assert!(!members[0].handle.is_gone(&name, &uid).await.unwrap());
    scene.delete_node("gone").await;
    let mut takers = Vec::new();
    for member in &members {
        assert!(member.handle.is_gone(&name, &uid).await.unwrap());
        takers.extend(member.handle.take_over(&name, &uid, 3, |_| true).await.unwrap());
    }
    assert_eq!((takers.len(), takers[0].epoch), (1, 3));
    for member in &mut members {
        member.sees("the takeover", |view| view.board.takeovers == takers).await;
    }
    // A node of that name that comes later is another.
    scene.make_node("gone", "192.0.2.9", json!({})).await;
    assert!(members[0].handle.is_gone(&name, &uid).await.unwrap());
    drop(members);
    scene.end().await;
}

#[tokio::test]
async fn what_is_missing_or_wrong_is_said_and_waited_for() {
    let scene = Scene::new().await;
    let relay = scene.relay();
    let joining = tokio::spawn(join::join(scene.settings("late", &relay)));
    // The Node comes after its agent.
    scene.make_node("late", "192.0.2.1", json!({})).await;
    tokio::time::timeout(crate::harness::SOON, joining).await.expect("it asks again").unwrap().unwrap();
    scene.end().await;
}
