//! What a lab must not leave: on the host a link, route, table or mount; in its namespaces a process.
use std::{collections::BTreeSet, fmt, fs, process::Command};

use anyhow::Context;
use nix::unistd::Pid;
use weft::linux::netlink::RTPROT_WEFT;

use crate::{links, process::Process, sandbox, tools};

/// One thing left behind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leak {
    Link(String),
    Route(String),
    Table(String),
    /// A network namespace of ours that the host's mounts show, by its mount point.
    Mount(String),
    Process {
        pid: i32,
        command: String,
    },
}

/// What of Weft the host had before the lab started: a machine may well run Weft itself.
pub struct Host(BTreeSet<Leak>);

impl Host {
    pub fn look() -> anyhow::Result<Self> {
        Ok(Self(on_host()?))
    }

    /// What the host has now beyond that, and who still runs in one of the lab's namespaces, told by their inodes.
    pub fn compare(&self, namespaces: &BTreeSet<u64>) -> anyhow::Result<Vec<Leak>> {
        let mut leaks: Vec<_> = on_host()?.difference(&self.0).cloned().collect();
        leaks.extend(mounts_of(namespaces)?);
        leaks.extend(processes_in(namespaces));
        Ok(leaks)
    }
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "link {name} on the host"),
            Self::Route(to) => write!(f, "route {to} on the host"),
            Self::Table(name) => write!(f, "nftables {name} on the host"),
            Self::Mount(path) => write!(f, "mount {path} on the host"),
            Self::Process { pid, command } => write!(f, "process {pid} ({command})"),
        }
    }
}

/// Looks at the network namespace and the mounts of this process.
fn on_host() -> anyhow::Result<BTreeSet<Leak>> {
    let (links, routes) = sandbox::on_own_thread(|| {
        links::here(async |links| Ok((links.names().await?, links.routes().await?)))
    })
    .context("look at the host's network")?;
    let ours = |name: &str| name == "weft" || name == "weft0" || is_pod_veth(name);
    let links = links.into_iter().filter(|name| ours(name)).map(Leak::Link);
    let routes =
        routes.into_iter().filter(|(protocol, _)| *protocol == RTPROT_WEFT).map(|(_, to)| Leak::Route(to));
    // Without nft nothing of ours can have made a table.
    let tables = match tools::find("nft") {
        Some(nft) => Command::new(nft).args(["list", "tables"]).output().context("run nft")?.stdout,
        None => Vec::new(),
    };
    let tables = String::from_utf8_lossy(&tables).into_owned();
    let tables = tables.lines().filter(|line| line.ends_with(" weft")).map(|line| Leak::Table(line.into()));
    Ok(links.chain(routes).chain(tables).collect())
}

fn mounts_of(namespaces: &BTreeSet<u64>) -> anyhow::Result<Vec<Leak>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the host's mounts")?;
    let mount = |line: &str| {
        // proc_pid_mountinfo(5): id, parent, device, root ("net:[4026531840]"), mount point.
        let mut fields = line.split(' ').skip(3);
        let inode = fields.next()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()?;
        let point = fields.next()?;
        namespaces.contains(&inode).then(|| Leak::Mount(point.into()))
    };
    Ok(mounts.lines().filter_map(mount).collect())
}

/// Processes in any of these network namespaces.
pub fn processes_in(namespaces: &BTreeSet<u64>) -> Vec<Leak> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let inside = |pid: &i32| {
        let link = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap_or_default();
        let inode =
            link.to_str().and_then(|text| text.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok());
        inode.is_some_and(|inode| namespaces.contains(&inode)) && Process::of(Pid::from_raw(*pid)).is_some()
    };
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(inside);
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.map(|pid| Leak::Process { pid, command: name(pid).trim().into() }).collect()
}

fn is_pod_veth(name: &str) -> bool {
    name.strip_prefix("wf")
        .is_some_and(|hash| hash.len() == 12 && hash.bytes().all(|b| b.is_ascii_hexdigit()))
}
