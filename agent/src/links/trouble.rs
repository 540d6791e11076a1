//! What others did that we can name but not put right.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{desired::Desired, observed::Observed, plan::routes};
use crate::linux::netlink::LinkKind;

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
