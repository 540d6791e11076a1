//! Calls of the real `weft-cni`, as a container runtime makes them.
use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::{linux, node::Node};

/// One call: environment and standard input. Fields that are `None` are not in the environment.
#[derive(Clone, Debug)]
pub struct Call {
    pub command: Option<String>,
    pub container_id: Option<String>,
    pub netns: Option<PathBuf>,
    pub ifname: Option<String>,
    pub args: Option<String>,
    /// More of the environment.
    pub more: Vec<(String, String)>,
    pub stdin: Vec<u8>,
}

/// What the shim answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// It exited with 0.
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Call {
    pub fn new(command: &str, container_id: &str, netns: impl Into<PathBuf>, config: &Value) -> Self {
        Self {
            command: Some(command.into()),
            container_id: Some(container_id.into()),
            netns: Some(netns.into()),
            ifname: Some("eth0".into()),
            args: None,
            more: Vec::new(),
            stdin: config.to_string().into_bytes(),
        }
    }

    /// Calls the shim in the node's network namespace and in the lab's mounts.
    pub fn run(&self, node: &Node) -> anyhow::Result<Answer> {
        let shim = &node.binaries()?.weft_cni;
        let mut command = Command::new(shim);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("CNI_PATH", shim.parent().expect("a file lies in a directory"));
        let mut set = |name: &str, value: Option<&std::ffi::OsStr>| {
            value.map(|value| command.env(name, value));
        };
        set("CNI_COMMAND", self.command.as_ref().map(AsRef::as_ref));
        set("CNI_CONTAINERID", self.container_id.as_ref().map(AsRef::as_ref));
        set("CNI_NETNS", self.netns.as_ref().map(AsRef::as_ref));
        set("CNI_IFNAME", self.ifname.as_ref().map(AsRef::as_ref));
        set("CNI_ARGS", self.args.as_ref().map(AsRef::as_ref));
        command.envs(self.more.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        linux::die_with_spawner(&mut command);
        node.netns().sandbox().run(|| {
            node.netns().enter()?;
            let start = Instant::now();
            let mut child = command.spawn().with_context(|| format!("start {}", shim.display()))?;
            let mut stdin = child.stdin.take().expect("stdin is a pipe");
            // A shim that answers without reading closes the pipe: that is its right.
            let _ = stdin.write_all(&self.stdin);
            drop(stdin);
            let output = child.wait_with_output()?;
            Ok(Answer {
                success: output.status.success(),
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
                took: start.elapsed(),
            })
        })
    }
}

impl Answer {
    /// The one JSON document on standard output.
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("the shim's output is not one JSON document: `{}`", self.stdout))
    }

    /// Fails with the shim's own words when it did.
    pub fn check(&self, what: &str) -> anyhow::Result<()> {
        if self.success {
            return Ok(());
        }
        match self.json() {
            Ok(error) => bail!("{what}: {} (code {}) {}", error["msg"], error["code"], error["details"]),
            Err(_) => bail!("{what}: weft-cni failed with `{}` and `{}`", self.stdout, self.stderr),
        }
    }
}

/// The network configuration that a runtime passes for this node, without the keys that it adds itself.
pub fn config(node: &Node) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "weft",
        "type": "weft-cni",
        "socket": node.socket(),
        "runDir": node.run_dir(),
    })
}
