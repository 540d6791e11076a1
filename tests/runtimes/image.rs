//! The image in a real containerd, run as the manifests say: their arguments, mounts and rights.
use std::{fs, path::Path, process::Command};

use anyhow::ensure;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    batch::v1::Job,
    core::v1::{Container, EnvVar},
};
use serde::de::DeserializeOwned;
use weft_lab::{
    Lab,
    binaries::Binaries,
    image,
    runtime::{
        Containerd, Version,
        cri::{
            Capabilities, ContainerConfig, ContainerMetadata, ContainerSecurityContext, HOST_NAMESPACE,
            ImageSpec, KeyValue, LinuxContainerConfig, Mount, NamespaceOption, PodSandboxConfig,
            SecurityProfile,
        },
    },
    wait,
};

use crate::cluster::{SOON, reaches};

#[test]
fn the_image_runs_as_the_manifests_say_and_leaves_a_clean_node() {
    let lab = Lab::builder().nodes(1).without_agents().start().unwrap();
    let node = lab.node("n1").unwrap();
    let runtime = Containerd::start(&node, lab.claim(), Version::V2).unwrap();
    let archive = node.state_dir().with_file_name("weft.tar");
    image::assemble(&archive).unwrap();
    assert!(fs::metadata(&archive).unwrap().len() < 40 << 20);
    runtime.load(&archive).unwrap();
    fs::remove_file(runtime.bin_dir().join("weft-cni")).unwrap();

    let pod = object::<DaemonSet>("weft.yaml", "DaemonSet").spec.unwrap().template.spec.unwrap();
    let (sandbox, config) = runtime.run_on_host("weft").unwrap();
    let start = |container: &Container| start(&lab, &runtime, (&sandbox, &config), container).unwrap();
    start(&pod.init_containers.unwrap()[0]);
    wait::until("the shim is installed", SOON, || {
        ensure!(runtime.bin_dir().join("weft-cni").exists());
        Ok(())
    })
    .unwrap();
    let agent = start(&pod.containers[0]);
    runtime.wait_network(SOON).unwrap();
    let status = runtime.client().exec(&agent, &["/usr/bin/weft", "status"]).unwrap();
    assert!(status.contains("ready       yes"), "{status}");
    for what in ["live", "ready"] {
        runtime.client().exec(&agent, &["/usr/bin/weft", "probe", what]).unwrap();
    }

    let attached = runtime.run_pod("web").unwrap();
    reaches(node.netns(), &attached);
    runtime.remove(&attached.id).unwrap();
    drop(attached);

    runtime.remove(&sandbox).unwrap();
    let uninstall = object::<Job>("uninstall.yaml", "Job").spec.unwrap().template.spec.unwrap();
    let (sandbox, config) = runtime.run_on_host("uninstall").unwrap();
    self::start(&lab, &runtime, (&sandbox, &config), &uninstall.containers[0]).unwrap();
    wait::until("nothing of Weft is left", SOON, || {
        let links = node.netns().links(async |links| links.names().await)?;
        ensure!(!links.iter().any(|name| name.starts_with("weft")), "{links:?}");
        let left = [runtime.bin_dir().join("weft-cni"), runtime.conf_dir().join("10-weft.conflist")];
        let said = || fs::read_to_string(Path::new(&config.log_directory).join("uninstall.log"));
        ensure!(!left.iter().any(|path| path.exists()), "it said: {:?}", said());
        ensure!(fs::read_dir(node.state_dir())?.count() == 0);
        Ok(())
    })
    .unwrap();
    runtime.remove(&sandbox).unwrap();
    drop(runtime);
    lab.finish().unwrap();
}

#[test]
fn the_images_shim_runs_on_a_node_without_any_library() {
    let root = tempfile::tempdir().unwrap();
    fs::copy(Binaries::static_shim().unwrap(), root.path().join("weft-cni")).unwrap();
    let output = Command::new("chroot").arg(root.path()).arg("/weft-cni").output().unwrap();
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stderr).contains("1.1.0"),
        "{output:?}"
    );
}

