//! Network policies of a cluster, by list and watch. Needs root.
use std::{fs, process::Command};

use anyhow::ensure;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::{
    Api,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind},
};
use serde_json::json;
use weft_lab::{relay::Quality, wait};

use crate::cluster::{Cluster, START};

#[test]
fn network_policies_outlive_the_api_server_and_an_agents_restart() {
    let cluster = Cluster::new(1);
    let (node, scene) = (&cluster.lab.nodes()[0], &cluster.scene);
    node.configure(|settings| {
        settings.more.iter_mut().filter(|argument| *argument == "off").for_each(|it| *it = "on".into());
        settings.more.extend(["--cluster-network-policy".into(), "on".into()]);
    });
    let deny = json!({"metadata": {"name": "deny"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}});
    let ours = json!({"matchLabels": {"kubernetes.io/metadata.name": scene.id}});
    let admin = json!({"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": scene.id}, "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": ours},
        "egress": [{"action": "Deny", "to": [{"networks": ["192.0.2.0/24"]}]}]}});
    let kind = GroupVersionKind::gvk("policy.networking.k8s.io", "v1alpha2", "ClusterNetworkPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "clusternetworkpolicies");
    let (own, all): (Api<NetworkPolicy>, Api<DynamicObject>) =
        (Api::namespaced(scene.client.clone(), &scene.id), Api::all_with(scene.client.clone(), &resource));
    let uids = cluster.runtime.block_on(async {
        scene.make(&own, deny).await;
        scene.make(&all, admin).await;
        let made = [scene.make_pod("web", "n1").await, scene.make_pod("later", "n1").await];
        made.map(|pod| pod.metadata.uid.unwrap())
    });
    let add = |name: &str, uid: &str| {
        let pod = cluster.lab.add_pod(node).unwrap();
        let mut call = pod.call("ADD");
        let pod_args = format!("K8S_POD_NAMESPACE={};K8S_POD_NAME={name};K8S_POD_UID={uid}", scene.id);
        call.args = Some(format!("IgnoreUnknown=1;{pod_args}"));
        wait::until("ADD works", START, || call.run(node)?.check("ADD").map(drop)).unwrap();
    };
    let chains = || {
        let mut list = Command::new("nft");
        let listed = node.exec({
            list.args(["list", "table", "inet", "weft-policy"]);
            list
        })?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&listed.stdout).into_owned())
    };
    let enforced = |pods: usize| {
        let table = chains()?;
        let (policy, tier) = (format!("jump in/{}/deny", scene.id), "jump admin-out-");
        ensure!(table.contains(&policy) && table.contains(tier) && table.contains("192.0.2.0/24"), "{table}");
        let itself =
            table.lines().filter(|line| line.contains(" . 10.")).flat_map(|line| line.matches(" . 10."));
        ensure!(itself.count() == pods, "{table}");
        Ok(())
    };
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    add("web", &uids[0]);
    enforced(1).unwrap();
    wait::until("what is known is written down", START, || {
        fs::read_to_string(node.state_dir().join("policy-cache.json"))?;
        Ok(())
    })
    .unwrap();

    cluster.relays[0].close();
    node.stop_agent().unwrap();
    let mut delete = Command::new("nft");
    delete.args(["delete", "table", "inet", "weft-policy"]);
    assert!(node.exec(delete).unwrap().status.success());
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    wait::until("policies are in force again", START, || enforced(1)).unwrap();
    add("later", &uids[1]);
    enforced(2).unwrap();
    cluster.runtime.block_on(all.delete(&scene.id, &DeleteParams::default())).unwrap();
    cluster.relays[0].set(Quality::Good);
    wait::until("what has changed meanwhile counts", START, || {
        let table = chains()?;
        ensure!(!table.contains("jump admin-out-") && table.contains("/deny"), "{table}");
        Ok(())
    })
    .unwrap();
    cluster.end();
}
