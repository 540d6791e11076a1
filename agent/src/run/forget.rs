//! Forgetting peers that are dead: who may be forgotten, who says so, and what follows.
//!
//! ```text
//!   weft forget x ─▶ nobody hears x? everybody else can be asked? ─▶ sealed as an operator ─▶ ipam, mesh
//! ```

use super::alive::alive;
use crate::{
    admin::{ForgetCall, Forgotten},
    config::Config,
    identity::{self, Checker, Source, task::Current},
    ipam::{
        Seeding, View,
        death::{self, Death, DeathGossip, SEALED},
        task::Handle as Addresses,
    },
    mesh::{
        gossip::{Gossiper, Item},
        peers::PeerSet,
        task::Handle as Mesh,
    },
    types::PeerName,
};
use anyhow::{Context, bail, ensure};
use prost::Message;
use std::{collections::BTreeSet, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tracing::info;

/// What it takes to forget peers.
pub struct Forgetter {
    me: PeerName,
    mesh: Mesh,
    ipam: Addresses,
    identity: Option<Current>,
    source: Option<Source>,
    /// Somebody else says who is dead.
    in_cluster: bool,
    observes: bool,
}

impl Forgetter {
    pub fn new(config: &Config, mesh: &Mesh, ipam: &Addresses, identity: Option<Current>) -> Self {
        Self {
            me: config.name.clone(),
            mesh: mesh.clone(),
            ipam: ipam.clone(),
            identity,
            source: config.identity.clone(),
            in_cluster: config.kubernetes.is_some(),
            observes: config.seeding == Seeding::Observer,
        }
    }

    /// Answers calls, and has the mesh forget whom the ring has forgotten.
    pub async fn run(self, mut calls: mpsc::Receiver<ForgetCall>) -> anyhow::Result<()> {
        let (mut view, mut told) = (self.ipam.view(), None);
        loop {
            let deaths = view.borrow_and_update().deaths.clone();
            if told.as_ref() != Some(&deaths) {
                for death in deaths.iter() {
                    self.mesh.forget(death.peer.clone(), death.incarnation).await?;
                }
                told = Some(deaths);
            }
            tokio::select! {
                changed = view.changed() => changed.context("the allocator has stopped")?,
                Some(call) = calls.recv() => {
                    let answer = self.forget(&call).await.map_err(|error| format!("{error:#}"));
                    let _ = call.done.send(answer);
                }
            }
        }
    }

    async fn forget(&self, call: &ForgetCall) -> anyhow::Result<Forgotten> {
        ensure!(
            !self.in_cluster,
            "in a cluster a node is forgotten once its Node is deleted: `kubectl delete node`"
        );
        ensure!(!self.observes, "this node only observes, and takes nothing over: forget on another");
        let peers = self.mesh.peers().borrow().clone();
        let view = self.ipam.view().borrow().clone();
        let links = self.mesh.status().await?;
        let named: BTreeSet<PeerName> = call.peers.iter().cloned().collect();
        ensure!(!named.contains(&self.me), "{} is this node: see `weft reset`", self.me);
        let alive = alive(&peers, Some(&links));
        if !call.force {
            may_forget(&named, &peers, &alive)?;
        }
        let epoch = view.deaths.iter().map(|death| death.epoch).max().unwrap_or(0).max(view.epoch) + 1;
        let before = death::digest(view.deaths.iter());
        let death = |peer: &PeerName| {
            let known = view.deaths.iter().rfind(|death| death.peer == *peer);
            let owns = view.ranges.iter().any(|(_, owner)| owner == peer);
            let record = peers.get(peer);
            ensure!(
                known.is_some() || record.is_some() || owns || view.members.contains_key(peer),
                "nobody here has heard of {peer}; `weft peers` and `weft ipam` list who is known"
            );
            let incarnations = record
                .map(|record| record.incarnation)
                .into_iter()
                .chain(known.map(|known| known.incarnation))
                .chain(view.members.get(peer).copied());
            let incarnation = incarnations.max().unwrap_or_default();
            if let Some(Death { taker, .. }) =
                known.filter(|known| record.is_none() && incarnation <= known.incarnation && !call.force)
            {
                ensure!(owns, "{peer} has been forgotten already");
                let is_lost = *taker == self.me || named.contains(taker) || !alive.contains(taker);
                ensure!(is_lost, "{peer} has been forgotten already; {taker} takes its addresses over");
            }
            let ranges = view.ranges.iter().filter(|(_, owner)| owner == peer).map(|(range, _)| *range);
            let (peer, taker, forced, ranges) = (peer.clone(), self.me.clone(), call.force, ranges.collect());
            Ok(Death { peer, incarnation, epoch, taker, forced, ranges, known: before })
        };
        let deaths = named.iter().map(death).collect::<anyhow::Result<Vec<_>>>()?;
        if call.prepare {
            return Ok(Forgotten {
                statements: deaths.iter().map(Death::to_body).collect(),
                ..Forgotten::default()
            });
        }
        let items = self.sealed(&deaths, &call.sealed)?;
        for name in &named {
            info!(peer = %name, epoch, force = call.force, "forgotten, as an operator says");
        }
        self.ipam.forget(items).await?;
        Ok(self.outcome(&named, &view).await)
    }

    /// As the operator has sealed them, or with the CA's key where this node has it.
    fn sealed(&self, deaths: &[Death], sealed: &[(Vec<u8>, Vec<u8>)]) -> anyhow::Result<Vec<Item>> {
        let items: Vec<Item> = match (&self.identity, &self.source) {
            (None, _) => deaths.iter().map(|death| death.to_item(Vec::new())).collect(),
            _ if !sealed.is_empty() => deaths
                .iter()
                .map(|death| {
                    let body = death.to_body();
                    let seal = sealed.iter().find(|(statement, _)| *statement == body);
                    let (_, seal) = seal.context("things have changed meanwhile: try again")?;
                    Ok(death.to_item(seal.clone()))
                })
                .collect::<anyhow::Result<_>>()?,
            (_, Some(source @ Source::CaDir(_))) => {
                let operator = identity::operator(source.clone())?;
                deaths
                    .iter()
                    .map(|death| death.to_item(operator.seal(SEALED, &death.to_body()).encode_to_vec()))
                    .collect()
            }
            _ => bail!(
                "this node does not have the CA's key, so an operator has to sign: `weft ca issue {}` where the key is, and \
                 then `weft forget` with --tls-ca, --tls-cert and --tls-key",
                identity::OPERATOR
            ),
        };
        if let Some(current) = &self.identity {
            let mut gossip = DeathGossip(Some(Checker::new(current.clone())));
            items.iter().try_for_each(|item| gossip.check(item)).context("the operator's certificate")?;
        }
        Ok(items)
    }

    /// Waits for the takeover, for a moment.
    async fn outcome(&self, named: &BTreeSet<PeerName>, before: &View) -> Forgotten {
        let mut watch = self.ipam.view();
        let is_done =
            |view: &std::sync::Arc<View>| view.takeovers.iter().all(|(peer, _)| !named.contains(peer));
        let _ = timeout(PATIENCE, watch.wait_for(is_done)).await;
        let view = watch.borrow();
        let takeovers = view.takeovers.iter().filter(|(peer, _)| named.contains(peer));
        let mut waiting_for: Vec<_> = takeovers.flat_map(|(_, lacking)| lacking.iter().cloned()).collect();
        waiting_for.dedup();
        let taken = view.own.iter().filter(|range| !before.own.contains(range)).copied().collect();
        Forgotten { statements: Vec::new(), taken, waiting_for }
    }
}

/// Nobody who can be reached hears those that are to be forgotten, and all others can be reached.
fn may_forget(named: &BTreeSet<PeerName>, peers: &PeerSet, alive: &BTreeSet<PeerName>) -> anyhow::Result<()> {
    let own = peers.own();
    if let Some(name) = named.intersection(alive).next() {
        let hears = |record: &&std::sync::Arc<crate::mesh::peers::PeerRecord>| {
            (alive.contains(&record.name) || record.name == own.name)
                && record.name != *name
                && record.neighbours.iter().any(|neighbour| neighbour.name == *name)
        };
        let hearers: Vec<_> = peers.iter().filter(hears).map(|record| record.name.as_str()).collect();
        bail!(
            "{name} lives, as {} can hear; end its agent first (`weft reset` there hands its addresses over), or insist with \
             --force",
            if hearers.is_empty() { own.name.to_string() } else { hearers.join(", ") }
        );
    }
    let unasked =
        peers.others().filter(|record| !alive.contains(&record.name) && !named.contains(&record.name));
    let unasked: Vec<_> = unasked.map(|record| record.name.as_str()).collect();
    ensure!(
        unasked.is_empty(),
        "{} can not be reached, and may hear what is to be forgotten: name them too if they are dead as well, or insist \
         with --force",
        unasked.join(", ")
    );
    Ok(())
}

/// How long the takeover is waited for before the caller is told whom it waits for.
const PATIENCE: Duration = Duration::from_secs(8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::peers::{Neighbour, PeerRecord};

    fn name(text: &str) -> PeerName {
        text.parse().unwrap()
    }

    #[test]
    fn only_who_is_heard_by_nobody_is_forgotten_and_only_where_all_can_be_asked() {
        let record = |own: &str, names: &[&str]| {
            let neighbours = names.iter().map(|n| Neighbour { name: name(n), rtt: None }).collect();
            PeerRecord { neighbours, ..PeerRecord::new(name(own), crate::types::Incarnation(1)) }
        };
        let mut peers = PeerSet::new(record("me", &["a"]));
        for (own, names) in [("a", &["me", "b"][..]), ("b", &["a"]), ("x", &["a"]), ("y", &["x"])] {
            peers.insert(record(own, names));
        }
        let alive = ["me", "a", "b"].map(name).into();
        let refused = |names: &[&str]| {
            let named = names.iter().map(|n| name(n)).collect();
            may_forget(&named, &peers, &alive).map_err(|error| error.to_string())
        };
        assert_eq!(refused(&["x", "y"]), Ok(()));
        assert!(refused(&["x"]).unwrap_err().starts_with("y can not be reached"));
        assert!(refused(&["b", "x", "y"]).unwrap_err().starts_with("b lives, as a can hear"));
    }
}
