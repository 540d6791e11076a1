//! One containerd, and the pods that it runs.
use std::{
    collections::HashMap,
    env,
    fs::{self, File, OpenOptions},
    net::IpAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use serde_json::Value;

use super::{
    cgroup::Cgroup,
    cri::{
        Client, ContainerConfig, ContainerMetadata, HOST_NAMESPACE, ImageSpec, LinuxPodSandboxConfig,
        NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PortMapping, SandboxSecurityContext,
    },
    image::{self, POD_IMAGE},
};
use crate::{
    agent::tail, claim::Claim, debian::Suite, namespace::Netns, node::Node, process::Process, tools, wait,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 1.6: speaks CNI 1.0 at most, and knows no STATUS.
    V1,
    /// 2.x: speaks CNI 1.1.
    V2,
}

/// A node's container runtime; everything that it runs ends when this is dropped.
pub struct Containerd {
    node: Arc<Node>,
    version: Version,
    place: Place,
    init: Child,
    client: Client,
    cgroup: Cgroup,
}

/// Where its files are.
struct Place {
    run: PathBuf,
    disk: PathBuf,
}

/// A running sandbox.
pub struct Sandbox {
    pub id: String,
    pub address: IpAddr,
    pub netns: Netns,
    config: PodSandboxConfig,
}

impl Containerd {
    /// Starts it; its network is what lies in [`Containerd::conf_dir`] and [`Containerd::bin_dir`], which begin empty
    /// but for the plugins.
    pub fn start(node: &Arc<Node>, claim: &Claim, version: Version) -> anyhow::Result<Self> {
        let place = Place { run: node.run_dir().join("ctr"), disk: node.state_dir().with_file_name("ctr") };
        let (root, logs) = (place.disk.join("root"), place.disk.join("logs"));
        for directory in [place.bin_dir(), place.conf_dir(), root, logs, place.run.clone()] {
            fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        }
        for plugin in ["portmap", "bandwidth", "loopback", "bridge", "host-local"] {
            fs::copy(Suite::plugins()?.join(plugin), place.bin_dir().join(plugin))?;
        }
        fs::copy(&node.binaries()?.weft_cni, place.bin_dir().join("weft-cni"))?;
        let programs = version.suite().root()?.join("usr/bin");
        fs::write(place.config(), version.config(&place, &Suite::Bookworm.program("runc")?))?;

        let log = OpenOptions::new().create(true).append(true).open(place.log())?;
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--", "sh", "-c", INIT]);
        command.arg(programs.join("containerd")).arg("--config").arg(place.config());
        // Its shim has to be the one of its own version.
        let others = tools::path_variable();
        command.env("PATH", env::join_paths([programs].into_iter().chain(env::split_paths(&others)))?);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.process_group(0);
        let init = node.netns().sandbox().spawn(node.netns(), command).context("start unshare")?;
        let pid = Pid::from_raw(init.id().cast_signed());
        claim.note(Process::of(pid).context("unshare ended at once")?)?;
        let client = Client::connect(&place.socket())?;
        let cgroup = Cgroup::new(node, claim);
        let started = Self { node: Arc::clone(node), version, place, init, client, cgroup };
        started.wait_ready()?;
        started.load(&image::pod_image(&started.place.disk)?)?;
        Ok(started)
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Where the agent's `--cni-conf-dir` leads.
    pub fn conf_dir(&self) -> PathBuf {
        self.place.conf_dir()
    }

    pub fn bin_dir(&self) -> PathBuf {
        self.place.bin_dir()
    }

    /// Loads an image archive.
    pub fn load(&self, archive: &Path) -> anyhow::Result<()> {
        let mut command = Command::new(self.version.suite().program("ctr")?);
        command.arg("--address").arg(self.place.socket());
        command.args(["--namespace", "k8s.io", "images", "import"]).arg(archive);
        let output = self.node.exec(command)?;
        ensure!(output.status.success(), "ctr: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// What kubelet would ask for a pod of that name.
    pub fn pod(&self, name: &str) -> PodSandboxConfig {
        let uid = format!("{}-{name}", self.node.name());
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: name.into(), uid, namespace: "lab".into() }),
            hostname: name.into(),
            log_directory: self.place.disk.join("logs").to_string_lossy().into_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.cgroup.name()),
                security_context: None,
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// Runs a sandbox, and looks where it is.
    pub fn run(&self, config: PodSandboxConfig) -> anyhow::Result<Sandbox> {
        let id = self.client.run_pod_sandbox(&config)?;
        let status = self.client.pod_sandbox_status(&id)?;
        let address = status.status.and_then(|status| status.network).map(|network| network.ip);
        let address = address.and_then(|ip| ip.parse().ok()).context("the sandbox has no address")?;
        let info: Value = serde_json::from_str(status.info.get("info").context("no verbose status")?)?;
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
        let network = namespaces.iter().find(|namespace| namespace["type"] == "network");
        let path = network.and_then(|network| network["path"].as_str()).context("it has no namespace")?;
        // The runtime's mounts are its own: the way to them leads through one of its processes.
        let root = PathBuf::from(format!("/proc/{}/root", self.first()?.pid));
        // And past links, which would lead out of it.
        let path = path.replacen("/var/run/", "/run/", 1);
        let file = File::open(root.join(path.trim_start_matches("/"))).with_context(|| path.to_string())?;
        let name = config.metadata.as_ref().map_or("?", |metadata| &metadata.name);
        let netns = Netns::of(self.node.netns().sandbox(), &format!("{}/{name}", self.node.name()), file);
        Ok(Sandbox { id, address, netns, config })
    }

    /// Runs a pod of that name.
    pub fn run_pod(&self, name: &str) -> anyhow::Result<Sandbox> {
        self.run(self.pod(name))
    }

    /// A sandbox on the node's own network.
    pub fn run_on_host(&self, name: &str) -> anyhow::Result<(String, PodSandboxConfig)> {
        // As kubelet says it: the name is the node's.
        let mut config = PodSandboxConfig { hostname: String::new(), ..self.pod(name) };
        let on_host = NamespaceOption { network: HOST_NAMESPACE };
        let context = SandboxSecurityContext { namespace_options: Some(on_host) };
        config.linux.get_or_insert_default().security_context = Some(context);
        Ok((self.client.run_pod_sandbox(&config)?, config))
    }

    /// Starts a container in a sandbox, from the same image.
    pub fn run_container(&self, sandbox: &Sandbox, command: &[&str]) -> anyhow::Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".into() }),
            image: Some(ImageSpec { image: POD_IMAGE.into() }),
            command: command.iter().map(ToString::to_string).collect(),
            ..ContainerConfig::default()
        };
        self.client.run_container(&sandbox.id, &sandbox.config, config)
    }

    /// Stops a pod and removes it.
    pub fn remove(&self, id: &str) -> anyhow::Result<()> {
        self.client.stop_pod_sandbox(id)?;
        self.client.remove_pod_sandbox(id)
    }

    /// Kills containerd and waits for its successor; shims and pods live on.
    pub fn restart(&self) -> anyhow::Result<()> {
        let before = self.daemon()?;
        before.signal(Signal::SIGKILL).context("kill containerd")?;
        wait::until("another containerd runs", STARTED_WITHIN, || {
            ensure!(self.daemon()?.pid != before.pid);
            Ok(())
        })?;
        self.wait_ready()
    }

    /// Waits until the runtime would run pods, as kubelet sees it.
    pub fn wait_network(&self, within: Duration) -> anyhow::Result<()> {
        wait::until("the runtime's network is ready", within, || {
            let network = self.client.condition("NetworkReady")?;
            ensure!(network.status, "{}", network.message);
            Ok(())
        })
    }

    /// What it has logged last.
    pub fn log_tail(&self) -> String {
        tail(&self.place.log())
    }

    fn wait_ready(&self) -> anyhow::Result<()> {
        let ready = wait::until("containerd answers", STARTED_WITHIN, || {
            ensure!(self.client.condition("RuntimeReady")?.status);
            Ok(())
        });
        ready.with_context(|| format!("containerd on {} said:\n{}", self.node.name(), self.log_tail()))
    }

    /// Process 1 of its process namespace: the shell.
    fn first(&self) -> anyhow::Result<Process> {
        child_of(Pid::from_raw(self.init.id().cast_signed()), "sh")
    }

    fn daemon(&self) -> anyhow::Result<Process> {
        child_of(self.first()?.pid, "containerd")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("last words of containerd on {}:\n{}", self.node.name(), self.log_tail());
        }
        // Fail for a process that has ended, with which all others have.
        let first = self.first();
        let _ = self.init.kill();
        let _ = self.init.wait();
        if let Ok(first) = first {
            let _ = wait::until("the runtime's processes end", Duration::from_secs(5), || {
                ensure!(!Path::new("/proc").join(first.pid.to_string()).exists());
                Ok(())
            });
        }
    }
}

