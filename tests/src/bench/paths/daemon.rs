//! A process of somebody else's overlay; it ends with its handle, and with the lab.
use std::{
    fs::File,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::Context;
use nix::unistd::Pid;

use crate::{Lab, agent, node::Node, process::Process};

pub struct Daemon {
    child: Child,
    process: Process,
    log: PathBuf,
}

impl Daemon {
    /// Starts it on the node; what it prints goes to the log.
    pub fn start(
        lab: &Lab,
        node: &Node,
        name: &str,
        mut command: Command,
        log: PathBuf,
    ) -> anyhow::Result<Self> {
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // Ctrl-C is for the lab, which then ends it.
        command.process_group(0);
        let child = lab.sandbox().spawn(node.netns(), command).with_context(|| format!("start {name}"))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let process = Process::of(pid)
            .with_context(|| format!("{name} on {} ended at once:\n{}", node.name(), agent::tail(&log)))?;
        lab.claim().note(process).with_context(|| format!("note the process of {name}"))?;
        Ok(Self { child, process, log })
    }

    pub fn process(&self) -> Process {
        self.process
    }

    pub fn log_tail(&self) -> String {
        agent::tail(&self.log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only for a process that has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
