//! From what is to what should be: pure, so that set-up, restart, repair and removal are one code path.
//!
//! ```text
//!   Desired ──┐
//!             ├─▶ plan ─▶ [Change, Change, …]   in the order in which the kernel takes them
//!   Observed ─┘
//!
//!   firewall ▸ bridge, TUN, ports ▸ sysctls ▸ addresses ▸ FDB, neighbours ▸ routes ▸ addresses that go
//! ```
//!
//! Links are called by name, as a change may speak of a link that the one before it makes. Applying a plan wholly and
//! planning again gives an empty plan. What is not ours is never touched: others' links, tables, and routes of
//! another protocol number.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod devices;
pub(super) mod routes;
pub(super) mod sysctls;

use super::{
    desired::{Desired, PodPort},
    firewall::{self, Element, Family, Table},
    observed::Observed,
};
use crate::{
    linux::netlink::{BridgeOptions, PortOptions, Route},
    types::{Mac, Prefix},
};
use std::{collections::BTreeMap, fmt, net::IpAddr};

/// One step that the kernel takes as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    LoadTable(Table),
    DropTable(Family),
    AddElement(Element),
    DeleteElement(Element),
    CreateBridge { name: String, mac: Mac, mtu: u32 },
    DeleteLink { link: String },
    SetBridge { link: String },
    SetMac { link: String, mac: Mac },
    SetMtu { link: String, mtu: u32 },
    SetUp { link: String },
    Enslave { port: String, bridge: String },
    SetPort { port: String },
    SetSysctl { key: String, value: String },
    AddAddress { link: String, address: Prefix },
    DeleteAddress { link: String, address: Prefix },
    SetFdb { port: String, mac: Mac },
    DeleteFdb { port: String, mac: Mac },
    SetNeighbour { link: String, address: IpAddr, mac: Mac },
    DeleteNeighbour { link: String, address: IpAddr },
    AddRoute(Route<String>),
    ReplaceRoute(Route<String>),
    DeleteRoute(Route<String>),
}

/// What must be done to get from `observed` to `desired`; empty if that is so.
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Change> {
    let mut changes = firewall::plan(desired, &observed.firewall);
    let leaving = devices::plan(desired, observed, &mut changes);
    routes::plan(desired, observed, &mut changes);
    changes.extend(leaving);
    changes
}

/// What must be done to leave nothing of ours. `found` are the sysctls as they were before the first change.
pub fn teardown(
    bridge: &str,
    tun: &str,
    observed: &Observed,
    found: &BTreeMap<String, String>,
) -> Vec<Change> {
    let mut changes: Vec<_> = observed.own_routes().cloned().map(Change::DeleteRoute).collect();
    devices::teardown(bridge, tun, observed, &mut changes);
    changes.extend(observed.firewall.tables.keys().copied().map(Change::DropTable));
    let differs = |(key, value): &(&String, &String)| {
        observed.sysctls.get(*key).is_some_and(|current| current != *value)
    };
    changes.extend(
        found
            .iter()
            .filter(differs)
            .map(|(key, value)| Change::SetSysctl { key: key.clone(), value: value.clone() }),
    );
    changes
}

impl Change {
    /// Whether it is done as well where the kernel has done it already.
    pub fn removes(&self) -> bool {
        matches!(
            self,
            Self::DeleteLink { .. }
                | Self::DeleteAddress { .. }
                | Self::DeleteFdb { .. }
                | Self::DeleteNeighbour { .. }
                | Self::DeleteRoute(_)
        )
    }

    /// Whether a pod cannot be reached if this change fails.
    pub fn concerns(&self, pod: &PodPort, bridge: &str) -> bool {
        match self {
            Self::LoadTable(_) => true,
            Self::AddElement(element) => element.port == pod.host_interface,
            Self::CreateBridge { .. } => true,
            Self::SetUp { link } | Self::AddAddress { link, .. } => {
                link == bridge || *link == pod.host_interface
            }
            Self::Enslave { port, .. } | Self::SetPort { port } | Self::SetFdb { port, .. } => {
                *port == pod.host_interface
            }
            Self::SetNeighbour { address, .. } => pod.addresses.contains(address),
            Self::AddRoute(route) | Self::ReplaceRoute(route) => {
                pod.addresses.iter().any(|address| host_prefix(*address) == route.destination)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoadTable(table) => write!(f, "load nftables table {} weft", table.family),
            Self::DropTable(family) => write!(f, "drop nftables table {family} weft"),
            Self::AddElement(element) => write!(f, "allow {element}"),
            Self::DeleteElement(element) => write!(f, "no longer allow {element}"),
            Self::CreateBridge { name, .. } => write!(f, "create bridge {name}"),
            Self::DeleteLink { link } => write!(f, "delete link {link}"),
            Self::SetBridge { link } => write!(f, "set the options of bridge {link}"),
            Self::SetMac { link, mac } => write!(f, "set MAC {mac} of {link}"),
            Self::SetMtu { link, mtu } => write!(f, "set MTU {mtu} of {link}"),
            Self::SetUp { link } => write!(f, "set {link} up"),
            Self::Enslave { port, bridge } => write!(f, "make {port} a port of {bridge}"),
            Self::SetPort { port } => write!(f, "set the options of port {port}"),
            Self::SetSysctl { key, value } => write!(f, "set {key} to {value}"),
            Self::AddAddress { link, address } => write!(f, "add address {address} to {link}"),
            Self::DeleteAddress { link, address } => write!(f, "delete address {address} of {link}"),
            Self::SetFdb { port, mac } => write!(f, "set MAC {mac} behind {port}"),
            Self::DeleteFdb { port, mac } => write!(f, "delete MAC {mac} behind {port}"),
            Self::SetNeighbour { link, address, mac } => write!(f, "set {address} at {mac} on {link}"),
            Self::DeleteNeighbour { link, address } => write!(f, "delete neighbour {address} on {link}"),
            Self::AddRoute(route) => write!(f, "add route {route}"),
            Self::ReplaceRoute(route) => write!(f, "set route {route}"),
            Self::DeleteRoute(route) => write!(f, "delete route {route}"),
        }
    }
}

/// The prefix that holds only this address.
pub(super) fn host_prefix(address: IpAddr) -> Prefix {
    Prefix::from(address)
}

/// No spanning tree: there are no loops, and a new port forwards at once. Multicast is not served.
pub const BRIDGE_OPTIONS: BridgeOptions =
    BridgeOptions { stp: false, multicast_snooping: false, vlan_filtering: false };

/// Pods talk to the bridge itself only (its gateway), never to each other's ports: the firewall sees to that. Nothing is
/// learnt or flooded: what the host sends finds its port by a static entry. What a pod floods, its ARP for the gateway,
/// still reaches the bridge: these flags are about frames that leave through the port.
///
/// Where `br_netfilter` is on, as Docker and kubeadm have it, it does NAT before the bridge decides, and a Service's
/// packet that is now for a pod of this node is switched to that pod's port instead of routed: to another's, so ports
/// are not isolated, or to the very port it came from, so they are hairpins.
pub const PORT_OPTIONS: PortOptions = PortOptions {
    isolated: false,
    learning: false,
    hairpin: true,
    unicast_flood: false,
    multicast_flood: false,
    broadcast_flood: false,
};