/// As kubelet would, but that the host's paths are the lab's, and that there is no API server.
fn start(
    lab: &Lab,
    runtime: &Containerd,
    (sandbox, of): (&str, &PodSandboxConfig),
    container: &Container,
) -> anyhow::Result<String> {
    let node = runtime.node();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mount = |mount: &k8s_openapi::api::core::v1::VolumeMount| {
        let path = mount.mount_path.as_str();
        let (host_path, container_path) = match path {
            "/opt/cni/bin" => (text(&runtime.bin_dir()), path.into()),
            "/etc/cni/net.d" => (text(&runtime.conf_dir()), path.into()),
            "/var/lib/weft" => (text(&node.state_dir()), path.into()),
            // The shim finds the socket by the agent's own path.
            "/run/weft" => (text(&node.run_dir()), text(&node.run_dir())),
            "/run/probe" => (text(&node.run_dir().with_file_name("probe")), path.into()),
            "/dev/net/tun" => (path.into(), path.into()),
            "/host/proc/sys/net" => ("/proc/sys/net".into(), path.into()),
            other => panic!("where is {other}?"),
        };
        fs::create_dir_all(&host_path)
            .or_else(|error| if path.starts_with("/dev") { Ok(()) } else { Err(error) })?;
        anyhow::Ok(Mount { container_path, host_path, readonly: false })
    };
    let mut mounts = container.volume_mounts.iter().flatten().map(mount).collect::<Result<Vec<_>, _>>()?;
    let keys = text(lab.ca_dir());
    mounts.push(Mount { container_path: "/ca".into(), host_path: keys, readonly: true });
    let environment = [
        ("WEFT_NAME", node.name().to_string()),
        ("WEFT_ADVERTISE", node.address().to_string()),
        ("WEFT_CA_DIR", "/ca".into()),
        ("WEFT_IPAM_SEED", node.name().to_string()),
        ("WEFT_RUN_DIR", text(&node.run_dir())),
    ];
    let rights = container.security_context.clone().unwrap();
    let capabilities = rights.capabilities.unwrap();
    let security = ContainerSecurityContext {
        capabilities: Some(Capabilities {
            add_capabilities: capabilities.add.unwrap_or_default(),
            drop_capabilities: capabilities.drop.unwrap_or_default(),
        }),
        namespace_options: Some(NamespaceOption { network: HOST_NAMESPACE }),
        readonly_rootfs: rights.read_only_root_filesystem.unwrap_or_default(),
        no_new_privs: rights.allow_privilege_escalation == Some(false),
        seccomp: Some(SecurityProfile { profile_type: 0 }),
    };
    let no_cluster = |argument: &&String| *argument != "--kubernetes";
    let config = ContainerConfig {
        metadata: Some(ContainerMetadata { name: container.name.clone() }),
        image: Some(ImageSpec { image: container.image.clone().unwrap() }),
        args: container.args.iter().flatten().filter(no_cluster).cloned().collect(),
        envs: environment
            .map(|(key, value)| KeyValue { key: key.into(), value })
            .into_iter()
            .chain(container.env.iter().flatten().filter_map(literal))
            .collect(),
        mounts,
        log_path: format!("{}.log", container.name),
        linux: Some(LinuxContainerConfig { security_context: Some(security) }),
        ..ContainerConfig::default()
    };
    runtime.client().run_container(sandbox, of, config)
}

/// A variable that the manifest sets itself.
fn literal(variable: &EnvVar) -> Option<KeyValue> {
    Some(KeyValue { key: variable.name.clone(), value: variable.value.clone()? })
}

fn object<T: DeserializeOwned>(file: &str, kind: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    let text = fs::read_to_string(path).unwrap();
    let documents = text.split("\n---\n").filter(|document| document.contains(&format!("\nkind: {kind}\n")));
    let document = documents.last().unwrap_or_else(|| panic!("{file} has no {kind}"));
    serde_saphyr::from_str(document).unwrap()
}
