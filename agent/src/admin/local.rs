//! The `Admin` service of local.proto: what the command line asks an agent.

use super::{Observer, replies};
use crate::types::{PeerName, Prefix};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};
use weft_proto::local::{self, admin_server};

/// Answers from snapshots; passes `Leave` on. Serve it through [`AdminService::into_server`].
pub struct AdminService {
    observer: Observer,
    leave: mpsc::Sender<LeaveCall>,
    forget: mpsc::Sender<ForgetCall>,
}

/// Somebody wants this node to hand its addresses over and the agent to stop.
#[derive(Debug)]
pub struct LeaveCall {
    /// Leave though pods are attached, or nobody can take the addresses.
    pub force: bool,
    /// Who has the addresses now, none where there was no peer or nothing to give; or why it cannot be.
    /// The agent stops once this is answered; the answer still reaches the caller in a graceful shutdown.
    pub done: oneshot::Sender<Result<Option<PeerName>, String>>,
}

/// An operator declares peers dead.
#[derive(Debug)]
pub struct ForgetCall {
    pub peers: Vec<PeerName>,
    /// Though somebody hears them, or cannot be asked.
    pub force: bool,
    /// Only say what is to be sealed.
    pub prepare: bool,
    /// Statements with an operator's seals.
    pub sealed: Vec<(Vec<u8>, Vec<u8>)>,
    pub done: oneshot::Sender<Result<Forgotten, String>>,
}

/// What came of a [`ForgetCall`].
#[derive(Debug, Default)]
pub struct Forgotten {
    /// To be sealed by an operator.
    pub statements: Vec<Vec<u8>>,
    /// What this node has now.
    pub taken: Vec<Prefix>,
    /// Who has yet to hear of it.
    pub waiting_for: Vec<PeerName>,
}

impl AdminService {
    pub fn new(observer: Observer, leave: mpsc::Sender<LeaveCall>, forget: mpsc::Sender<ForgetCall>) -> Self {
        Self { observer, leave, forget }
    }

    pub fn into_server(self) -> admin_server::AdminServer<Self> {
        admin_server::AdminServer::new(self)
    }
}

#[tonic::async_trait]
impl admin_server::Admin for AdminService {
    async fn status(&self, _: Request<local::StatusRequest>) -> Result<Response<local::StatusReply>, Status> {
        Ok(Response::new(replies::status(&self.observer.snapshot())))
    }

    async fn peers(&self, _: Request<local::PeersRequest>) -> Result<Response<local::PeersReply>, Status> {
        Ok(Response::new(replies::peers(&self.observer.snapshot())))
    }

    async fn ipam(&self, _: Request<local::IpamRequest>) -> Result<Response<local::IpamReply>, Status> {
        Ok(Response::new(replies::ipam(&self.observer.snapshot())))
    }

    async fn pods(&self, _: Request<local::PodsRequest>) -> Result<Response<local::PodsReply>, Status> {
        Ok(Response::new(replies::pods(&self.observer.snapshot())))
    }

    async fn leave(
        &self,
        request: Request<local::LeaveRequest>,
    ) -> Result<Response<local::LeaveReply>, Status> {
        let (done, answer) = oneshot::channel();
        // When the channel is full others asked before us: wait.
        let stopping = |_| Status::unavailable("the agent is stopping already");
        let force = request.into_inner().force;
        self.leave.send(LeaveCall { force, done }).await.map_err(stopping)?;
        let gone = |_| Status::unavailable("the agent stopped before the addresses were handed over");
        let heir = answer.await.map_err(gone)?.map_err(Status::failed_precondition)?;
        Ok(Response::new(local::LeaveReply { heir: heir.map(|h| h.to_string()).unwrap_or_default() }))
    }

    async fn forget(
        &self,
        request: Request<local::ForgetRequest>,
    ) -> Result<Response<local::ForgetReply>, Status> {
        let local::ForgetRequest { peers, force, prepare, sealed } = request.into_inner();
        let peers = peers.iter().map(|name| name.parse()).collect::<Result<Vec<PeerName>, _>>();
        let peers = peers.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let sealed = sealed.into_iter().map(|statement| (statement.body, statement.seal)).collect();
        let (done, answer) = oneshot::channel();
        let stopping = |_| Status::unavailable("the agent is stopping already");
        self.forget.send(ForgetCall { peers, force, prepare, sealed, done }).await.map_err(stopping)?;
        let gone = |_| Status::unavailable("the agent stopped before it was done");
        let Forgotten { statements, taken, waiting_for } =
            answer.await.map_err(gone)?.map_err(Status::failed_precondition)?;
        let statement = |body| local::Statement { body, seal: Vec::new() };
        Ok(Response::new(local::ForgetReply {
            statements: statements.into_iter().map(statement).collect(),
            taken: taken.iter().map(Prefix::to_string).collect(),
            waiting_for: waiting_for.iter().map(PeerName::to_string).collect(),
        }))
    }
}
