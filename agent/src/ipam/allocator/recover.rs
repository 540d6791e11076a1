//! From what was stored and what is found on the node to allocations.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Allocator, REST_FOR, UNACTIVATED_FOR};
use crate::{
    ipam::{
        Found, Now,
        space::{Allocation, Owner},
    },
    types::{Mac, PodRef, VethAlias},
};
use std::net::IpAddr;
use tracing::warn;

impl Allocator {
    pub(super) fn restore(&mut self, allocations: Vec<Allocation>, resting: Vec<IpAddr>, now: Now) {
        for allocation in allocations {
            let Some(offset) = self.layout.offset(allocation.address) else { continue };
            if self.space.at(offset).is_some() || self.space.find(&allocation.owner).is_some() {
                warn!(address = %allocation.address, owner = ?allocation.owner, "stored twice: the first counts");
                continue;
            }
            if let Owner::Pod(key) = &allocation.owner {
                self.unactivated.insert(key.clone(), now.at + UNACTIVATED_FOR);
            }
            self.space.insert(offset, allocation);
        }
        // How long they have rested already is not worth trusting a clock for.
        for offset in resting.iter().filter_map(|address| self.layout.offset(*address)) {
            self.space.rest(offset, now.at + REST_FOR);
        }
    }

    /// Makes the allocations agree with the veths: what has a veth is active, whatever the store says.
    pub(super) fn recover(&mut self, found: Found, now: Now) {
        for veth in found.veths {
            let Some((offset, address)) =
                veth.addresses.iter().find_map(|address| Some((self.layout.offset(*address)?, *address)))
            else {
                warn!(attachment = %veth.attachment, "a veth of ours has no address in the universe");
                continue;
            };
            let mac = found.macs.get(&address).copied().unwrap_or_else(|| veth.attachment.pod_mac());
            self.reclaim(veth, offset, address, mac, now);
        }
        if let Some(offset) = found.bridge.and_then(|address| self.layout.offset(address))
            && self.space.find(&Owner::Bridge).is_none()
            && self.space.at(offset).is_none()
            && !self.layout.reserved(offset)
        {
            self.allocate(offset, Owner::Bridge, PodRef::default(), Mac::default(), now);
        }
        if found.rebooted {
            for key in std::mem::take(&mut self.unactivated).into_keys() {
                self.free(&Owner::Pod(key), now);
            }
        }
    }

    fn reclaim(&mut self, veth: VethAlias, offset: u128, address: IpAddr, mac: Mac, now: Now) {
        let owner = Owner::Pod(veth.attachment.clone());
        let known = self.space.at(offset).map(|allocation| allocation.owner.clone());
        if known.as_ref().is_some_and(|known| *known != owner && *known != Owner::Bridge)
            || self.layout.reserved(offset)
        {
            warn!(attachment = %veth.attachment, %address, "a veth carries an address that it cannot have");
            return;
        }
        self.unactivated.remove(&veth.attachment);
        if known.as_ref() != Some(&owner) {
            warn!(attachment = %veth.attachment, %address, "reclaimed an address from a veth");
            if let Some(bridge) = known {
                self.free(&bridge, now);
            }
            self.free(&owner, now);
            self.allocate(offset, owner, veth.pod, mac, now);
        }
    }
}
