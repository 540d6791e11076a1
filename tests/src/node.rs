//! A node: a network namespace on the underlay that plays a host, and the agent that runs on it.
use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, TcpStream},
    path::PathBuf,
    process::{Command, ExitStatus, Output},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{
    agent::{self, Agent, Settings},
    binaries::Binaries,
    claim::Claim,
    linux,
    namespace::Netns,
    process::Process,
    sandbox::Sandbox,
    underlay::Underlay,
    wait,
};

pub struct Node {
    name: String,
    address: Mutex<IpAddr>,
    netns: Netns,
    claim: Arc<Claim>,
    settings: Mutex<Settings>,
    agent: Mutex<Option<Agent>>,
}

/// What a lab's nodes have in common.
pub(crate) struct Common {
    pub sandbox: Arc<Sandbox>,
    pub claim: Arc<Claim>,
    pub underlay: Underlay,
    /// Directory of the CA.
    pub ca_dir: PathBuf,
    pub universe: Option<String>,
    pub verbosity: String,
    pub confined: bool,
    pub arguments: Vec<String>,
}

impl Node {
    /// Makes node number `number` (from 1) with its interface on the underlay; its agent is not started.
    pub(crate) fn create(common: &Common, number: usize) -> anyhow::Result<Self> {
        let name = format!("n{number}");
        let netns = Netns::create(&common.sandbox, &name)?;
        let address = common.underlay.plug(&netns, number)?;
        let (run, disk) = (common.claim.run_dir().join(&name), common.claim.state_dir().join(&name));
        for directory in [&run, &disk] {
            fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        }
        let settings = Settings {
            program: None,
            name: name.clone(),
            advertise: address.to_string(),
            peers: Vec::new(),
            ca_dir: Some(common.ca_dir.clone()),
            universe: common.universe.clone(),
            seed: None,
            state_dir: disk.join("state"),
            run_dir: run,
            log: disk.join("agent.log"),
            clock: None,
            verbosity: common.verbosity.clone(),
            confined: common.confined,
            more: common.arguments.clone(),
        };
        let claim = Arc::clone(&common.claim);
        let (address, settings) = (Mutex::new(address), Mutex::new(settings));
        Ok(Self { name, address, netns, claim, settings, agent: Mutex::new(None) })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the underlay.
    pub fn address(&self) -> IpAddr {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_address(&self, address: IpAddr) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub fn run_dir(&self) -> PathBuf {
        self.settings().run_dir.clone()
    }

    pub fn state_dir(&self) -> PathBuf {
        self.settings().state_dir.clone()
    }

    /// The agent's local API.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("weft.sock")
    }

    /// What the agent has logged so far, over all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.settings().log).unwrap_or_default()
    }

    /// The end of that, for messages.
    pub fn log_tail(&self) -> String {
        agent::tail(&self.settings().log)
    }

