//! The command line beside the daemon: it asks the agent of this node over its socket and shows the answer.
//!
//! ```text
//!   weft status ──▶ client ──weft.sock──▶ agent
//!                     │ replies of local.proto
//!                     └─▶ view (what is shown, named) ─┬─▶ tables   for people
//!                                                      └─▶ --json   for programs, shapes in `view.rs`
//! ```
//! Exit code 0: done; 1: it failed, and standard error says why; 2: the command line was wrong.

mod client;
mod forget;
mod policy;
mod probe;
mod tables;
mod units;
mod view;

pub use client::{CallError, Client};
pub use forget::{ForgetArgs, forget};
pub use policy::PolicyCommand;
pub use probe::ProbeArgs;

use crate::{
    config::{self, DEFAULT_RUN_DIR, socket_in},
    identity::command::CaCommand,
    run,
};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::Serialize;
use std::{
    ffi::{OsStr, OsString},
    io::{self, IsTerminal, Write},
    path::PathBuf,
};
use tables::Paint;

/// Weft: an overlay network for Kubernetes and plain Linux hosts
///
/// Every node runs one agent; the other commands ask the agent of this node.
#[derive(Debug, Parser)]
#[command(name = "weft", version, after_help = HELP, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent of this node
    Agent(Box<config::Args>),
    #[command(flatten)]
    Ask(Ask),
    /// Apply, list and explain network policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Declare nodes dead that will not come back: this node takes their addresses over
    Forget(ForgetArgs),
    /// Take this node out of the network: hand its addresses to a peer, stop its agent, remove all that Weft made
    Reset(run::ResetArgs),
    /// Put weft-cni, and the CNI project's programs that it needs, where the container runtime looks for them
    InstallCni(run::InstallCniArgs),
    /// Remove from this node all that Weft made and installed, whatever is attached: once the agent is deleted
    Uninstall(run::UninstallArgs),
    /// Ask an agent's --probe-socket, and exit with 0 or, with the reasons, 1: for Kubernetes' probes
    Probe(ProbeArgs),
    /// Make the keys by which nodes know each other
    #[command(subcommand)]
    Ca(CaCommand),
    /// Print the version
    Version,
}

/// What an agent can be asked.
#[derive(Debug, Subcommand)]
pub enum Ask {
    /// Show whether this node is ready, what it is missing, and what it carries
    Status(How),
    /// Show all nodes of the network and how data reaches them
    Peers(How),
    /// Show who owns which part of the universe
    Ipam(How),
    /// Show the pods of this node and their addresses
    #[command(args_conflicts_with_subcommands = true)]
    Pods {
        #[command(subcommand)]
        verb: Option<PodsVerb>,
        #[command(flatten)]
        how: How,
    },
    /// Show everything at once, to attach to a bug report
    Report(How),
}

#[derive(Debug, Subcommand)]
pub enum PodsVerb {
    /// Say which labels a pod has, on hosts without Kubernetes
    Label(policy::Label),
}

#[derive(Clone, Debug, clap::Args)]
pub struct How {
    /// Print one JSON object with stable names instead of text
    #[arg(long)]
    json: bool,
    /// Run directory of the agent to ask
    #[arg(long, env = "WEFT_RUN_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("read {file}: {error}")]
    Input { file: String, error: io::Error },
    #[error("{0}")]
    Meant(String),
    #[error("write the answer: {0}")]
    Output(#[from] io::Error),
    #[error("write the answer as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Cli {
    /// Parses the command line and the environment; prints help or complaint and exits where clap does.
    pub fn from_environment() -> Self {
        let matches = without_empty_variables(Self::command(), |name| std::env::var_os(name)).get_matches();
        Self::from_matches(&matches)
    }

    fn from_matches(matches: &ArgMatches) -> Self {
        Self::from_arg_matches(matches).unwrap_or_else(|error| error.exit())
    }
}

impl Ask {
    /// Asks, and writes the answer to standard output.
    pub async fn run(self) -> Result<(), CliError> {
        if let Self::Pods { verb: Some(PodsVerb::Label(label)), .. } = self {
            return label.run().await;
        }
        let terminal = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        match self.answer(Paint { on: terminal }).await {
            Ok(text) => print(&text),
            Err(error) => Err(error),
        }
    }

    async fn answer(&self, paint: Paint) -> Result<String, CliError> {
        let how = self.how();
        let mut client = Client::connect(&socket_in(&how.run_dir)).await?;
        match self {
            Self::Status(_) => {
                how.show(&view::Status::from(client.status().await?), |s| tables::status(s, paint))
            }
            Self::Peers(_) => how.show(&view::Peers::from(client.peers().await?), tables::peers),
            Self::Ipam(_) => how.show(&view::Ipam::from(client.ipam().await?), tables::ipam),
            Self::Pods { .. } => how.show(&view::Pods::from(client.pods().await?), tables::pods),
            Self::Report(_) => {
                let report = view::Report {
                    software: crate::SOFTWARE.into(),
                    kernel: kernel(),
                    status: client.status().await?.into(),
                    peers: view::Peers::from(client.peers().await?).peers,
                    ipam: client.ipam().await?.into(),
                    pods: view::Pods::from(client.pods().await?).pods,
                };
                how.show(&report, |report| tables::report(report, paint))
            }
        }
    }

    fn how(&self) -> &How {
        match self {
            Self::Status(how) | Self::Peers(how) | Self::Ipam(how) | Self::Report(how) => how,
            Self::Pods { how, .. } => how,
        }
    }
}

impl How {
    fn show<T: Serialize>(&self, what: &T, as_text: impl FnOnce(&T) -> String) -> Result<String, CliError> {
        match self.json {
            true => Ok(serde_json::to_string_pretty(what)? + "\n"),
            false => Ok(as_text(what)),
        }
    }
}

/// Writes to standard output. Who stops reading, such as `head`, has had enough: that is no failure.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// An empty variable is the same as none: manifests set them so.
fn without_empty_variables(
    command: clap::Command,
    variable: impl Fn(&OsStr) -> Option<OsString> + Copy,
) -> clap::Command {
    let is_empty = |arg: &clap::Arg| arg.get_env().and_then(variable).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| if is_empty(&arg) { arg.env(None::<&str>) } else { arg })
        .mut_subcommands(|command| without_empty_variables(command, variable))
}

fn kernel() -> String {
    let shown = |name: nix::sys::utsname::UtsName| {
        let part = |text: &OsStr| text.to_string_lossy().into_owned();
        format!("{} {} {}", part(name.sysname()), part(name.release()), part(name.machine()))
    };
    nix::sys::utsname::uname().map(shown).unwrap_or_else(|errno| format!("unknown: {errno}"))
}

const HELP: &str = "\
Examples:
  weft status                      is this node ready, and if not, why
  weft peers                       who is in the network, and how data reaches them
  weft ipam --json | jq .ranges    who owns which addresses";

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
