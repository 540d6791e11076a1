//! A unix socket of messages, each with descriptors, between two processes of one host.

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
        accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt, socket, sockopt,
    },
    sys::time::{TimeVal, TimeValLike},
};
use std::{
    fs::Permissions,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
    time::Duration,
};
use tokio::io::unix::AsyncFd;

/// Where others connect to.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

/// One end. Calls block, but not longer than the patience that it was made with.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Listener {
    /// Listens, for root and the own user only. A socket that is there is replaced: whose it was hears nobody any more.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        // Nobody can connect before `listen`, whatever the umask left open.
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listen(&fd, Backlog::new(1)?)?;
        // SAFETY: it owns the descriptor, which stays open until it is dropped.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// The next connection of root or of the own user.
    pub async fn accept(&self, patience: Duration) -> io::Result<Connection> {
        loop {
            let mut ready = self.0.readable().await?;
            let accepted = ready.try_io(|fd| {
                let accepted = accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
                // SAFETY: the descriptor is new and nobody else's.
                Ok(unsafe { OwnedFd::from_raw_fd(accepted) })
            });
            let Ok(accepted) = accepted else { continue };
            let accepted = accepted?;
            let uid = getsockopt(&accepted, sockopt::PeerCredentials)?.uid();
            if uid == 0 || uid == nix::unistd::geteuid().as_raw() {
                return Connection::new(accepted, patience);
            }
            tracing::warn!(uid, "refused on the takeover socket");
        }
    }
}

impl Connection {
    /// None where nobody listens.
    pub fn connect(path: &Path, patience: Duration) -> io::Result<Option<Self>> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
            Ok(()) => Self::new(fd, patience).map(Some),
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn new(fd: OwnedFd, patience: Duration) -> io::Result<Self> {
        let patience = TimeVal::milliseconds(patience.as_millis().try_into().unwrap_or(i64::MAX));
        setsockopt(&fd, sockopt::SendTimeout, &patience)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &patience)?;
        // A message has to fit whole.
        let _ = setsockopt(&fd, sockopt::SndBufForce, &(2 * MAX_MESSAGE));
        Ok(Self(fd))
    }

    /// Sends one message, with at most [`MAX_DESCRIPTORS`] descriptors, which stay ours too.
    pub fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(message)], rights, flags, None)?;
        Ok(())
    }

    /// The next message and its descriptors; an empty one when the other end is gone.
    pub fn receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS]);
        let (len, descriptors, flags) = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
            let mut descriptors = Vec::new();
            for control in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just made them for us, and nobody else has them.
                    descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            (received.bytes, descriptors, received.flags)
        };
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        bytes.truncate(len);
        Ok((bytes, descriptors))
    }
}

/// Bytes of a message.
const MAX_MESSAGE: usize = 1 << 18;
/// With one message; Linux takes 253.
pub const MAX_DESCRIPTORS: usize = 250;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::fd::AsFd};

    const PATIENCE: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn messages_and_descriptors_arrive_as_they_were_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(Connection::connect(&path, PATIENCE).unwrap().is_none(), "nobody has ever listened");
        drop(Listener::bind(&path).unwrap());
        // A process that another test is about to start may have the descriptor for a moment.
        while Connection::connect(&path, PATIENCE).unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let listener = Listener::bind(&path).unwrap();
        let ours = Connection::connect(&path, PATIENCE).unwrap().unwrap();
        let theirs = listener.accept(PATIENCE).await.unwrap();
        let (mut near, far) = io::pipe().map(|(read, write)| (write, read)).unwrap();
        let long = vec![7; MAX_MESSAGE];
        let many = vec![far.as_fd(); MAX_DESCRIPTORS];
        ours.send(b"one", &[]).unwrap();
        ours.send(b"two", &many).unwrap();
        ours.send(&long, &[]).unwrap();
        drop(ours);
        assert_eq!(theirs.receive().unwrap().0, b"one");
        let (message, descriptors) = theirs.receive().unwrap();
        assert_eq!((message.as_slice(), descriptors.len()), (&b"two"[..], MAX_DESCRIPTORS));
        drop(far);
        near.write_all(b"x").expect("the other end is open still, by what was sent");
        assert_eq!(theirs.receive().unwrap().0, long);
        assert_eq!(theirs.receive().unwrap().0, b"", "the other end is gone");
    }
}
