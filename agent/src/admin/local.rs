//! The `Admin` service of local.proto: what the command line asks an agent.

use super::{Observer, replies};
use crate::types::PeerName;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};
use weft_proto::local::{self, admin_server};

/// Answers from snapshots; passes `Leave` on. Serve it through [`AdminService::into_server`].
pub struct AdminService {
    observer: Observer,
    leave: mpsc::Sender<LeaveCall>,
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

impl AdminService {
    pub fn new(observer: Observer, leave: mpsc::Sender<LeaveCall>) -> Self {
        Self { observer, leave }
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
}
