//! podman with its CNI back end: another client of the conflist than containerd.
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::ensure;
use weft_lab::{
    Lab,
    claim::Claim,
    debian::Suite,
    node::Node,
    runtime::{
        cgroup::Cgroup,
        image::{POD_IMAGE, pod_image},
    },
    tools, wait,
};

use crate::cluster::{SOON, attachments};

#[test]
fn podman_runs_a_container_on_the_overlay() {
    let lab = Lab::builder().nodes(2).without_agents().start().unwrap();
    let podman = Podman::new(&lab.node("n1").unwrap(), lab.claim());
    for node in lab.nodes() {
        node.configure(|settings| {
            settings.more.extend(["--cni-conf-dir".into(), podman.conf_dir().display().to_string()]);
        });
    }
    // One conflist is enough: podman runs on the first node only.
    lab.node("n2").unwrap().configure(|settings| settings.more.clear());
    for node in lab.nodes() {
        node.start_agent().unwrap();
    }
    for node in lab.nodes() {
        node.wait_ready(SOON).unwrap();
    }
    let peer = lab.add_pod(&lab.node("n2").unwrap()).unwrap();
    let target = peer.attach().unwrap().address.to_string();

    podman.run(&["load", "--input", pod_image(&podman.disk).unwrap().to_str().unwrap()]).unwrap();
    let how =
        ["--rm", "--network", "weft", "--cgroup-parent", podman.cgroup.name(), "--entrypoint", "/bin/ping"];
    let ping = [&["run"][..], &how, &[POD_IMAGE, "-c", "1", "-W", "2", &target]].concat();
    let said =
        wait::until("a container reaches a pod of the other node", SOON, || podman.run(&ping)).unwrap();
    assert!(said.contains("1 packets received"), "{said}");
    assert_eq!(attachments(&podman.node).len(), 0, "its address is free again");
    drop(podman);
    lab.finish().unwrap();
}

struct Podman {
    node: Arc<Node>,
    disk: PathBuf,
    cgroup: Cgroup,
}

impl Podman {
    fn new(node: &Arc<Node>, claim: &Claim) -> Self {
        let disk = node.state_dir().with_file_name("podman");
        for directory in ["bin", "net.d", "root", ".config/containers"] {
            fs::create_dir_all(disk.join(directory)).unwrap();
        }
        for plugin in ["portmap", "bandwidth", "loopback"] {
            fs::copy(Suite::plugins().unwrap().join(plugin), disk.join("bin").join(plugin)).unwrap();
        }
        fs::copy(&node.binaries().unwrap().weft_cni, disk.join("bin/weft-cni")).unwrap();
        let podman = Self { node: Arc::clone(node), disk, cgroup: Cgroup::new(node, claim) };
        podman.write(
            ".config/containers/policy.json",
            r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
            0o644,
        );
        podman.write("registries.conf", "", 0o644);
        let runc = Suite::Bookworm.program("runc").unwrap();
        podman.write("runc", &WRAPPER.replace("RUNC", &runc.display().to_string()), 0o755);
        let run = podman.node.run_dir().join("podman");
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}/root\"\nrunroot = \"{}\"\n",
            podman.disk.display(),
            run.display()
        );
        podman.write("storage.conf", &storage, 0o644);
        let (disk, conmon) = (podman.disk.display(), Suite::Bookworm.program("conmon").unwrap());
        let configuration = format!(
            r#"
[network]
network_backend = "cni"
network_config_dir = "{disk}/net.d"
cni_plugin_dirs = ["{disk}/bin"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
static_dir = "{disk}/static"
tmp_dir = "{disk}/tmp"
volume_path = "{disk}/volumes"
runtime = "wrapped"
conmon_path = ["{}"]
[engine.runtimes]
wrapped = ["{disk}/runc"]
[containers]
pids_limit = 0
default_ulimits = []
"#,
            conmon.display()
        );
        podman.write("containers.conf", &configuration, 0o644);
        podman
    }

    fn conf_dir(&self) -> PathBuf {
        self.disk.join("net.d")
    }

    fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new("unshare");
        let dir = |name: &str| self.disk.join(name);
        command
            .args(["--mount", "--", "sh", "-c", INIT])
            .arg(Suite::Bookworm.program("podman")?)
            .args(arguments);
        let libraries =
            Suite::Bookworm.root()?.join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
        command.env("LD_LIBRARY_PATH", libraries).env("PATH", tools::path_variable());
        command.env("CONTAINERS_CONF", dir("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", dir("storage.conf"));
        command.env("CONTAINERS_REGISTRIES_CONF", dir("registries.conf"));
        command.env("TMPDIR", dir("root")).env("HOME", &self.disk);
        let output = self.node.exec(command)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "podman {arguments:?}: {out}{err}");
        Ok(out.into_owned())
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path: &Path = &self.disk.join(name);
        fs::File::create(path).unwrap().write_all(text.as_bytes()).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}

/// What libcni remembers has a fixed place.
const INIT: &str = "mkdir -p /var/lib/cni && mount -t tmpfs podman /var/lib/cni && exec \"$0\" \"$@\"";
/// A machine that lacks `CAP_SYS_RESOURCE` can't raise limits, which podman always asks for.
const WRAPPER: &str = r#"#!/bin/sh
bundle=
previous=
for argument; do
    case $previous in --bundle|-b) bundle=$argument ;; esac
    previous=$argument
done
if [ -n "$bundle" ]; then
    sed -i 's/"rlimits":\[[^]]*\],\{0,1\}//' "$bundle/config.json"
fi
exec RUNC "$@"
"#;
