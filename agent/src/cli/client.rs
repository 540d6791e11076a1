//! Calls to the agent of this node over its unix socket.

use hyper_util::rt::TokioIo;
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::UnixStream;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint, Uri},
};
use weft_proto::local::{self, admin_client::AdminClient, policy_client::PolicyClient};

/// A connection to an agent.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    process: Option<u32>,
    admin: AdminClient<Channel>,
    policy: PolicyClient<Channel>,
}

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error(
        "no agent answers on {0}: is it running? start it with `systemctl start weft` or `weft agent`, or say with --run-dir where it is"
    )]
    NoAgent(PathBuf),
    #[error("permission denied on {0}: the agent answers root only; try again with sudo")]
    Denied(PathBuf),
    #[error("connect to {socket}: {source}")]
    Connect { socket: PathBuf, source: io::Error },
    #[error("the agent on {socket} did not answer within {} s; its log may say why", .after.as_secs())]
    Slow { socket: PathBuf, after: Duration },
    #[error(
        "the agent on {0} closed the connection: it stopped, or does not answer this user; its log says which"
    )]
    Closed(PathBuf),
    #[error("the agent on {socket} refused: {reason}")]
    Refused { socket: PathBuf, reason: String },
}

impl Client {
    /// Connects to the agent whose socket that is.
    ///
    /// # Errors
    /// [`CallError::NoAgent`] if there is none or nobody listens, [`CallError::Denied`] for a user it is not meant for.
    pub async fn connect(socket: &Path) -> Result<Self, CallError> {
        // The connection is made here, not in the connector, to keep the error's kind.
        let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CallError::NoAgent(socket.into()),
            io::ErrorKind::PermissionDenied => CallError::Denied(socket.into()),
            _ => CallError::Connect { socket: socket.into(), source: error },
        })?;
        // 0 stands for a process of another process namespace.
        let process =
            stream.peer_cred().ok().and_then(|peer| peer.pid()?.try_into().ok()).filter(|pid| *pid > 0);
        let mut stream = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_: Uri| {
            let stream = stream.take();
            async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
        });
        // The name is never resolved: it is what HTTP wants as `:authority`.
        let channel = Endpoint::from_static("http://weft.local").connect_with_connector(connector).await;
        let channel = channel
            .map_err(|error| CallError::Connect { socket: socket.into(), source: io::Error::other(error) })?;
        let policy = PolicyClient::new(channel.clone()).max_decoding_message_size(LARGEST_REPLY);
        let admin = AdminClient::new(channel).max_decoding_message_size(LARGEST_REPLY);
        Ok(Self { socket: socket.into(), process, admin, policy })
    }

    /// The agent's process id, if the kernel tells.
    pub fn process(&self) -> Option<u32> {
        self.process
    }

    pub async fn status(&mut self) -> Result<local::StatusReply, CallError> {
        within(&self.socket, PATIENCE, self.admin.status(local::StatusRequest {})).await
    }

    pub async fn peers(&mut self) -> Result<local::PeersReply, CallError> {
        within(&self.socket, PATIENCE, self.admin.peers(local::PeersRequest {})).await
    }

    pub async fn ipam(&mut self) -> Result<local::IpamReply, CallError> {
        within(&self.socket, PATIENCE, self.admin.ipam(local::IpamRequest {})).await
    }

    pub async fn pods(&mut self) -> Result<local::PodsReply, CallError> {
        within(&self.socket, PATIENCE, self.admin.pods(local::PodsRequest {})).await
    }

    pub async fn policy_apply(
        &mut self,
        request: local::PolicyApplyRequest,
    ) -> Result<local::PolicyApplyReply, CallError> {
        within(&self.socket, PATIENCE_FOR_POLICIES, self.policy.apply(request)).await
    }

    pub async fn policy_delete(
        &mut self,
        request: local::PolicyDeleteRequest,
    ) -> Result<local::PolicyDeleteReply, CallError> {
        within(&self.socket, PATIENCE_FOR_POLICIES, self.policy.delete(request)).await
    }

    pub async fn policy_list(&mut self) -> Result<local::PolicyListReply, CallError> {
        within(&self.socket, PATIENCE, self.policy.list(local::PolicyListRequest {})).await
    }

    pub async fn policy_explain(
        &mut self,
        request: local::PolicyExplainRequest,
    ) -> Result<local::PolicyExplainReply, CallError> {
        within(&self.socket, PATIENCE, self.policy.explain(request)).await
    }

    /// Has the agent hand its addresses to a peer and stop.
    ///
    /// # Errors
    /// The agent refuses while pods are attached or nobody can take the addresses, unless `force` is set.
    pub async fn leave(&mut self, force: bool) -> Result<local::LeaveReply, CallError> {
        within(&self.socket, PATIENCE_FOR_LEAVE, self.admin.leave(local::LeaveRequest { force })).await
    }
}

impl Client {
    /// Declares peers dead.
    ///
    /// # Errors
    /// The agent refuses while somebody hears them, unless `force` is set, or where nobody signs for an operator.
    pub async fn forget(&mut self, request: local::ForgetRequest) -> Result<local::ForgetReply, CallError> {
        within(&self.socket, PATIENCE_FOR_LEAVE, self.admin.forget(request)).await
    }
}

async fn within<T>(
    socket: &Path,
    after: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    let slow = |_| CallError::Slow { socket: socket.into(), after };
    let refused = |status: Status| match status.code() {
        Code::PermissionDenied => CallError::Denied(socket.into()),
        Code::Unimplemented => CallError::Refused {
            socket: socket.into(),
            reason: "it is of a version that does not know this question".into(),
        },
        // An error of the transport, not an answer.
        _ if std::error::Error::source(&status).is_some() => CallError::Closed(socket.into()),
        _ => CallError::Refused { socket: socket.into(), reason: status.message().into() },
    };
    tokio::time::timeout(after, call).await.map_err(slow)?.map(Response::into_inner).map_err(refused)
}

/// An agent answers from what it has at hand.
const PATIENCE: Duration = Duration::from_secs(10);
/// Thousands of objects take a while until they are in force.
const PATIENCE_FOR_POLICIES: Duration = Duration::from_secs(30);
/// Leaving takes until a peer has the addresses.
const PATIENCE_FOR_LEAVE: Duration = Duration::from_secs(30);
/// Some hundred bytes for each of thousands of peers and ranges.
const LARGEST_REPLY: usize = 64 << 20;
