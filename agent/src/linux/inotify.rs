//! Tells when files of a directory change.

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::Path,
};
use tokio::io::unix::AsyncFd;

/// One watched directory.
#[derive(Debug)]
pub struct Watch {
    inotify: AsyncFd<Descriptor>,
}

impl Watch {
    /// Tells of files that are renamed into the directory. Needs a tokio runtime.
    ///
    /// # Errors
    /// The directory is not there, or the user's limit of inotify instances is reached.
    pub fn new(directory: &Path) -> io::Result<Self> {
        Self::with(directory, AddWatchFlags::IN_MOVED_TO)
    }

    /// Tells of files that are renamed into the directory or written in it.
    ///
    /// # Errors
    /// As [`Watch::new`].
    pub fn contents(directory: &Path) -> io::Result<Self> {
        Self::with(directory, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE)
    }

    fn with(directory: &Path, events: AddWatchFlags) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(directory, events | AddWatchFlags::IN_ONLYDIR)?;
        // SAFETY: `Descriptor` owns its descriptor, never lends it mutably, and always answers with the same one.
        Ok(Self { inotify: unsafe { AsyncFd::register(Descriptor(inotify)) }? })
    }

    /// Waits until there was such a change since the last call. Cancel safe.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut guard = self.inotify.readable().await?;
            match guard.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) {
                Ok(Ok(events)) if !events.is_empty() => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }
}

#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