impl Place {
    fn bin_dir(&self) -> PathBuf {
        self.disk.join("bin")
    }

    fn conf_dir(&self) -> PathBuf {
        self.disk.join("net.d")
    }

    fn config(&self) -> PathBuf {
        self.disk.join("config.toml")
    }

    fn log(&self) -> PathBuf {
        self.disk.join("containerd.log")
    }

    /// Short, as sockets' paths must be.
    fn socket(&self) -> PathBuf {
        self.run.join("c.sock")
    }
}

impl Version {
    pub fn suite(self) -> Suite {
        match self {
            Self::V1 => Suite::Bookworm,
            Self::V2 => Suite::Sid,
        }
    }

    /// The configuration file. A machine without `CAP_SYS_RESOURCE` can't lower `oom_score_adj`, and is a node all the same.
    fn config(self, place: &Place, runc: &Path) -> String {
        let (disk, run, socket) = (place.disk.display(), place.run.display(), place.socket());
        let (bin, conf) = (place.bin_dir(), place.conf_dir());
        let (socket, bin, conf, runc) = (socket.display(), bin.display(), conf.display(), runc.display());
        let common = format!(
            r#"
root = "{disk}/root"
state = "{run}/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{disk}/opt"
"#
        );
        let own = match self {
            Self::V1 => format!(
                r#"
[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
sandbox_image = "{POD_IMAGE}"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin}"
conf_dir = "{conf}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runc}"
"#
            ),
            Self::V2 => format!(
                r#"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{POD_IMAGE}"
[plugins."io.containerd.grpc.v1.cri"]
stream_server_port = "0"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{bin}"]
conf_dir = "{conf}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
"#
            ),
        };
        let number = match self {
            Self::V1 => 2,
            Self::V2 => 3,
        };
        format!("version = {number}\n{common}{own}")
    }
}

