//! Takes a node out of the network and removes all that Weft made on it.

use super::{BOOT_MARKER, takeover};
use crate::{
    cli::{CallError, Client, print},
    cni::{conflist, tombstone},
    config::{CLUSTER_KEYS, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, SOCKET, SOCKET_LOCK, socket_in},
    kube, links,
    linux::store,
    policy,
    types::{BRIDGE, TUN},
};
use anyhow::{Context, bail};
use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::{Instant, sleep};

#[derive(Clone, Debug, clap::Args)]
pub struct ResetArgs {
    /// State directory of the agent
    #[arg(long, env = "WEFT_STATE_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub(super) state_dir: PathBuf,
    /// Run directory of the agent
    #[arg(long, env = "WEFT_RUN_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub(super) run_dir: PathBuf,
    /// Directory to which the agent wrote the CNI configuration
    #[arg(long, env = "WEFT_CNI_CONF_DIR", hide_env_values = true, value_name = "DIR")]
    pub(super) cni_conf_dir: Option<PathBuf>,
    /// Go on though pods are attached, or nobody can take this node's addresses: these are lost to the network then
    #[arg(long)]
    pub(super) force: bool,
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
            gone(&socket, agent.process()).await?;
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
    policy::remove().await?;
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
/// by mistake. A mount point is emptied.
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
    if kept > 0 {
        return Ok(print(&format!("kept {}: it holds files that are not Weft's\n", dir.display()))?);
    }
    match fs::remove_dir(dir) {
        Err(error) if matches!(error.kind(), ErrorKind::ResourceBusy | ErrorKind::ReadOnlyFilesystem) => {
            Ok(print(&format!("emptied {}: it is a mount point\n", dir.display()))?)
        }
        removed => remove(dir, |_| removed),
    }
}

fn in_run_dir(name: &str) -> bool {
    let files = [SOCKET, SOCKET_LOCK, takeover::SOCKET, BOOT_MARKER, CLUSTER_KEYS, super::policy::SCRIPT];
    files.contains(&name) || name == tombstone::DIRECTORY
}

fn in_state_dir(name: &str) -> bool {
    [store::FILE, links::FOUND, kube::CACHE, super::policy::FILE, super::policy::CACHE]
        .iter()
        .any(|file| name.starts_with(file))
}

/// The agent answers first and ends then; until its process has ended it may repair what is removed.
async fn gone(socket: &Path, process: Option<u32>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while process.is_some_and(runs) || Client::connect(socket).await.is_ok() {
        if Instant::now() > deadline {
            bail!("the agent has left the network, but still runs after {} s", PATIENCE.as_secs());
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Whether there is such a process that does more than wait for its parent to take notice of its end.
fn runs(process: u32) -> bool {
    // The state follows the name, which is in parentheses and may hold anything (proc_pid_stat(5)).
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
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
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

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
        for file in [SOCKET, SOCKET_LOCK, takeover::SOCKET, BOOT_MARKER, super::super::policy::SCRIPT] {
            fs::write(run.join(file), "").unwrap();
        }
        clear(&run, in_run_dir).unwrap();
        assert!(!run.exists());
    }

    #[test]
    fn a_mount_point_is_emptied() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().to_owned();
        // In mounts of the thread's own, which end with it.
        let emptied = std::thread::spawn(move || {
            const NONE: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root");
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
            mount(Some("weft"), &dir, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            fs::write(dir.join(store::FILE), "").unwrap();
            clear(&dir, in_state_dir).unwrap();
            fs::read_dir(&dir).unwrap().count() == 0
        });
        assert!(emptied.join().unwrap());
    }
}
