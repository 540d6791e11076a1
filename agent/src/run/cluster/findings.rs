//! What an operator should see as Events, of all that an agent shows of itself.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{
    admin::{Path, Snapshot},
    ipam::View,
    kube::events::{Finding, Reason},
};
use std::{collections::BTreeSet, net::IpAddr};

/// All that is so now. Before the node was ready for the first time, that it is not is no news.
pub fn findings(snapshot: &Snapshot, ring: &View, was_ready: bool) -> BTreeSet<Finding> {
    let mut found = BTreeSet::new();
    let mut find = |reason, note: String| _ = found.insert(Finding { reason, note });
    if snapshot.is_ready() {
        find(Reason::NetworkReady, "pods can be attached to Weft".into());
    } else if was_ready {
        find(Reason::NetworkNotReady, format!("pods cannot be attached: {}", snapshot.not_ready.join("; ")));
    }
    for peer in snapshot.others() {
        if let Path::Down(why) = &peer.path {
            find(Reason::PeerUnreachable, format!("pods on {} cannot be reached: {why}", peer.name));
        }
        if peer.mtu < snapshot.mtu {
            let note = format!(
                "packets to pods on {} carry {} bytes at most, less than the {} of this node",
                peer.name, peer.mtu, snapshot.mtu
            );
            find(Reason::MtuChanged, note);
        }
    }
    let owned = ring.counts.owned;
    if was_ready && (snapshot.addresses_free < owned.div_ceil(LOW) || snapshot.waiting_for.is_some()) {
        let waiting = snapshot.waiting_for.iter().map(|for_| format!("; waiting for {for_}"));
        // In steps, so that each pod is not news.
        let few = if snapshot.addresses_free == 0 { "none" } else { "less than a twentieth" };
        let note = format!("{few} of this node's {owned} addresses free{}", waiting.collect::<String>());
        find(Reason::AddressSpaceLow, note);
    }
    if !ring.held.is_empty() {
        let note = format!("in use here, but of another node's range: {}", list(&ring.held));
        find(Reason::AddressDispute, note);
    }
    if !ring.conceded.is_empty() {
        let conceded: Vec<_> = ring.conceded.iter().copied().collect();
        find(
            Reason::AddressDispute,
            format!("of this node's range, but in use elsewhere: {}", list(&conceded)),
        );
    }
    found
}

fn list(addresses: &[IpAddr]) -> String {
    let shown: Vec<_> = addresses.iter().take(8).map(IpAddr::to_string).collect();
    match addresses.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A node that has less than one in so many of its addresses free is short of them.
const LOW: u128 = 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::example::snapshot as example;

    fn reasons(snapshot: &Snapshot, ring: &View, was_ready: bool) -> Vec<Reason> {
        findings(snapshot, ring, was_ready).into_iter().map(|finding| finding.reason).collect()
    }

    #[test]
    fn what_an_operator_should_see_is_found() {
        let quiet = Snapshot {
            not_ready: vec![],
            waiting_for: None,
            addresses_free: 200,
            peers: vec![],
            ..example()
        };
        assert_eq!(reasons(&quiet, &View::default(), true), [Reason::NetworkReady]);
        let starting = Snapshot { not_ready: vec!["starting".into()], ..quiet.clone() };
        assert_eq!(reasons(&starting, &View::default(), false), []);
        assert_eq!(reasons(&starting, &View::default(), true), [Reason::NetworkNotReady]);

        let mut ring = View { held: vec!["10.32.0.7".parse().unwrap()], ..View::default() };
        ring.counts.owned = 256;
        assert_eq!(reasons(&quiet, &ring, true), [Reason::NetworkReady, Reason::AddressDispute]);
        let low = Snapshot { addresses_free: 12, ..quiet };
        let found = findings(&low, &View { held: vec![], ..ring }, true);
        assert_eq!(found.last().unwrap().note, "less than a twentieth of this node's 256 addresses free");
    }
}
