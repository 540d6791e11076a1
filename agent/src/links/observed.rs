//! What the kernel shows, with links called by their names.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::firewall::Firewall;
use crate::{
    linux::netlink::{Link, LinkKind, RTPROT_WEFT, Route},
    types::{BRIDGE, Mac, Prefix, VethAlias},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// One look at a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// By name.
    pub links: BTreeMap<String, Link>,
    /// (link, address)
    pub addresses: BTreeSet<(String, Prefix)>,
    /// The main table's.
    pub routes: BTreeSet<Route<String>>,
    /// (link, address) → MAC; permanent ones only.
    pub neighbours: BTreeMap<(String, IpAddr), Mac>,
    /// (port, MAC) that were set by hand.
    pub fdb: BTreeSet<(String, Mac)>,
    /// Those that matter to us and that this kernel has, by path.
    pub sysctls: BTreeMap<String, String>,
    /// The namespace knows IPv6.
    pub ipv6: bool,
    pub firewall: Firewall,
}

/// A pod's veth that stands, as its alias tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veth {
    pub host_interface: String,
    pub alias: VethAlias,
    pub up: bool,
    /// It is a port of our bridge.
    pub on_bridge: bool,
    /// Destinations of our routes that lead to one of its addresses.
    pub routes: Vec<Prefix>,
}

impl Observed {
    /// The veths that carry our alias.
    pub fn veths(&self) -> Vec<Veth> {
        let bridge = self.link(BRIDGE, LinkKind::Bridge).map(|bridge| bridge.index);
        let veth = |link: &Link| {
            let ours = link.kind == LinkKind::Veth && link.name.starts_with("wf");
            let alias: VethAlias = link.alias.as_deref().filter(|_| ours)?.parse().ok()?;
            let leads_here = |route: &&Route<String>| {
                route.link.as_deref() == Some(BRIDGE)
                    && alias.addresses.iter().any(|address| route.destination == Prefix::from(*address))
            };
            Some(Veth {
                host_interface: link.name.clone(),
                up: link.up,
                on_bridge: bridge.is_some() && link.master == bridge,
                routes: self.own_routes().filter(leads_here).map(|route| route.destination).collect(),
                alias,
            })
        };
        self.links.values().filter_map(veth).collect()
    }

    pub(super) fn own_routes(&self) -> impl Iterator<Item = &Route<String>> {
        self.routes.iter().filter(|route| route.protocol == RTPROT_WEFT)
    }

    pub(super) fn link(&self, name: &str, kind: LinkKind) -> Option<&Link> {
        self.links.get(name).filter(|link| link.kind == kind)
    }
}
