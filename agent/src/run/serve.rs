//! What is answered: over HTTP metrics, health and the status page, on the local socket the shim and the command line.

use super::{
    attach::{IpamAddresses, LinksPorts},
    policy::Policies,
};
use crate::{
    admin::{AdminService, ForgetCall, Heartbeats, LeaveCall, Metrics, Observer, Pages, Readiness, STARTING},
    cni,
};
use axum::{extract::Request, response::Response};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tonic::{Status, service::Routes};
use weft_proto::local::{cni_server::CniServer, policy_server::PolicyServer};

/// Whom there is to ask, once all is at work.
pub struct Answers {
    pub cni: cni::Service<IpamAddresses, LinksPorts>,
    pub observer: Observer,
    pub policies: Option<Policies>,
    pub readiness: Readiness,
    pub heartbeats: Heartbeats,
}

impl Answers {
    pub fn pages(&self) -> Pages {
        let mut metrics = Metrics::new(self.observer.clone());
        self.cni.metrics().register(metrics.registry());
        if let Some(policies) = &self.policies {
            metrics.registry().register_collector(Box::new(policies.handle().metrics()));
        }
        Pages {
            readiness: self.readiness.clone(),
            heartbeats: self.heartbeats.clone(),
            metrics: Arc::new(metrics),
            observer: self.observer.clone(),
        }
    }

    pub fn local(self, leave: mpsc::Sender<LeaveCall>, forget: mpsc::Sender<ForgetCall>) -> axum::Router {
        let routes = Routes::new(CniServer::new(self.cni))
            .add_service(AdminService::new(self.observer, leave, forget).into_server());
        let routes = match self.policies {
            Some(policies) => routes.add_service(PolicyServer::new(policies)),
            None => routes,
        };
        routes.into_axum_router()
    }
}

/// What the local API answers before there is more to say. A runtime tries again.
pub fn starting(request: &Request) -> Response {
    let code = match request.uri().path().ends_with("/Ready") {
        true => cni::answer::Code::CannotAdd,
        false => cni::answer::Code::TryAgainLater,
    };
    Status::from(cni::answer::Failure::new(code, STARTING)).into_http()
}

/// Resolves when the agent is to stop.
pub fn until(stopped: &watch::Receiver<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stopped = stopped.clone();
    async move { drop(stopped.wait_for(|stop| *stop).await) }
}