    /// Changes what the agent is told at its next start.
    pub fn configure(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings());
    }

    pub fn start_agent(&self) -> anyhow::Result<()> {
        let mut agent = self.agent();
        ensure!(agent.is_none(), "the agent of {} runs already", self.name);
        *agent = Some(Agent::start(self.binaries()?, &self.claim, &self.netns, &self.settings())?);
        Ok(())
    }

    /// Starts a second agent, which takes over from the one that runs; that one is returned.
    pub fn start_next(&self) -> anyhow::Result<Agent> {
        let mut settings = self.settings().clone();
        settings.more.push("--takeover".into());
        let next = Agent::start(self.binaries()?, &self.claim, &self.netns, &settings)?;
        self.agent().replace(next).with_context(|| format!("no agent runs on {}", self.name))
    }

    /// The same, and waits until that one has ended.
    pub fn take_over(&self, within: Duration) -> anyhow::Result<()> {
        let mut before = self.start_next()?;
        let status = wait::until(&format!("the agent of {} has handed over", self.name), within, || {
            before.ended()?.context("it still runs")
        })?;
        ensure!(status.success(), "the agent of {} that handed over: {status}", self.name);
        Ok(())
    }

    /// The command by which its agent starts, to be changed and run by hand.
    pub fn agent_command(&self) -> anyhow::Result<Command> {
        Ok(self.settings().command(self.binaries()?))
    }

    /// Waits until ADD would work.
    ///
    /// # Errors
    /// When it is not ready in time, with the agent's reasons, or at once when it has ended.
    pub fn wait_ready(&self, within: Duration) -> anyhow::Result<()> {
        let mut ended = None;
        let ready = wait::until(&format!("agent {} is ready", self.name), within, || {
            if let Err(error) = self.check_agent() {
                ended = Some(error);
                return Ok(());
            }
            let (status, body) = self.http("/readyz")?;
            ensure!(status == 200, "{status} {}", body.trim());
            Ok(())
        });
        ended.map_or(ready, Err).with_context(|| format!("last words of {}:\n{}", self.name, self.log_tail()))
    }

    /// Waits until a warning of `weft status` has some words.
    pub fn wait_warning(&self, words: &str, within: Duration) -> anyhow::Result<()> {
        wait::until(&format!("{} warns of `{words}`", self.name), within, || {
            let warnings = self.status()?["warnings"].to_string();
            ensure!(warnings.contains(words), "{warnings}");
            Ok(())
        })
    }

    /// Fails when the agent does not run.
    pub fn check_agent(&self) -> anyhow::Result<()> {
        self.agent().as_mut().with_context(|| format!("no agent runs on {}", self.name))?.check()
    }

    /// The agent's process.
    pub fn agent_process(&self) -> Option<Process> {
        self.agent().as_ref().map(Agent::process)
    }

    /// Sends SIGTERM and waits for the end.
    pub fn stop_agent(&self) -> anyhow::Result<ExitStatus> {
        self.take_agent()?.stop()
    }

    /// As `kill -9` does.
    pub fn kill_agent(&self) -> anyhow::Result<()> {
        self.take_agent()?.kill()
    }

    /// Waits for an agent that ends by itself, as it does when it refuses its configuration.
    pub fn wait_agent_end(&self, within: Duration) -> anyhow::Result<ExitStatus> {
        let status = wait::until(&format!("the agent of {} ends", self.name), within, || {
            let mut agent = self.agent();
            agent.as_mut().context("it does not run")?.ended()?.context("it still runs")
        })?;
        self.agent().take();
        Ok(status)
    }

    /// Runs `weft` on this node, as its operator would.
    pub fn weft(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.binaries()?.weft);
        command.args(arguments).env("WEFT_RUN_DIR", self.run_dir()).env("WEFT_STATE_DIR", self.state_dir());
        self.exec(command)
    }

    /// `weft COMMAND --json`.
    pub fn weft_json(&self, command: &str) -> anyhow::Result<Value> {
        let output = self.weft(&[command, "--json"])?;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "weft {command} on {}: {}", self.name, stderr.trim());
        serde_json::from_str(&stdout).with_context(|| format!("weft {command} --json said `{stdout}`"))
    }

    /// `weft status --json`.
    pub fn status(&self) -> anyhow::Result<Value> {
        self.weft_json("status")
    }

    /// Runs a command in the node's network namespace and the lab's mounts, to its end.
    pub fn exec(&self, mut command: Command) -> anyhow::Result<Output> {
        linux::die_with_spawner(&mut command);
        self.netns.sandbox().run(|| {
            self.netns.enter()?;
            command.output().with_context(|| format!("run {:?} on {}", command.get_program(), self.name))
        })
    }

    /// One request to the agent's health and metrics port: status and body.
    pub fn http(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.netns.run(|| get(path)).with_context(|| format!("GET {path} from {}", self.name))
    }

    pub fn binaries(&self) -> anyhow::Result<&'static Binaries> {
        Binaries::get()
    }

    /// Has the agent begin to end; see [`Node::stop_agent`].
    pub(crate) fn terminate_agent(&self) {
        self.agent().iter().for_each(Agent::terminate);
    }

    /// The agent's handle, if it was started and not stopped.
    pub(crate) fn take_running(&self) -> Option<Agent> {
        self.agent().take()
    }

    fn take_agent(&self) -> anyhow::Result<Agent> {
        self.agent().take().with_context(|| format!("no agent runs on {}", self.name))
    }

    fn agent(&self) -> MutexGuard<'_, Option<Agent>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn get(path: &str) -> anyhow::Result<(u16, String)> {
    let mut socket = TcpStream::connect(agent::METRICS)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", agent::METRICS)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no header")?;
    let status =
        head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("the answer has no status")?;
    Ok((status, body.into()))
}
