//! Takes a node out of the network and removes all that Weft made on it.

use crate::{
    cli::{CallError, Client, print},
    cni::conflist,
    config::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, socket_in},
    links::{self, BRIDGE, TUN},
    linux::store,
};
use anyhow::{Context, bail};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::{Instant, sleep};

#[derive(Clone, Debug, clap::Args)]
pub struct ResetArgs {
    /// State directory of the agent
    #[arg(long, env = "WEFT_STATE_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Run directory of the agent
    #[arg(long, env = "WEFT_RUN_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// Directory to which the agent wrote the CNI configuration
    #[arg(long, env = "WEFT_CNI_CONF_DIR", hide_env_values = true, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Go on though pods are attached, or nobody can take this node's addresses: these are lost to the network then
    #[arg(long)]
    force: bool,
}

/// Hands the node's addresses to a peer, stops the agent, and removes links, routes, firewall tables and files.
pub async fn reset(args: ResetArgs) -> anyhow::Result<()> {
    let socket = socket_in(&args.run_dir);
    match Client::connect(&socket).await {
        Ok(mut agent) => {
            let heir = agent.leave(args.force).await?.heir;
            match heir.as_str() {
                "" => print("no peer took addresses\n")?,
                heir => print(&format!("addresses handed to {heir}\n"))?,
            }
            gone(&socket).await?;
            print("agent stopped\n")?;
        }
        Err(CallError::NoAgent { .. }) => {
            let state = args.state_dir.join(store::FILE);
            if state.exists() && !args.force {
                bail!(
                    "no agent answers on {}, so nobody can hand this node's addresses to a peer: \
                     start the agent and reset again, or give the addresses up with --force",
                    socket.display()
                );
            }
        }
        Err(error) => return Err(error.into()),
    }
    for removed in links::remove(&args.state_dir, BRIDGE, TUN).await? {
        print(&format!("{removed}\n"))?;
    }
    if let Some(dir) = &args.cni_conf_dir {
        remove(&dir.join(conflist::FILE_NAME), |path| fs::remove_file(path))?;
    }
    for dir in [&args.run_dir, &args.state_dir] {
        remove(dir, |path| fs::remove_dir_all(path))?;
    }
    Ok(())
}

/// The agent answers first and ends then.
async fn gone(socket: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Client::connect(socket).await.is_ok() {
        if Instant::now() > deadline {
            bail!("the agent has left the network, but still runs after {} s", PATIENCE.as_secs());
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

fn remove(path: &Path, how: impl FnOnce(&Path) -> io::Result<()>) -> anyhow::Result<()> {
    match how(path) {
        Ok(()) => Ok(print(&format!("removed {}\n", path.display()))?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
    }
}

const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(20);
