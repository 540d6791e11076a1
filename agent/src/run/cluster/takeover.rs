//! The space of nodes that are gone.
//!
//! ```text
//!   owner of a range without a Node, and out of reach ──15 s, and its turn──▶ one of those that are left writes into the
//!   ConfigMap that it takes over ──▶ all make sure that the Node is gone, and believe the taker's tokens
//! ```
//! Who is gone might still run: its tokens lose to the taker's by their epoch, whatever it does with them. Pods that live
//! there, should it come back, keep their addresses as held ones.

use crate::{
    ipam::{deed, task::Handle as Addresses},
    kube::{Uid, View, board::Takeover, task::Handle},
    mesh::task::Handle as Mesh,
    run::{alive::alive, steering::Steered},
    types::PeerName,
};
use anyhow::Context;
use siphasher::sip::SipHasher13;
use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, time};
use tracing::{info, warn};

pub fn of_ring(takeover: &Takeover) -> deed::Takeover {
    let Takeover { node, epoch, taker, .. } = takeover.clone();
    deed::Takeover { from: node, epoch, to: taker }
}

/// Until one of the subjects has stopped.
pub async fn run(
    handle: Handle,
    ipam: Addresses,
    mesh: Mesh,
    steered: watch::Receiver<Arc<Steered>>,
    believe: watch::Sender<Arc<BTreeSet<deed::Takeover>>>,
) -> anyhow::Result<()> {
    let (mut view, ring, mut watcher) = (handle.view(), ipam.view(), Watcher::default());
    let (mut tick, mut done) = (time::interval(LOOK), BTreeSet::new());
    loop {
        tokio::select! {
            changed = view.changed() => changed.context("the API server is watched no more")?,
            _ = tick.tick() => {}
        }
        let cluster = view.borrow_and_update().clone();
        let believed: BTreeSet<_> = cluster.believed.iter().map(of_ring).collect();
        believe.send_if_modified(|told| {
            let changed = **told != believed;
            *told = Arc::new(believed);
            changed
        });
        // What was agreed on for us, also before a restart. Should the node have come back, what it has is its own again.
        for takeover in ours(&cluster, handle.node()) {
            if done.insert(takeover.clone()) {
                ipam.take_over(takeover.node, takeover.epoch).await?;
            }
        }
        let (owners, epoch) = {
            let ring = ring.borrow();
            (ring.ranges.iter().map(|(_, owner)| owner.clone()).collect::<BTreeSet<_>>(), ring.epoch)
        };
        let reachable = alive(&mesh.peers().borrow(), steered.borrow().mesh.as_ref());
        for (node, uid) in watcher.due(&cluster, &owners, &reachable, handle.node(), Instant::now()) {
            if let Err(error) = take(&handle, &ipam, &node, &uid, epoch).await {
                warn!(%node, error = format!("{error:#}"), "cannot take over the space of a node that is gone");
            }
        }
    }
}

/// Takeovers by us that are the last word about a node that is not there.
fn ours(cluster: &View, me: &PeerName) -> Vec<Takeover> {
    let is_last =
        |t: &Takeover| !cluster.board.takeovers.iter().any(|u| u.node == t.node && u.epoch > t.epoch);
    let is_ours = |t: &&Takeover| t.taker == *me && !cluster.nodes.contains_key(&t.node) && is_last(t);
    cluster.believed.iter().filter(is_ours).cloned().collect()
}

async fn take(
    handle: &Handle,
    ipam: &Addresses,
    node: &PeerName,
    uid: &Uid,
    epoch: u64,
) -> anyhow::Result<()> {
    if !handle.is_gone(node, uid).await? {
        return Ok(());
    }
    let in_use = ipam.epochs().await?;
    // Once it is on the board, everybody here and elsewhere does the rest.
    match handle.take_over(node, uid, epoch + 1, |takeover| in_use.contains(&takeover.epoch)).await? {
        Some(takeover) => {
            info!(%node, epoch = takeover.epoch, "taking over the space of a node that is gone")
        }
        None => info!(%node, "another takes over the space of a node that is gone"),
    }
    Ok(())
}

/// Watches for owners without a Node.
#[derive(Default)]
struct Watcher {
    /// The UIDs that Nodes had when they were there.
    uids: BTreeMap<PeerName, Uid>,
    /// Since when an owner has been missing.
    missing: BTreeMap<PeerName, Instant>,
}

