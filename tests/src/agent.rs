//! One agent's process: every agent of every lab starts through [`Agent::start`].
use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    binaries::Binaries, claim::Claim, clock::Clock, linux, namespace::Netns, process::Process,
    sandbox::NETNS_DIR, tools, wait,
};

/// What an agent is told on its command line. Flags and keys that all agents get are added in `arguments`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Another `weft` than the one that was built.
    pub program: Option<PathBuf>,
    pub name: String,
    pub advertise: String,
    pub peers: Vec<String>,
    /// `--ca-dir`; without it what `more` says.
    pub ca_dir: Option<PathBuf>,
    pub universe: Option<String>,
    /// `--ipam-seed`; a joiner has none.
    pub seed: Option<String>,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub log: PathBuf,
    /// A wall clock of its own.
    pub clock: Option<Arc<Clock>>,
    /// Filter for `--log`.
    pub verbosity: String,
    /// With `CAP_NET_ADMIN` only, on a read-only file system.
    pub confined: bool,
    /// Appended as they are.
    pub more: Vec<String>,
}

pub struct Agent {
    child: Child,
    process: Process,
    log: PathBuf,
    name: String,
}

impl Settings {
    /// `weft agent` as it is started, but for where its output goes. Nothing of the lab's own `WEFT_*` is passed on.
    pub fn command(&self, binaries: &Binaries) -> Command {
        let mut command = Command::new(self.program.as_ref().unwrap_or(&binaries.weft));
        command.args(self.arguments()).stdin(std::process::Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("WEFT_")) {
                command.env_remove(name);
            }
        }
        command.env("PATH", tools::path_variable());
        self.clock.iter().for_each(|clock| clock.give(&mut command));
        command
    }

    fn confine(&self, command: &mut Command) -> anyhow::Result<()> {
        let root = self.log.with_file_name("root");
        for directory in [&root, &self.state_dir, &self.run_dir] {
            fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        }
        let writable = [self.state_dir.clone(), self.run_dir.clone()];
        Ok(linux::confine(command, &root, Path::new(NETNS_DIR), &writable)?)
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["agent".into()];
        let mut flag = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        flag("--name", self.name.as_str().into());
        flag("--advertise", self.advertise.as_str().into());
        flag("--state-dir", self.state_dir.as_os_str().into());
        flag("--run-dir", self.run_dir.as_os_str().into());
        flag("--metrics-addr", METRICS.into());
        flag("--log", self.verbosity.as_str().into());
        self.ca_dir.iter().for_each(|dir| flag("--ca-dir", dir.into()));
        self.peers.iter().for_each(|peer| flag("--peer", peer.into()));
        self.universe.iter().for_each(|universe| flag("--universe", universe.into()));
        self.seed.iter().for_each(|seed| flag("--ipam-seed", seed.into()));
        arguments.extend(self.more.iter().map(OsString::from));
        arguments
    }
}

impl Agent {
    /// Starts `weft agent` in the node's namespace; its output is appended to the log.
    pub fn start(
        binaries: &Binaries,
        claim: &Claim,
        node: &Netns,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&settings.log)
            .with_context(|| format!("open {}", settings.log.display()))?;
        let mut command = settings.command(binaries);
        command.stdout(log.try_clone()?).stderr(log);
        if settings.confined {
            settings.confine(&mut command).context("confine the agent")?;
        }
        // Ctrl-C is for the lab, which then ends the agents.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = node
            .sandbox()
            .spawn(node, command)
            .with_context(|| format!("start {}", binaries.weft.display()))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let process = Process::of(pid)
            .with_context(|| format!("agent {} ended at once:\n{}", settings.name, tail(&settings.log)))?;
        claim.note(process).context("note the agent's process")?;
        Ok(Self { child, process, log: settings.log.clone(), name: settings.name.clone() })
    }

    pub fn process(&self) -> Process {
        self.process
    }

    /// The exit status, once it has ended.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails, with what it logged last, when it no longer runs.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.ended()? {
            Some(status) => bail!("agent {} ended, {status}:\n{}", self.name, tail(&self.log)),
            None => Ok(()),
        }
    }

    /// Sends SIGTERM and waits for the end; an agent that needs too long is killed, and that is an error.
    pub fn stop(mut self) -> anyhow::Result<ExitStatus> {
        self.terminate();
        let name = self.name.clone();
        wait::until(&format!("agent {name} ends on SIGTERM"), END, || {
            self.ended()?.with_context(|| format!("it still runs, its threads are in {}", self.waits()))
        })
    }

    /// Where in the kernel each of its threads is; `0` for one that runs.
    fn waits(&self) -> String {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten();
        let wait = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("wchan")).ok();
        threads.filter_map(wait).collect::<Vec<_>>().join(", ")
    }

    /// Asks it to end, without waiting.
    pub fn terminate(&self) {
        // It may have ended by itself: then there is nothing to ask for.
        let _ = self.process.signal(Signal::SIGTERM);
    }

    /// Ends it at once, as the kernel's out-of-memory killer would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail only for a process that was waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of a log.
pub fn tail(log: &std::path::Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(30)..];
    shown.iter().map(|line| format!("    {line}\n")).collect()
}

/// Each node has a namespace of its own, so all can use the default.
pub const METRICS: &str = "127.0.0.1:6782";

/// An agent's end: calls under way are answered, links ended, writes on disk.
const END: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_told_what_is_set_and_nothing_else() {
        let settings = Settings {
            program: None,
            name: "n1".into(),
            advertise: "192.0.2.1".into(),
            peers: vec!["192.0.2.2".into(), "192.0.2.3".into()],
            ca_dir: Some("/ca".into()),
            universe: None,
            seed: Some("n1,n2,n3".into()),
            state_dir: "/s".into(),
            run_dir: "/r".into(),
            log: "/l".into(),
            clock: None,
            verbosity: "info".into(),
            confined: false,
            more: vec!["--mtu".into(), "1300".into()],
        };
        let line: Vec<_> =
            settings.arguments().iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
        assert_eq!(
            line.join(" "),
            "agent --name n1 --advertise 192.0.2.1 --state-dir /s --run-dir /r --metrics-addr 127.0.0.1:6782 \
             --log info --ca-dir /ca --peer 192.0.2.2 --peer 192.0.2.3 --ipam-seed n1,n2,n3 --mtu 1300"
        );
    }
}
