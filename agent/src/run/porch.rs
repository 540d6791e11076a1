//! What answers probes from the first moment on, before there is anything to say: that the agent is alive and starting.
//!
//! In a cluster that is while the API server is waited for, so that nobody restarts an agent because that is away.

use super::serve::until;
use crate::{
    admin::{Front, HttpServer, Pages},
    config::Config,
};
use futures_util::FutureExt;
use tokio::{sync::watch, task::JoinSet};

/// The servers of an agent, of which that of its probes is the first. Dropped, they end.
pub struct Porch {
    /// End, with their last answers given, when told to.
    pub servers: JoinSet<anyhow::Result<()>>,
    pub stopping: watch::Sender<bool>,
    pub http: Front,
}

impl Porch {
    /// # Errors
    /// The probes' socket cannot be had.
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        let (stopping, stopped) = watch::channel(false);
        let (mut servers, http) = (JoinSet::new(), Front::default());
        if let Some(path) = &config.probe_socket {
            let probes = HttpServer::bind_probes(path)?;
            servers.spawn(probes.serve(http.router(Pages::starting), until(&stopped)).map(Ok));
        }
        Ok(Self { servers, stopping, http })
    }
}
