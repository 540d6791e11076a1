//! The unix socket of the local API: for root and the agent's own user only, and never two agents on one.

use futures_util::{FutureExt, Stream, stream};
use nix::fcntl::{Flock, FlockArg};
use socket2::{Domain, SockAddr, Socket, Type};
use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io,
    os::fd::{AsFd, BorrowedFd},
    os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::{UnixListener, UnixStream};
use tonic::service::Routes;
use tracing::warn;

/// Bound and listening; calls wait until it is served.
#[derive(Debug)]
pub struct LocalSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl AsFd for LocalSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("another agent answers on {0}: stop it first, or give this one another --run-dir")]
    InUse(PathBuf),
    #[error("{0} is not a socket: remove it, or give another --run-dir")]
    NotASocket(PathBuf),
    #[error("{action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("serve the local API: {0}")]
    Serve(#[from] tonic::transport::Error),
}

impl LocalSocket {
    /// Makes the socket, and its directory if there is none. A socket that nobody answers on is replaced.
    ///
    /// # Errors
    /// [`SocketError::InUse`] if an agent answers there. Nothing is changed then.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { action, path, source }
        };
        let dir = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create", dir))?;
        // Two agents that start at once must not both find the old socket dead and remove each other's new one.
        let _lock = lock(&path.with_extension("lock"))?;
        match probe(path).map_err(io("look for an agent on", path))? {
            Probe::Nothing => {}
            Probe::Answers => return Err(SocketError::InUse(path.into())),
            Probe::NotASocket => return Err(SocketError::NotASocket(path.into())),
            Probe::Stale => std::fs::remove_file(path).map_err(io("remove", path))?,
        }
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(io("make", path))?;
        let address = SockAddr::unix(path).map_err(io("bind", path))?;
        socket.bind(&address).map_err(io("bind", path))?;
        // Nobody can connect before `listen`, whatever the umask left open.
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io("restrict", path))?;
        socket.listen(BACKLOG).map_err(io("listen on", path))?;
        let listener = UnixListener::from_std(socket.into()).map_err(io("listen on", path))?;
        Ok(Self { listener, path: path.into() })
    }

    /// The socket of another agent, which listens at that path.
    pub fn adopt(listener: std::os::unix::net::UnixListener, path: &Path) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::from_std(listener)?, path: path.into() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until `shutdown` resolves and the calls under way are answered, or `GRACE` later at the latest.
    pub async fn serve(
        self,
        routes: Routes,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), SocketError> {
        let own = nix::unistd::geteuid().as_raw();
        let server = tonic::transport::Server::builder().add_routes(routes);
        let shutdown = shutdown.shared();
        let incoming = admitted(self.listener, own);
        tokio::select! {
            served = server.serve_with_incoming_shutdown(incoming, shutdown.clone()) => Ok(served?),
            () = shutdown.then(|()| tokio::time::sleep(GRACE)) => Ok(()),
        }
    }
}

/// Connections of root and of the agent's own user; others are closed.
fn admitted(listener: UnixListener, own: u32) -> impl Stream<Item = io::Result<UnixStream>> {
    stream::unfold(listener, move |listener| async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: calls wait in the backlog meanwhile.
                    warn!(%error, "accept on the local socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match stream.peer_cred() {
                Ok(peer) if admits(peer.uid(), own) => return Some((Ok(stream), listener)),
                Ok(peer) => warn!(uid = peer.uid(), pid = ?peer.pid(), "refused on the local socket"),
                Err(error) => warn!(%error, "refused on the local socket: no credentials"),
            }
        }
    })
}

fn admits(uid: u32, own: u32) -> bool {
    uid == 0 || uid == own
}

#[derive(Debug, PartialEq, Eq)]
enum Probe {
    Nothing,
    NotASocket,
    Stale,
    Answers,
}

fn probe(path: &Path) -> io::Result<Probe> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Probe::Nothing),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => return Ok(Probe::NotASocket),
        Ok(_) => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(Probe::Answers),
        // Its backlog is full: it is there, but slow.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Probe::Answers),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Probe::Stale),
        Err(error) => Err(error),
    }
}

fn lock(path: &Path) -> Result<Flock<File>, SocketError> {
    let io = |source| SocketError::Io { action: "lock", path: path.into(), source };
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(io)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io(errno.into()))
}

/// Calls that wait to be accepted: more than a node starts pods at once.
const BACKLOG: i32 = 1024;
/// For calls under way at the end; what is written before the answer stays written.
const GRACE: Duration = Duration::from_secs(2);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn only_its_owner_can_open_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/weft/weft.sock");
        let socket = LocalSocket::bind(&path).unwrap();
        assert_eq!((mode(socket.path()), mode(path.parent().unwrap())), (0o600, 0o700));
    }

    #[tokio::test]
    async fn a_second_agent_is_refused_and_a_dead_ones_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weft.sock");
        let first = LocalSocket::bind(&path).unwrap();
        let error = LocalSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        drop(first);
        assert_eq!(probe(&path).unwrap(), Probe::Stale);
        let again = LocalSocket::bind(&path).unwrap();
        assert_eq!(probe(again.path()).unwrap(), Probe::Answers);
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weft.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = LocalSocket::bind(&path).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{} is not a socket: remove it, or give another --run-dir", path.display())
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn root_and_the_own_user_are_admitted() {
        assert!(admits(0, 1000) && admits(1000, 1000));
        assert!(!admits(1001, 1000) && !admits(65534, 0));
    }
}
