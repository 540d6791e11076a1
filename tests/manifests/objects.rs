//! Every object as Kubernetes' own types have it.
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    batch::v1::Job,
    core::v1::{ConfigMap, Container, PodSpec, Secret, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::chart::{documents, render, text, values};

#[test]
fn every_object_is_one_that_kubernetes_knows() {
    for file in ["weft.yaml", "uninstall.yaml"] {
        let objects = documents(&text(file));
        assert!(!objects.is_empty());
        objects.iter().for_each(known);
    }
}

#[test]
fn every_value_of_the_chart_renders_to_what_kubernetes_knows() {
    let mut values = values();
    for (path, value) in [
        ("/image/tag", json!("1.2.3")),
        ("/image/pullSecrets", json!([{ "name": "key" }])),
        ("/mtu", json!(1300)),
        ("/noMasquerade", json!(["192.0.2.0/24"])),
        ("/clusterNetworkPolicy", json!(true)),
        ("/extraArgs", json!(["--data-threads=2"])),
        ("/extraEnv", json!([{ "name": "WEFT_POLL_US", "value": "0" }])),
        ("/privileged", json!(true)),
        ("/maxSurge", json!("10%")),
        ("/podMonitor", json!({ "enabled": true, "labels": { "release": "p" } })),
        ("/prometheusRule", json!({ "enabled": true, "labels": { "release": "p" } })),
    ] {
        *values.pointer_mut(path).expect(path) = value;
    }
    let objects = documents(&render(values));
    let of_operator = |object: &&Value| object["apiVersion"] == "monitoring.coreos.com/v1";
    let kinds: Vec<_> = objects.iter().filter(of_operator).map(|object| &object["kind"]).collect();
    assert_eq!(kinds, ["PodMonitor", "PrometheusRule"]);
    assert!(objects.iter().filter(of_operator).all(|object| object["metadata"]["labels"]["release"] == "p"));
    objects.iter().filter(|object| !of_operator(object)).for_each(known);

    let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let agent = &daemon_set["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(agent["image"], "localhost/weft:1.2.3");
    assert_eq!(agent["securityContext"]["privileged"], true);
    let arguments = agent["args"].as_array().unwrap();
    for argument in ["--mtu=1300", "--no-masquerade=192.0.2.0/24", "--data-threads=2"] {
        assert!(arguments.contains(&argument.into()), "{arguments:?}");
    }
    assert_eq!(agent["env"].as_array().unwrap().last().unwrap()["name"], "WEFT_POLL_US");
}

#[test]
fn the_agent_is_not_privileged_and_mounts_only_what_it_needs() {
    let spec = agents_pod();
    assert_eq!((spec.host_network, spec.host_pid, spec.host_ipc), (Some(true), None, None));
    let [agent, install] = [&spec.containers[0], &spec.init_containers.as_ref().unwrap()[0]];
    for (container, capability) in [(agent, "NET_ADMIN"), (install, "DAC_OVERRIDE")] {
        let context = container.security_context.as_ref().unwrap();
        assert_eq!(context.privileged, None);
        assert_eq!(context.allow_privilege_escalation, Some(false));
        assert_eq!(context.read_only_root_filesystem, Some(true));
        let capabilities = context.capabilities.as_ref().unwrap();
        assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_string()][..]));
        assert_eq!(capabilities.add.as_deref(), Some(&[capability.to_string()][..]));
    }
    let mounts = |container: &Container| -> Vec<String> {
        container.volume_mounts.iter().flatten().map(|mount| mount.mount_path.clone()).collect()
    };
    assert_eq!(mounts(install), ["/opt/cni/bin"]);
    let own =
        ["/etc/cni/net.d", "/run/weft", "/run/probe", "/var/lib/weft", "/dev/net/tun", "/host/proc/sys/net"];
    assert_eq!(mounts(agent), own);
    let paths: Vec<_> =
        spec.volumes.iter().flatten().filter_map(|volume| volume.host_path.as_ref()).collect();
    let paths: Vec<_> = paths.iter().map(|path| path.path.as_str()).collect();
    let wanted =
        ["/opt/cni/bin", "/etc/cni/net.d", "/run/weft", "/var/lib/weft", "/dev/net/tun", "/proc/sys/net"];
    assert_eq!(paths, wanted);
    assert!(
        spec.containers.iter().all(|container| container.ports.is_none()),
        "no port of the host's is declared"
    );
}

#[test]
fn secret_and_config_map_ship_empty_so_that_applying_again_keeps_what_the_agents_wrote() {
    let objects = documents(&text("weft.yaml"));
    for name in ["weft-ca", "weft-seed"] {
        let object = objects.iter().find(|object| object["metadata"]["name"] == name).unwrap();
        for key in ["data", "stringData", "binaryData", "immutable"] {
            assert!(object.get(key).is_none(), "{name} has {key}");
        }
    }
}

#[test]
fn what_containers_are_told_is_what_weft_understands() {
    let uninstall: Job = serde_json::from_value(documents(&text("uninstall.yaml")).remove(0)).unwrap();
    let uninstall = uninstall.spec.unwrap().template.spec.unwrap();
    let agents = agents_pod();
    let containers = agents.containers.iter().chain(agents.init_containers.iter().flatten());
    for container in containers.chain(&uninstall.containers) {
        let arguments: Vec<&str> = container.args.iter().flatten().map(String::as_str).collect();
        let parsed = <weft::cli::Cli as clap::Parser>::try_parse_from([&["weft"], &arguments[..]].concat());
        parsed.unwrap_or_else(|error| panic!("{}: {error}", container.name));
        let weft = <weft::cli::Cli as clap::CommandFactory>::command();
        let command = weft.find_subcommand(arguments[0]).unwrap();
        let twins: Vec<_> =
            command.get_arguments().filter_map(|argument| argument.get_env()?.to_str()).collect();
        for variable in container.env.iter().flatten() {
            assert!(twins.contains(&variable.name.as_str()), "{} is no flag's: {twins:?}", variable.name);
        }
    }
}

fn agents_pod() -> PodSpec {
    let objects = documents(&text("weft.yaml"));
    let daemon_set = objects.into_iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let daemon_set: DaemonSet = serde_json::from_value(daemon_set).unwrap();
    daemon_set.spec.unwrap().template.spec.unwrap()
}

fn known(object: &Value) {
    match (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap()) {
        ("v1", "ServiceAccount") => same::<ServiceAccount>(object),
        ("v1", "ConfigMap") => same::<ConfigMap>(object),
        ("v1", "Secret") => same::<Secret>(object),
        ("apps/v1", "DaemonSet") => same::<DaemonSet>(object),
        ("batch/v1", "Job") => same::<Job>(object),
        ("rbac.authorization.k8s.io/v1", "Role") => same::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => same::<RoleBinding>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => same::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => same::<ClusterRoleBinding>(object),
        other => panic!("{other:?}"),
    }
}

/// What the type does not know is lost on the way, and so found.
#[track_caller]
fn same<T: Serialize + DeserializeOwned>(object: &Value) {
    let typed: T = serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object}"));
    assert_eq!(serde_json::to_value(typed).unwrap(), *object);
}
