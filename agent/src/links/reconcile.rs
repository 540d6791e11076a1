//! One round: look, plan, apply. And its reverse, for `weft reset`.

use super::{
    apply::{Applier, Failure, is_firewall},
    desired::Desired,
    firewall::{self, Firewall},
    found::Found,
    observe,
    observed::Observed,
    plan::{Change, plan, sysctls, teardown},
};
use crate::linux::{
    netlink::Netlink,
    nft::{Nft, NftError},
};
use anyhow::Context;
use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
};

/// The kernel of one network namespace, with what must be kept between rounds.
pub(super) struct Kernel {
    netlink: Netlink,
    nft: Nft,
    found: Found,
    /// None: somebody else may have changed it.
    firewall: Option<Firewall>,
    /// The last processes that changed the firewall for us: their events are no news.
    nft_processes: VecDeque<u32>,
}

/// What a round saw, did, and could not do.
#[derive(Debug)]
pub(super) struct Round {
    /// Before the changes.
    pub observed: Observed,
    pub changes: Vec<Change>,
    pub failures: Vec<Failure>,
}

impl Kernel {
    /// Of the calling thread's network namespace.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        let (netlink, nft) = (Netlink::open()?, Nft::find()?);
        let found = Found::open(state_dir)?;
        Ok(Self { netlink, nft, found, firewall: None, nft_processes: VecDeque::new() })
    }

    /// The next round reads nftables again.
    pub fn distrust_firewall(&mut self) {
        self.firewall = None;
    }

    /// Whether this netlink port belongs to an `nft` that we started.
    pub fn is_own_nft(&self, port: u32) -> bool {
        self.nft_processes.contains(&port)
    }

    /// Looks, plans and applies. `extra` may add changes at the end, from what was seen.
    ///
    /// # Errors
    /// The kernel could not be looked at; nothing was changed.
    pub async fn round(
        &mut self,
        desired: &Desired,
        extra: impl Fn(&Observed) -> Vec<Change>,
    ) -> anyhow::Result<Round> {
        let first = self.attempt(desired, &extra).await?;
        if !first.failures.iter().any(|failure| is_firewall(&failure.change)) {
            return Ok(first);
        }
        // The firewall was not what we took it for: look again, once.
        self.distrust_firewall();
        let mut second = self.attempt(desired, &extra).await?;
        second.changes.extend(first.changes);
        Ok(second)
    }

    async fn attempt(
        &mut self,
        desired: &Desired,
        extra: impl Fn(&Observed) -> Vec<Change>,
    ) -> anyhow::Result<Round> {
        let observed = self.observe(desired).await?;
        let mut changes = plan(desired, &observed);
        changes.extend(extra(&observed));
        let unsaved = self.remember_sysctls(desired, &observed, &changes);
        let mut failures = Vec::new();
        if let Err(error) = unsaved {
            let (kept, skipped) =
                changes.into_iter().partition(|change| !matches!(change, Change::SetSysctl { .. }));
            changes = kept;
            let skip = |change| Failure { change, error: anyhow::Error::msg(format!("{error:#}")) };
            failures.extend(Vec::into_iter(skipped).map(skip));
        }
        let indices: BTreeMap<_, _> =
            observed.links.values().map(|link| (link.name.clone(), link.index)).collect();
        let processes = &mut self.nft_processes;
        let remember = |process| {
            processes.truncate(OWN_NFT_PROCESSES - 1);
            processes.push_front(process);
        };
        failures
            .extend(Applier::new(&self.netlink, Some(&self.nft), indices).apply(&changes, remember).await);
        self.firewall = match failures.iter().any(|failure| is_firewall(&failure.change)) {
            true => None,
            false => Some(firewall::after(observed.firewall.clone(), &changes)),
        };
        Ok(Round { observed, changes, failures })
    }

    async fn observe(&mut self, desired: &Desired) -> anyhow::Result<Observed> {
        let mut observed = observe::routing(&self.netlink).await?;
        let keys = sysctls::wanted(desired, &observed);
        observe::sysctls(&mut observed, keys.keys())?;
        observed.firewall = match self.firewall.take() {
            Some(known) => known,
            None => observe::firewall(&self.nft).await?,
        };
        Ok(observed)
    }

    fn remember_sysctls(
        &mut self,
        desired: &Desired,
        observed: &Observed,
        changes: &[Change],
    ) -> anyhow::Result<()> {
        let (bridge, tun) = (&desired.bridge.name, &desired.tun.name);
        self.found.remember(changes.iter().filter_map(|change| match change {
            Change::SetSysctl { key, .. } if sysctls::outlives_us(key, bridge, tun) => {
                Some((key.clone(), observed.sysctls.get(key)?.clone()))
            }
            _ => None,
        }))
    }
}

/// Looks at links and routes, before anything is touched.
pub async fn look() -> anyhow::Result<Observed> {
    Ok(observe::routing(&Netlink::open()?).await?)
}

/// Removes all that Weft made in this network namespace, also what an agent that no longer runs left behind, and puts
/// the sysctls back. Returns what was removed.
///
/// # Errors
/// Names all that could not be removed; the rest is gone.
pub async fn remove(state_dir: &Path, bridge: &str, tun: &str) -> anyhow::Result<Vec<String>> {
    let netlink = Netlink::open()?;
    let nft = match Nft::find() {
        Ok(nft) => Some(nft),
        Err(NftError::Missing) => None,
        Err(error) => return Err(error.into()),
    };
    let found = Found::open(state_dir)?;
    let mut observed = observe::routing(&netlink).await?;
    observe::sysctls(&mut observed, found.values().keys())?;
    if let Some(nft) = &nft {
        observed.firewall = observe::firewall(nft).await?;
    }
    // The firewall goes last: until then nothing unmasked leaves the node.
    let changes = teardown(bridge, tun, &observed, found.values());
    let (last, first): (Vec<_>, Vec<_>) = changes.into_iter().partition(is_firewall);
    let mut applier = Applier::new(&netlink, nft.as_ref(), BTreeMap::new());
    let mut failures = applier.apply(&first, |_| {}).await;
    failures.extend(applier.apply(&last, |_| {}).await);
    if failures.is_empty() {
        found.forget()?;
        return Ok(first.iter().chain(&last).map(Change::to_string).collect());
    }
    let texts: Vec<_> = failures.iter().map(|failure| format!("{:#}", failure.error)).collect();
    Err(anyhow::Error::msg(texts.join("; "))).context("remove what Weft made")
}

/// Events may come that many changes late.
const OWN_NFT_PROCESSES: usize = 16;
