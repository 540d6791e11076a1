//! Follows the host's addresses on the underlay: links that run from one that is gone are made anew, and unless a flag
//! has named the endpoints, the own record says where this host is now.

use super::host;
use crate::{
    config::{Config, HostFacts},
    links,
    linux::netlink::AddressMonitor,
    mesh::task::{Handle as Mesh, Stopped},
    types::Endpoint,
};
use anyhow::Context;
use std::{collections::BTreeSet, future::pending, net::IpAddr, time::Duration};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

/// Runs until the kernel's events can't be read.
pub async fn follow(config: Config, mesh: Mesh, links: links::Handle) -> anyhow::Result<()> {
    let monitor = AddressMonitor::open()?;
    let mut endpoints = config.endpoints.clone();
    let mut had = BTreeSet::new();
    loop {
        let host = match host::facts().await {
            Ok(host) => host,
            Err(error) => {
                warn!(error = format!("{error:#}"), "this host's addresses cannot be read; trying again");
                sleep(PAUSE).await;
                continue;
            }
        };
        let has = addresses(&host);
        let gone: BTreeSet<_> = had.difference(&has).copied().collect();
        had = has;
        let now = config.endpoints_now(&endpoints, &host);
        if now != endpoints {
            info!(before = told(&endpoints), now = told(&now), "this host has moved");
            endpoints.clone_from(&now);
            let underlay = now.iter().map(|endpoint| endpoint.0.ip()).collect();
            told_or_stopped(mesh.update_record(move |record| record.endpoints = now).await).await;
            if let Err(error) = links.update(move |desired| desired.underlay = underlay).await {
                warn!(%error, "the links do not follow this host's address yet; they try again");
            }
        }
        // After the record: it is told over the links that are made now.
        if !gone.is_empty() {
            told_or_stopped(mesh.moved(gone).await).await;
        }
        monitor.changed().await.context("watch this host's addresses")?;
        settle(&monitor).await.context("watch this host's addresses")?;
    }
}

/// Waits until nothing has changed for a moment: an address goes before the next one comes, and its routes after it.
async fn settle(monitor: &AddressMonitor) -> std::io::Result<()> {
    let last = Instant::now() + SETTLE_MAX;
    while let Ok(changed) = timeout_at((Instant::now() + SETTLE).min(last), monitor.changed()).await {
        changed?;
    }
    Ok(())
}

/// Why the mesh has stopped, others know and say.
async fn told_or_stopped(told: Result<(), Stopped>) {
    if told.is_err() {
        pending().await
    }
}

fn addresses(host: &HostFacts) -> BTreeSet<IpAddr> {
    host.addresses.iter().map(|address| address.ip()).collect()
}

fn told(endpoints: &[Endpoint]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(ToString::to_string).collect();
    endpoints.join(",")
}

/// After a look that failed.
const PAUSE: Duration = Duration::from_secs(1);
const SETTLE: Duration = Duration::from_millis(50);
const SETTLE_MAX: Duration = Duration::from_millis(500);
