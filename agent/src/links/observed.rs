//! What the kernel shows, with links called by their names.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::firewall::Firewall;
use crate::{
    linux::netlink::{Link, LinkKind, RTPROT_WEFT, Route},
    types::{Mac, Prefix, VethAlias},
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
}

impl Observed {
    /// The veths that carry our alias.
    pub fn veths(&self) -> Vec<Veth> {
        self.links.values().filter_map(veth_of).collect()
    }

    pub(super) fn own_routes(&self) -> impl Iterator<Item = &Route<String>> {
        self.routes.iter().filter(|route| route.protocol == RTPROT_WEFT)
    }

    pub(super) fn link(&self, name: &str, kind: LinkKind) -> Option<&Link> {
        self.links.get(name).filter(|link| link.kind == kind)
    }
}

pub(super) fn veth_of(link: &Link) -> Option<Veth> {
    let ours = link.kind == LinkKind::Veth && link.name.starts_with("wf");
    let alias = link.alias.as_deref().filter(|_| ours)?.parse().ok()?;
    Some(Veth { host_interface: link.name.clone(), alias })
}
