//! Takes a node out of the network and removes all that Weft made on it.

use super::BOOT_MARKER;
use crate::{
    cli::{CallError, Client, print},
    cni::{conflist, tombstone},
    config::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, SOCKET, SOCKET_LOCK, socket_in},
    links,
    linux::store,
    types::{BRIDGE, TUN},
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
    for (dir, is_ours) in [(&args.run_dir, in_run_dir as fn(&str) -> bool), (&args.state_dir, in_state_dir)] {
        clear(dir, is_ours)?;
    }
    Ok(())
}

/// Removes what the agent made in a directory, and the directory if nothing is left: it may be one that somebody named
/// by mistake.
fn clear(dir: &Path, is_ours: fn(&str) -> bool) -> anyhow::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("list {}", dir.display()))?,
    };
    let mut kept = 0;
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", dir.display()))?;
        let path = entry.path();
        let is_dir = entry.file_type().with_context(|| format!("look at {}", path.display()))?.is_dir();
        match entry.file_name().to_str().is_some_and(is_ours) {
            true if is_dir => remove(&path, |path| fs::remove_dir_all(path))?,
            true => remove(&path, |path| fs::remove_file(path))?,
            false => kept += 1,
        }
    }
    match kept {
        0 => remove(dir, |path| fs::remove_dir(path)),
        _ => Ok(print(&format!("kept {}: it holds files that are not Weft's\n", dir.display()))?),
    }
}

fn in_run_dir(name: &str) -> bool {
    [SOCKET, SOCKET_LOCK, BOOT_MARKER, tombstone::DIRECTORY].contains(&name)
}

fn in_state_dir(name: &str) -> bool {
    name.starts_with(store::FILE) || name.starts_with(links::FOUND)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ours_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        let (ours, shared) = (temp.path().join("weft"), temp.path().join("home"));
        for dir in [&ours, &shared] {
            fs::create_dir(dir).unwrap();
            for file in
                ["weft.redb", "weft.redb.new", "weft.redb.damaged-1", "sysctls.json", "sysctls.damaged"]
            {
                fs::write(dir.join(file), "").unwrap();
            }
        }
        fs::write(shared.join("letter.txt"), "dear").unwrap();
        fs::create_dir(shared.join("weft")).unwrap();
        for dir in [&ours, &shared, &temp.path().join("nothing")] {
            clear(dir, in_state_dir).unwrap();
        }
        assert!(!ours.exists());
        let mut left: Vec<_> =
            fs::read_dir(&shared).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["letter.txt", "weft"]);

        let run = temp.path().join("run");
        fs::create_dir_all(run.join(tombstone::DIRECTORY)).unwrap();
        fs::write(run.join(tombstone::DIRECTORY).join("wf000000000000.json"), "").unwrap();
        for file in [SOCKET, SOCKET_LOCK, BOOT_MARKER] {
            fs::write(run.join(file), "").unwrap();
        }
        clear(&run, in_run_dir).unwrap();
        assert!(!run.exists());
    }
}
