//! A private mount namespace, in which a lab makes its network namespaces under their usual path.
//!
//! ```text
//!   lab process ─┬─ main thread, test threads ...      the host's mounts, the host's network
//!                ├─ keeper thread ── private mounts ── /var/run/netns/{underlay,n1,n1-p1,...}
//!                │     └─ spawns agents: they die with this thread, so with the process
//!                └─ short-lived threads that enter a namespace, do one thing and end
//! ```
//!
//! Nothing holds the mount namespace but this process: when it ends, by whatever cause, its namespaces are gone.
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    panic,
    path::Path,
    process::{Child, Command},
    sync::mpsc,
    thread,
};

use anyhow::Context;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    unistd::{Pid, chroot, fchdir, gettid},
};

use crate::{linux, namespace::Netns};

pub struct Sandbox {
    doors: Doors,
    keeper: Pid,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What it takes to enter: the mount namespace, and the root directory in it (which is not its top in a chroot).
pub struct Doors {
    mounts: File,
    root: File,
}

impl Sandbox {
    pub fn new() -> anyhow::Result<Self> {
        fs::create_dir_all(NETNS_DIR).with_context(|| format!("create {NETNS_DIR}"))?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, started) = mpsc::sync_channel(1);
        let keep = move || {
            let doors = isolate();
            let failed = doors.is_err();
            let told = ready.send(doors.map(|doors| (doors, gettid())));
            if !failed && told.is_ok() {
                queue.into_iter().for_each(|job| job());
            }
        };
        let thread = thread::Builder::new()
            .name("lab keeper".into())
            .spawn(keep)
            .context("start the keeper thread")?;
        let (doors, keeper) =
            started.recv().expect("the keeper answers once").context("make a private mount namespace")?;
        Ok(Self { doors, keeper, jobs: Some(jobs), thread: Some(thread) })
    }

    /// The keeper's thread id: others find the namespaces under `/proc/PID/task/TID`.
    pub fn keeper(&self) -> Pid {
        self.keeper
    }

    /// Does something on a thread of its own that sees the private mounts.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        on_own_thread(|| {
            self.doors.enter().context("enter the lab's mount namespace")?;
            work()
        })
    }

    /// Starts a process in a network namespace and in the private mounts; the kernel kills it when the lab ends.
    pub fn spawn(&self, netns: &Netns, mut command: Command) -> io::Result<Child> {
        let namespace = netns.try_clone()?;
        let (send, receive) = mpsc::sync_channel(1);
        let job = move || {
            linux::die_with_spawner(&mut command);
            let child = setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .and_then(|()| command.spawn());
            // The receiver waits below: it cannot be gone.
            let _ = send.send(child);
        };
        let jobs = self.jobs.as_ref().expect("the keeper takes jobs until the sandbox is dropped");
        jobs.send(Box::new(job)).expect("the keeper runs as long as the sandbox");
        receive.recv().expect("the keeper answers each job")
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            // A keeper that panicked has told so on stderr already.
            let _ = thread.join();
        }
    }
}

impl Doors {
    /// The doors of a lab of another process.
    pub fn of(process: Pid, keeper: Pid) -> io::Result<Self> {
        Self::open(&Path::new("/proc").join(process.to_string()).join("task").join(keeper.to_string()))
    }

    /// Moves the calling thread, which must not be shared with anything else, into the mount namespace.
    pub fn enter(&self) -> nix::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        setns(self.mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
        fchdir(self.root.as_fd())?;
        chroot(".")
    }

    fn open(thread: &Path) -> io::Result<Self> {
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(thread.join("root"))?;
        Ok(Self { mounts: File::open(thread.join("ns/mnt"))?, root })
    }
}

/// Runs it on a thread that ends with it, so that namespaces entered there don't stick to the caller.
pub fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Number by which the kernel knows a namespace.
pub fn inode(namespace: &File) -> io::Result<u64> {
    Ok(namespace.metadata()?.ino())
}

/// Gives the calling thread private mounts with an empty `/var/run/netns`.
fn isolate() -> anyhow::Result<Doors> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
        .context("unshare mounts (is CAP_SYS_ADMIN there?)")?;
    let doors = Doors::open(Path::new("/proc/thread-self")).context("open /proc/thread-self")?;
    // In a chroot `/` is no mount point and can't be made private; entering one's own namespace leads to its real top.
    setns(doors.mounts.as_fd(), CloneFlags::CLONE_NEWNS).context("go to the top of the mounts")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make the mounts private")?;
    fchdir(doors.root.as_fd()).and_then(|()| chroot(".")).context("return to the root directory")?;
    mount(Some("weft-lab"), NETNS_DIR, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .with_context(|| format!("mount a tmpfs on {NETNS_DIR}"))?;
    Ok(doors)
}

type Job = Box<dyn FnOnce() + Send>;

/// Where `ip netns` and container runtimes look for network namespaces.
pub const NETNS_DIR: &str = "/var/run/netns";