impl Watcher {
    /// Whose space should be taken over by us, now.
    fn due(
        &mut self,
        cluster: &View,
        owners: &BTreeSet<PeerName>,
        reachable: &BTreeSet<PeerName>,
        me: &PeerName,
        now: Instant,
    ) -> Vec<(PeerName, Uid)> {
        self.uids.extend(cluster.nodes.values().map(|node| (node.name.clone(), node.uid.clone())));
        self.uids.retain(|name, _| owners.contains(name) || cluster.nodes.contains_key(name));
        let is_missing = |name: &&PeerName| {
            cluster.listed && !cluster.nodes.contains_key(*name) && !reachable.contains(*name) && *name != me
        };
        let missing: BTreeSet<PeerName> = owners.iter().filter(is_missing).cloned().collect();
        self.missing.retain(|name, _| missing.contains(name));
        for name in missing {
            self.missing.entry(name).or_insert(now);
        }
        let mut due = Vec::new();
        for (name, since) in &self.missing {
            let Some(uid) = self.uids.get(name) else { continue };
            let agreed = cluster.board.takeovers.iter().any(|t| t.node == *name && t.uid == *uid);
            let turn = GRACE + TURN * turn(name, me, cluster, reachable);
            if !agreed && now.saturating_duration_since(*since) >= turn {
                due.push((name.clone(), uid.clone()));
            }
        }
        due
    }
}

/// How many of those who could do it come before us: each node's heirs are others.
fn turn(gone: &PeerName, me: &PeerName, cluster: &View, reachable: &BTreeSet<PeerName>) -> u32 {
    let place = |name: &PeerName| {
        let mut hash = SipHasher13::new();
        (gone, name).hash(&mut hash);
        hash.finish()
    };
    let before = |name: &&PeerName| reachable.contains(*name) && place(name) < place(me);
    u32::try_from(cluster.nodes.keys().filter(before).count()).unwrap_or(u32::MAX).min(MOST_TURNS)
}

const LOOK: Duration = Duration::from_secs(1);
/// How long a Node must be gone and its agent out of reach.
const GRACE: Duration = Duration::from_secs(15);
/// How long each of those that are left gives the one before it.
const TURN: Duration = Duration::from_secs(3);
const MOST_TURNS: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::{Node, board::Board};

    fn name(name: &str) -> PeerName {
        name.parse().unwrap()
    }

    fn cluster(names: &[&str]) -> View {
        let node = |n: &&str| Node {
            name: name(n),
            uid: Uid(format!("uid of {n}")),
            endpoints: Vec::new(),
            pod_cidrs: Vec::new(),
            tainted: false,
            network_available: true,
        };
        let nodes = names.iter().map(|n| (name(n), node(n))).collect();
        View { nodes: Arc::new(nodes), listed: true, ..View::default() }
    }

    fn names(names: &[&str]) -> BTreeSet<PeerName> {
        names.iter().map(|n| name(n)).collect()
    }

    #[test]
    fn the_space_of_who_is_gone_is_taken_by_one_after_the_other() {
        let start = Instant::now();
        let owners = names(&["a", "b", "c", "gone"]);
        let mut first = None;
        for me in ["a", "b", "c"] {
            let mut watcher = Watcher::default();
            let others = names(&["a", "b", "c"]).into_iter().filter(|n| n.as_str() != me).collect();
            let mut due = |cluster: &View, at| watcher.due(cluster, &owners, &others, &name(me), start + at);
            assert_eq!(due(&cluster(&["a", "b", "c", "gone"]), Duration::ZERO), []);
            let left = cluster(&["a", "b", "c"]);
            assert_eq!(due(&left, Duration::ZERO), []);
            assert_eq!(due(&left, GRACE / 2), []);
            if !due(&left, GRACE).is_empty() {
                assert_eq!(first.replace(me), None, "two at once");
            }
            let uid = Uid("uid of gone".into());
            assert_eq!(due(&left, GRACE + TURN * 2), [(name("gone"), uid.clone())]);
            let takeovers = vec![Takeover { node: name("gone"), uid, epoch: 1, taker: name("a") }];
            let agreed = View { board: Board { takeovers, ..Board::default() }, ..left };
            assert_eq!(due(&agreed, GRACE * 9), []);
        }
        assert!(first.is_some());
    }

    #[test]
    fn who_can_be_reached_or_comes_back_or_was_never_seen_keeps_its_space() {
        let (start, me) = (Instant::now(), name("a"));
        let owners = names(&["a", "gone", "unknown"]);
        let mut watcher = Watcher::default();
        let mut due = |nodes: &[&str], reachable: &[&str], at| {
            watcher.due(&cluster(nodes), &owners, &names(reachable), &me, start + at).len()
        };
        assert_eq!(due(&["a", "gone"], &["gone"], Duration::ZERO), 0);
        assert_eq!(due(&["a"], &["gone"], GRACE * 2), 0, "it answers");
        assert_eq!(due(&["a"], &[], GRACE * 3), 0);
        assert_eq!(due(&["a", "gone"], &[], GRACE * 7 / 2), 0, "it is back");
        assert_eq!(due(&["a"], &[], GRACE * 4), 0, "gone again, from now on");
        assert_eq!(due(&["a"], &[], GRACE * 5), 1);
        let unlisted = View { listed: false, ..cluster(&["a"]) };
        assert_eq!(watcher.due(&unlisted, &owners, &names(&[]), &me, start + GRACE * 9), []);
    }
}
