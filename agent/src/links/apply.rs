//! Does what a plan says, step by step; what fails is collected, and the rest goes on.

use super::{
    firewall,
    plan::{BRIDGE_OPTIONS, Change, PORT_OPTIONS},
};
use crate::linux::{
    netlink::{AddressFlags, Netlink, NetlinkError, Route},
    nft::{Nft, NftError},
    sysctl,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// A change that did not work.
#[derive(Debug)]
pub(super) struct Failure {
    pub change: Change,
    pub error: anyhow::Error,
}

/// Kernel calls, with the indices of links that were looked up.
pub(super) struct Applier<'a> {
    pub netlink: &'a Netlink,
    pub nft: Option<&'a Nft>,
    indices: BTreeMap<String, u32>,
}

impl<'a> Applier<'a> {
    /// `indices` of the links that were there when the plan was made.
    pub fn new(netlink: &'a Netlink, nft: Option<&'a Nft>, indices: BTreeMap<String, u32>) -> Self {
        Self { netlink, nft, indices }
    }

    /// All firewall changes go first and in one piece; `nft_process` is told the id of the program that makes them.
    pub async fn apply(&mut self, changes: &[Change], nft_process: impl FnOnce(u32)) -> Vec<Failure> {
        let mut failures = Vec::new();
        let script = firewall::script(changes);
        if !script.is_empty()
            && let Err(error) = self.run(&script, nft_process).await
        {
            let text = format!("{:#}", anyhow::Error::from(error));
            failures.extend(
                changes.iter().filter(|change| is_firewall(change)).map(|change| Failure {
                    change: change.clone(),
                    error: anyhow::Error::msg(text.clone()),
                }),
            );
        }
        for change in changes.iter().filter(|change| !is_firewall(change)) {
            if let Err(error) = self.step(change).await {
                failures.push(Failure { change: change.clone(), error });
            }
        }
        self.settle(changes).await;
        failures
    }

    /// Waits until ports that came up let frames through. The kernel takes note of a carrier later than of the link that
    /// goes up; until then the bridge drops, and a pod's first packets would be lost.
    async fn settle(&mut self, changes: &[Change]) {
        let deadline = Instant::now() + CARRIER_WAIT;
        let mut bridges = BTreeSet::new();
        for change in changes {
            let (Change::Enslave { port: name, .. } | Change::SetUp { link: name }) = change else {
                continue;
            };
            while let Ok(link) = self.netlink.link_by_name(name).await {
                bridges.extend(link.master);
                if !link.carrier || link.master.is_none() || link.forwarding || Instant::now() > deadline {
                    break;
                }
                tokio::time::sleep(CARRIER_LOOK).await;
            }
        }
        for bridge in bridges {
            // To hurry it; that it may be gone again is no matter.
            let _ = self.netlink.link_by_index(bridge).await;
        }
    }

    async fn step(&mut self, change: &Change) -> anyhow::Result<()> {
        if let Change::SetSysctl { key, value } = change {
            return Ok(sysctl::write(key, value)?);
        }
        match self.tell_kernel(change).await {
            // The kernel takes a link's addresses, routes, neighbours and FDB away with it.
            Err(error) if change.removes() && error.is_gone() => Ok(()),
            // In the change's own words, which name links.
            done => done.map_err(|error| anyhow::anyhow!("{change}: {}", error.errno())),
        }
    }

    async fn tell_kernel(&mut self, change: &Change) -> Result<(), NetlinkError> {
        let netlink = self.netlink;
        match change {
            Change::CreateBridge { name, mac, mtu } => {
                netlink.create_bridge(name, *mac, *mtu, BRIDGE_OPTIONS).await
            }
            Change::DeleteLink { link } => netlink.delete_link(self.index(link).await?).await,
            Change::SetBridge { link } => netlink.set_bridge(self.index(link).await?, BRIDGE_OPTIONS).await,
            Change::SetMac { link, mac } => netlink.set_mac(self.index(link).await?, *mac).await,
            Change::SetMtu { link, mtu } => netlink.set_mtu(self.index(link).await?, *mtu).await,
            Change::SetUp { link } => netlink.set_up(self.index(link).await?, true).await,
            Change::Enslave { port, bridge } => {
                let bridge = self.index(bridge).await?;
                netlink.set_master(self.index(port).await?, Some(bridge)).await
            }
            Change::SetPort { port } => netlink.set_port(self.index(port).await?, PORT_OPTIONS).await,
            Change::AddAddress { link, address } => {
                let flags = AddressFlags { no_dad: true, no_prefix_route: true };
                exists_is_fine(netlink.add_address(self.index(link).await?, *address, flags).await)
            }
            Change::DeleteAddress { link, address } => {
                netlink.delete_address(self.index(link).await?, *address).await
            }
            Change::SetFdb { port, mac } => netlink.set_fdb(self.index(port).await?, *mac).await,
            Change::DeleteFdb { port, mac } => netlink.delete_fdb(self.index(port).await?, *mac).await,
            Change::SetNeighbour { link, address, mac } => {
                netlink.set_neighbour(self.index(link).await?, *address, *mac).await
            }
            Change::DeleteNeighbour { link, address } => {
                netlink.delete_neighbour(self.index(link).await?, *address).await
            }
            Change::AddRoute(route) => netlink.add_route(&self.route(route).await?).await,
            Change::ReplaceRoute(route) => netlink.replace_route(&self.route(route).await?).await,
            Change::DeleteRoute(route) => netlink.delete_route(&self.route(route).await?).await,
            Change::SetSysctl { .. }
            | Change::LoadTable(_)
            | Change::DropTable(_)
            | Change::AddElement(_)
            | Change::DeleteElement(_) => Ok(()),
        }
    }

    async fn run(&self, script: &str, spawned: impl FnOnce(u32)) -> Result<(), NftError> {
        self.nft.ok_or(NftError::Missing)?.run(script, spawned).await
    }

    async fn index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        if let Some(index) = self.indices.get(name) {
            return Ok(*index);
        }
        let index = self.netlink.link_by_name(name).await?.index;
        self.indices.insert(name.into(), index);
        Ok(index)
    }

    async fn route(&mut self, route: &Route<String>) -> Result<Route, NetlinkError> {
        let link = match &route.link {
            Some(name) => Some(self.index(name).await?),
            None => None,
        };
        Ok(route.with_link(link))
    }
}

pub(super) fn is_firewall(change: &Change) -> bool {
    matches!(
        change,
        Change::LoadTable(_) | Change::DropTable(_) | Change::AddElement(_) | Change::DeleteElement(_)
    )
}

fn exists_is_fine(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    result.or_else(|error| if error.is_exists() { Ok(()) } else { Err(error) })
}

/// The kernel looks at carriers once a second at least.
const CARRIER_WAIT: Duration = Duration::from_millis(1200);
const CARRIER_LOOK: Duration = Duration::from_millis(5);
