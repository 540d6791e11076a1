//! Carries messages between the mesh and the allocator, and lets the node leave when it is told to.

use crate::{
    admin::LeaveCall,
    identity::task::{Current, changed},
    ipam::{
        death, election,
        task::{Handle as Ipam, Outgoing},
        token,
    },
    mesh::task::{Handle as Mesh, Incoming},
    types::PeerName,
};
use anyhow::{Context, bail};
use std::pin::pin;
use tokio::sync::mpsc;
use tracing::info;

pub struct Switchboard {
    pub mesh: Mesh,
    pub ipam: Ipam,
    pub identity: Option<Current>,
    pub incoming: mpsc::Receiver<Incoming>,
    pub outgoing: mpsc::Receiver<Outgoing>,
    pub leaving: mpsc::Receiver<LeaveCall>,
}

impl Switchboard {
    /// Runs until the node has left or cannot go on; `early` came before the allocator was there.
    ///
    /// # Errors
    /// Why the agent must not or cannot run any more.
    pub async fn run(mut self, early: Vec<Incoming>) -> anyhow::Result<()> {
        for message in early {
            self.deliver(message).await?;
        }
        loop {
            tokio::select! {
                message = self.incoming.recv() => self.deliver(message.context("the mesh has stopped")?).await?,
                Some(message) = self.outgoing.recv() => self.send(message).await?,
                () = changed(&mut self.identity) => self.ipam.keys().await?,
                Some(call) = self.leaving.recv() => if self.leave(call).await? { return Ok(()) },
            }
        }
    }

    async fn deliver(&self, message: Incoming) -> anyhow::Result<()> {
        match message {
            Incoming::Items { channel, items } if CHANNELS.contains(&channel.as_str()) => {
                self.ipam.items(items).await?;
            }
            Incoming::Unicast { from, channel, body } if channel == token::CHANNEL => {
                self.ipam.unicast(from, body).await?;
            }
            // Peer records come as snapshots; what else there is belongs to a newer version.
            Incoming::Items { .. } | Incoming::Unicast { .. } => {}
            Incoming::Seeds(seeds) => self.ipam.seeds(seeds.into_iter().collect()).await?,
            Incoming::Joined => {}
            Incoming::Contact => self.ipam.contact().await?,
            Incoming::Fatal(why) => bail!(why),
        }
        Ok(())
    }

    async fn send(&self, message: Outgoing) -> anyhow::Result<()> {
        match message {
            Outgoing::Seeds(seeds) => self.mesh.seeds(seeds.names().into()).await?,
            Outgoing::Publish(items) => self.mesh.publish(items).await?,
            Outgoing::Unicast { to, body } => self.mesh.unicast(to, token::CHANNEL, body).await?,
        }
        Ok(())
    }

    /// Hands the addresses over and tells the peers; true if the node has left.
    async fn leave(&mut self, call: LeaveCall) -> anyhow::Result<bool> {
        match self.hand_over(call.force).await {
            Ok(heir) => {
                self.mesh.leave().await;
                info!(heir = heir.as_ref().map(PeerName::as_str), "left the network");
                let _ = call.done.send(Ok(heir));
                Ok(true)
            }
            Err(why) => {
                let _ = call.done.send(Err(why));
                Ok(false)
            }
        }
    }

    async fn hand_over(&mut self, force: bool) -> Result<Option<PeerName>, String> {
        let view = self.ipam.view().borrow().clone();
        let ipam = self.ipam.clone();
        let mut leave = pin!(ipam.leave(force));
        let heir = loop {
            tokio::select! {
                heir = &mut leave => break heir.map_err(|error| error.to_string())?,
                Some(message) = self.outgoing.recv() => {
                    self.send(message).await.map_err(|error| error.to_string())?;
                }
            }
        };
        while let Ok(message) = self.outgoing.try_recv() {
            self.send(message).await.map_err(|error| error.to_string())?;
        }
        if heir.is_none()
            && !view.own.is_empty()
            && !force
            && view.ranges.iter().any(|(_, owner)| !is_me(&self.mesh, owner))
        {
            return Err("no peer can be reached that could take this node's addresses: \
                        try again when one is, or give them up with --force"
                .into());
        }
        Ok(heir)
    }
}

fn is_me(mesh: &Mesh, name: &PeerName) -> bool {
    mesh.peers().borrow().own().name == *name
}

/// The allocator's.
const CHANNELS: [&str; 3] = [token::CHANNEL, death::CHANNEL, election::CHANNEL];
