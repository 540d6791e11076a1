//! One network namespace, mounted under its name in the lab's private `/var/run/netns`.
use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    links::{self, Links},
    sandbox::{self, NETNS_DIR, Sandbox},
};

/// The namespace is gone when this is dropped and the last process in it has ended.
pub struct Netns {
    name: String,
    file: File,
    sandbox: Arc<Sandbox>,
    /// It is mounted under its name.
    mounted: bool,
}

impl Netns {
    /// Makes a namespace with its loopback interface up.
    pub fn create(sandbox: &Arc<Sandbox>, name: &str) -> anyhow::Result<Self> {
        let path = Path::new(NETNS_DIR).join(name);
        let make = || {
            File::create_new(&path)?;
            unshare(CloneFlags::CLONE_NEWNET)?;
            let own = "/proc/thread-self/ns/net";
            mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(File::open(own)?)
        };
        let file = sandbox.run(make).with_context(|| format!("create network namespace {name}"))?;
        let netns = Self { name: name.into(), file, sandbox: Arc::clone(sandbox), mounted: true };
        netns.links(async |links| links.up("lo").await)?;
        Ok(netns)
    }

    /// A namespace that somebody else made, and looks after.
    pub fn of(sandbox: &Arc<Sandbox>, name: &str, file: File) -> Self {
        Self { name: name.into(), file, sandbox: Arc::clone(sandbox), mounted: false }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, which exists for processes and threads in the lab's mounts only.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    pub fn inode(&self) -> io::Result<u64> {
        sandbox::inode(&self.file)
    }

    pub fn try_clone(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// Moves the calling thread into the namespace: for threads of the lab's own that end soon.
    pub fn enter(&self) -> anyhow::Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter network namespace {}", self.name))
    }

    /// Does something on a thread of its own in the namespace: what it opens (sockets, `/proc/sys/net`) belongs there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        sandbox::on_own_thread(|| {
            self.enter()?;
            work()
        })
    }

    /// Looks at or changes the namespace's links, addresses and routes.
    pub fn links<T: Send>(
        &self,
        work: impl AsyncFnOnce(&Links) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        self.run(|| links::here(work)).with_context(|| format!("in network namespace {}", self.name))
    }

    /// Sets a sysctl, written with slashes: `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display())))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        let path = self.path();
        // The mounts go with the process anyway; nothing is lost when this fails.
        let _ = self.sandbox.run(|| {
            umount2(&path, MntFlags::MNT_DETACH)?;
            Ok(fs::remove_file(&path)?)
        });
    }
}
