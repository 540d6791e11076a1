//! What a node's network should look like.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{BRIDGE, Mac, Prefix, TUN, Universe};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Everything that [`plan`](super::plan) works towards. Changed through [`Handle::update`](super::Handle::update).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    pub bridge: Bridge,
    pub tun: Tun,
    pub universe: Universe,
    /// The bridge's and the TUN's address, at most one of each family. Empty until this node owns its first range:
    /// then no route leads into the universe.
    pub gateways: BTreeSet<IpAddr>,
    /// Ranges that this node owns: what has no pod there is unreachable and must not leave through the TUN.
    pub own_ranges: BTreeSet<Prefix>,
    /// Others' ranges behind a path that is narrower than the TUN, and addresses in own ranges that others hold; with the
    /// path's MTU for inner packets, in bytes.
    pub narrow_ranges: BTreeMap<Prefix, u32>,
    /// By host interface.
    pub pods: BTreeMap<String, PodPort>,
    /// Destinations outside the universe that pods reach with their own addresses.
    pub no_masquerade: BTreeSet<Prefix>,
    /// This node's addresses on the underlay. Their links, and those of the default routes, must forward.
    pub underlay: BTreeSet<IpAddr>,
    /// Off: the links of the underlay are left alone, and masqueraded traffic only works if they forward anyway.
    pub underlay_forwarding: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    /// Fixed, or it would change whenever a port comes or goes.
    pub mac: Mac,
    pub mtu: u32,
}

/// The TUN. The data path makes it; here it is only configured, as soon as it exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tun {
    pub name: String,
    pub mtu: u32,
}

/// The host's end of a pod's veth, and who may speak through it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPort {
    pub host_interface: String,
    pub addresses: BTreeSet<IpAddr>,
    /// Of the pod's end.
    pub mac: Mac,
}

impl Desired {
    /// Only bridge and TUN, with their usual names; no address, no pod.
    pub fn new(universe: Universe, mac: Mac, mtu: u32) -> Self {
        Self {
            bridge: Bridge { name: BRIDGE.into(), mac, mtu },
            tun: Tun { name: TUN.into(), mtu },
            universe,
            gateways: BTreeSet::new(),
            own_ranges: BTreeSet::new(),
            narrow_ranges: BTreeMap::new(),
            pods: BTreeMap::new(),
            no_masquerade: BTreeSet::new(),
            underlay: BTreeSet::new(),
            underlay_forwarding: true,
        }
    }

    /// The gateway of the universe's family, that the host's own packets into the universe leave with.
    pub(super) fn source(&self) -> Option<IpAddr> {
        let v4 = self.universe.prefix().addr().is_ipv4();
        self.gateways.iter().copied().find(|gateway| gateway.is_ipv4() == v4)
    }
}
