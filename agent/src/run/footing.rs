//! What an agent stands on: its name in time, its ports and its sockets; its own, or taken over.

use super::takeover::{Inheritance, Listeners};
use crate::{
    admin::{HttpServer, LocalSocket},
    config::Config,
    datapath,
    linux::{
        tun::{Offloads, Queue},
        udp::Socket,
    },
    mesh::gossip::Item,
    types::{DataId, Incarnation, TUN},
};
use anyhow::Context;
use std::{
    net::TcpListener,
    os::fd::{AsFd, BorrowedFd},
};

pub struct Footing {
    /// None: it begins anew.
    pub same: Option<Same>,
    /// What the mesh knows already.
    pub items: Vec<Item>,
    pub control: TcpListener,
    pub http: HttpServer,
    pub local: LocalSocket,
    /// None: not opened yet.
    pub queues: Option<(Vec<Vec<Queue>>, Offloads)>,
    pub sockets: Vec<Vec<Socket>>,
}

/// By what peers take it for the one that was.
pub struct Same {
    pub incarnation: Incarnation,
    /// Of its own record.
    pub version: u64,
    pub data_id: DataId,
}

impl Footing {
    /// Takes all ports; nothing of the kernel's is touched before, so that a refusal leaves no trace.
    pub async fn new(config: &Config) -> anyhow::Result<Self> {
        let control = TcpListener::bind(config.listen).with_context(|| {
            let hint = "stop what uses it (see `ss -tlpn`) or choose another";
            format!("--listen {}: cannot take the TCP port for control links; {hint}", config.listen)
        })?;
        let sockets = datapath::task::bind(config.listen, config.data_threads.get()).context("--listen")?;
        let http = HttpServer::bind(config.metrics).await?;
        let local = LocalSocket::bind(&config.socket())?;
        Ok(Self { same: None, items: Vec::new(), control, http, local, queues: None, sockets })
    }

    pub fn inherited(inheritance: Inheritance, config: &Config) -> anyhow::Result<Self> {
        let Inheritance { incarnation, version, data_id, items, control, metrics, local, workers } =
            inheritance;
        let (queues, sockets, offloads) = datapath::task::adopt(TUN, workers)?;
        if sockets.len() != config.data_threads.get() {
            let (running, wished) = (sockets.len(), config.data_threads);
            tracing::warn!(
                running,
                wished,
                "--data-threads takes effect when the agent is stopped and started"
            );
        }
        Ok(Self {
            same: Some(Same { incarnation, version, data_id }),
            items,
            control,
            http: HttpServer::adopt(metrics).context("--metrics-addr")?,
            local: LocalSocket::adopt(local, &config.socket()).context("--run-dir")?,
            queues: Some((queues, offloads)),
            sockets,
        })
    }

    /// The listeners once more, to be handed over some day.
    pub fn listeners(&self) -> anyhow::Result<Listeners> {
        let again =
            |fd: BorrowedFd<'_>| fd.try_clone_to_owned().context("keep a listener for the next agent");
        Ok(Listeners {
            control: again(self.control.as_fd())?,
            metrics: again(self.http.as_fd())?,
            local: again(self.local.as_fd())?,
        })
    }
}
