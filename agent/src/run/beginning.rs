//! What an agent begins with: what is in its state file, and what the one before it has left in the kernel.

use super::steering;
use crate::{
    config::Config,
    ipam::{self, seed::SeedPlan},
    links::{Desired, Observed, PodPort},
    linux::store::{Store, StoreState},
    types::{BRIDGE, Mac},
};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};
use tracing::{error, warn};

/// The second says that there was no state file.
pub fn open_store(config: &Config) -> anyhow::Result<(Store, bool)> {
    let (store, state) = Store::open(&config.state_dir, &config.name, &config.universe)?;
    let fresh = state == StoreState::Created;
    if let StoreState::Damaged { moved_to } = state {
        error!(
            moved_to = %moved_to.display(),
            "the state file could not be read and was moved aside; the ring is learned from peers, addresses from veths"
        );
    }
    Ok((store, fresh))
}

/// The list that the network began with counts for ever: who owns what follows from it.
pub fn seeds(configured: SeedPlan, store: &Store) -> anyhow::Result<SeedPlan> {
    let Some(stored) = ipam::record::seeds(store)? else { return Ok(configured) };
    if !configured.names().is_empty() && configured != stored {
        warn!(%configured, began_with = %stored, "--ipam-seed is not the list that the network began with, and is ignored");
    }
    Ok(stored)
}

/// The address that the bridge still has from the agent before this one.
pub fn bridge_address(observed: &Observed, config: &Config) -> Option<IpAddr> {
    let of_bridge = observed.addresses.iter().filter(|(link, _)| link == BRIDGE);
    of_bridge.map(|(_, prefix)| prefix.addr()).find(|address| config.universe.contains(*address))
}

/// The pods' MACs that the agent before this one has set.
pub fn neighbours(observed: &Observed) -> BTreeMap<IpAddr, Mac> {
    let of_bridge = observed.neighbours.iter().filter(|((link, _), _)| link == BRIDGE);
    of_bridge.map(|((_, address), mac)| (*address, *mac)).collect()
}

/// What the kernel should look like right at the start, so that pods that run go on running.
pub fn desired(config: &Config, observed: &Observed, view: &ipam::View) -> Desired {
    let mut desired = Desired::new(config.universe, bridge_mac(config), config.mtu.into());
    steering::follow(&mut desired, view, &BTreeMap::new());
    desired.no_masquerade = config.no_masquerade.iter().copied().collect();
    desired.underlay = config.endpoints.iter().map(|endpoint| endpoint.0.ip()).collect();
    desired.underlay_forwarding = config.underlay_forwarding;
    for veth in observed.veths() {
        let key = &veth.alias.attachment;
        let mine = |allocation: &&Arc<ipam::Allocation>| allocation.owner == ipam::Owner::Pod(key.clone());
        match view.allocations.values().find(mine) {
            Some(allocation) => {
                let port = PodPort {
                    host_interface: veth.host_interface.clone(),
                    addresses: [allocation.address].into(),
                    mac: allocation.mac,
                };
                desired.pods.insert(veth.host_interface, port);
            }
            None => warn!(veth = veth.host_interface, attachment = %key, "a veth of ours without an address"),
        }
    }
    desired
}

/// Fixed, so that it does not change when ports come and go.
pub fn bridge_mac(config: &Config) -> Mac {
    Mac::derived(format!("bridge {}", config.name).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ipam::{Change, record, span::Layout},
        types::Universe,
    };

    fn list(names: &str) -> SeedPlan {
        names.split(',').map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn the_list_that_the_network_began_with_counts_whatever_is_configured_later() {
        let temp = tempfile::tempdir().unwrap();
        let universe: Universe = "10.32.0.0/16".parse().unwrap();
        let (store, _) = Store::open(temp.path(), &"a".parse().unwrap(), &universe).unwrap();
        assert_eq!(seeds(list("a,b"), &store).unwrap(), list("a,b"));
        let began = Change::Seeds(list("b,c"));
        store.commit(&[record::write(&began, &Layout::new(universe))]).unwrap();
        for configured in [list("a,b"), list("b,c,d"), SeedPlan::default()] {
            assert_eq!(seeds(configured, &store).unwrap(), list("b,c"));
        }
    }
}
