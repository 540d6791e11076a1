//! Network namespaces: opened once, checked, and entered by a thread of their own.
//!
//! ```text
//!   /var/run/netns/cni-1234 ──open──▶ Netns (a descriptor) ──enter──▶ a thread inside, which ends there
//! ```
//!
//! A descriptor goes on naming the same namespace whatever happens to the path; no thread that runs other work ever
//! changes its namespace.

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns, unshare},
    sys::{
        stat::{Mode, fstat},
        statfs::fstatfs,
    },
};
use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("open {}: {errno}", path.display())]
    Open { path: PathBuf, errno: Errno },
    #[error("{} is not a namespace: it is not on nsfs", path.display())]
    NotANamespace { path: PathBuf },
    #[error("{} is a namespace, but not a network namespace", path.display())]
    NotANetwork { path: PathBuf },
    #[error("{0}: {1}")]
    Kernel(&'static str, Errno),
}

impl NetnsError {
    /// Whether there is nothing at the path (any more).
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Open { errno: Errno::ENOENT | Errno::ENOTDIR, .. })
    }
}

impl Netns {
    /// Opens the network namespace that `path` names; a symbolic link such as `/proc/1/ns/net` is followed.
    ///
    /// # Errors
    /// `NotANamespace` for other files (also the empty file that a dead namespace's mount leaves behind) and
    /// `NotANetwork` for namespaces of another type.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let fd = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
            .map_err(|errno| NetnsError::Open { path: path.into(), errno })?;
        let fs = fstatfs(&fd).map_err(|errno| NetnsError::Kernel("fstatfs", errno))?;
        if fs.filesystem_type().0 != NSFS_MAGIC {
            return Err(NetnsError::NotANamespace { path: path.into() });
        }
        // SAFETY: NS_GET_NSTYPE takes no argument and only reads the descriptor, which `fd` keeps open.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
        match Errno::result(kind) {
            Ok(libc::CLONE_NEWNET) => Ok(Self { fd }),
            Ok(_) => Err(NetnsError::NotANetwork { path: path.into() }),
            Err(errno) => Err(NetnsError::Kernel("ioctl NS_GET_NSTYPE", errno)),
        }
    }

    /// The calling thread's own namespace.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// A new namespace, which lives as long as a descriptor, a mount or a process in it does.
    pub fn create() -> Result<Self, NetnsError> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Kernel("unshare", errno))?;
            Self::current()
        })
    }

    /// Runs `work` on a thread inside the namespace and waits for it. A socket that `work` opens stays in the
    /// namespace after it, wherever it is used; `/proc/sys/net` is the namespace's while `work` runs; a process that
    /// `work` starts is born inside.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> Result<R, NetnsError> {
        on_a_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Kernel("setns", errno))?;
            Ok(work())
        })
    }

    /// Whether both descriptors name one namespace.
    pub fn is_same(&self, other: &Self) -> Result<bool, NetnsError> {
        let id = |fd: &OwnedFd| {
            fstat(fd).map(|s| (s.st_dev, s.st_ino)).map_err(|errno| NetnsError::Kernel("fstat", errno))
        };
        Ok(id(&self.fd)? == id(&other.fd)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: libc::__fsword_t = 0x6e73_6673;
/// `NS_GET_NSTYPE` of linux/nsfs.h: `_IO(0xb7, 3)`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_network_namespace_opens() {
        let open = |path: &str| Netns::open(Path::new(path));
        assert!(open("/proc/self/ns/net").unwrap().is_same(&Netns::current().unwrap()).unwrap());
        assert!(matches!(open("/proc/self/ns/uts"), Err(NetnsError::NotANetwork { .. })));
        assert!(matches!(open("/proc/self/status"), Err(NetnsError::NotANamespace { .. })));
        assert!(matches!(open("/"), Err(NetnsError::NotANamespace { .. })));
        assert!(open("/nonexistent/ns").unwrap_err().is_gone());
    }

    #[test]
    fn work_runs_inside_and_its_caller_stays_outside() {
        let outside = Netns::current().unwrap();
        let inside = Netns::create().expect("making a network namespace needs root");
        assert!(!inside.is_same(&outside).unwrap());
        let seen = inside.enter(|| Netns::current().unwrap()).unwrap();
        assert!(seen.is_same(&inside).unwrap());
        assert!(Netns::current().unwrap().is_same(&outside).unwrap());
    }
}