/// Ports of the node that lead to the pod, with `portmap`: host port, container port.
pub fn with_ports(mut config: PodSandboxConfig, ports: &[(u16, u16)]) -> PodSandboxConfig {
    let mapping = |&(host, container): &(u16, u16)| PortMapping {
        container_port: container.into(),
        host_port: host.into(),
    };
    config.port_mappings = ports.iter().map(mapping).collect();
    config
}

/// Kubernetes' annotations for what `bandwidth` limits, such as `20M` for 20 Mbit/s.
pub fn with_bandwidth(mut config: PodSandboxConfig, ingress: &str, egress: &str) -> PodSandboxConfig {
    let (into, out) = ("kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth");
    config.annotations = HashMap::from([(into.into(), ingress.into()), (out.into(), egress.into())]);
    config
}

fn child_of(parent: Pid, name: &str) -> anyhow::Result<Process> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    let named =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    let pid = pids.find(named).with_context(|| format!("process {parent} has no child {name}"))?;
    Process::of(Pid::from_raw(pid)).with_context(|| format!("{name} has ended"))
}

/// The shim's sockets and what libcni remembers have fixed places. A shell that waits reaps whatever child ends.
const INIT: &str = "for place in /run/containerd /var/lib/cni; do
    mkdir -p $place && mount -t tmpfs containerd $place || exit 1
done
while :; do \"$0\" \"$@\"; sleep 0.1; done";
/// It takes half a second on an idle machine.
const STARTED_WITHIN: Duration = Duration::from_secs(20);
