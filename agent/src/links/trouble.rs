//! What others did that we can name but not put right.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{desired::Desired, observed::Observed, plan::routes};
use crate::{
    linux::netlink::{LinkKind, RTPROT_WEFT},
    types::{Prefix, Universe},
};
use std::{collections::BTreeSet, net::IpAddr};

/// Why an agent must not start here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    #[error(
        "--universe {universe} overlaps this host's route {route}; choose a range that nothing here uses"
    )]
    Route { universe: Universe, route: String },
    #[error(
        "the underlay address {endpoint} is inside --universe {universe}; nodes must reach each other outside of it"
    )]
    Endpoint { universe: Universe, endpoint: IpAddr },
}

/// Compares the universe with the host's routes and the underlay. Our own leavings don't count.
pub fn conflicts(
    universe: Universe,
    underlay: &BTreeSet<IpAddr>,
    bridge: &str,
    tun: &str,
    observed: &Observed,
) -> Option<Conflict> {
    if let Some(endpoint) = underlay.iter().copied().find(|endpoint| universe.contains(*endpoint)) {
        return Some(Conflict::Endpoint { universe, endpoint });
    }
    let ours = |link: &Option<String>| link.as_deref().is_some_and(|name| name == bridge || name == tun);
    let foreign = observed.routes.iter().filter(|route| route.protocol != RTPROT_WEFT && !ours(&route.link));
    let mut overlapping =
        foreign.filter(|route| !route.is_default() && overlap(route.destination, universe.prefix()));
    overlapping.next().map(|route| Conflict::Route { universe, route: route.to_string() })
}

/// What keeps the network from working though all of ours is in place, each as a sentence that names it.
pub(super) fn troubles(desired: &Desired, observed: &Observed) -> Vec<String> {
    let mut troubles = Vec::new();
    for (name, kind, word) in
        [(&desired.bridge.name, LinkKind::Bridge, "bridge"), (&desired.tun.name, LinkKind::Tun, "TUN")]
    {
        if observed.links.get(name).is_some_and(|link| link.kind != kind) {
            troubles.push(format!("the link {name} is not a {word}; rename or remove it"));
        }
    }
    for route in routes::wanted(desired, observed).values() {
        if let Some(foreign) = routes::foreign_twin(route, observed) {
            troubles.push(format!("the route {foreign} stands in the place of ours; remove it"));
        }
    }
    for chain in &observed.firewall.dropping {
        troubles.push(format!(
            "the nftables chain {chain} drops forwarded packets by its policy; let {} and {} pass there",
            desired.bridge.name, desired.tun.name
        ));
    }
    troubles
}

fn overlap(a: Prefix, b: Prefix) -> bool {
    a.contains(&b) || b.contains(&a)
}
