//! The network under the overlay, wholly in namespaces of its own.
//!
//! ```text
//!   n1 eth0 192.0.2.1 ──┐
//!   n2 eth0 192.0.2.2 ──┤ bridge "wire" ── underlay namespace, 192.0.2.254 ── 198.51.100.1 ── outside, 198.51.100.2
//!   n3 eth0 192.0.2.3 ──┘                  routes, knows no overlay address
//! ```
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use anyhow::ensure;
use ipnet::{IpNet, Ipv4Net};

use crate::{namespace::Netns, sandbox::Sandbox};

pub struct Underlay {
    pub netns: Netns,
    /// A host beyond the nodes' default route.
    pub outside: Netns,
}

impl Underlay {
    pub fn create(sandbox: &Arc<Sandbox>) -> anyhow::Result<Self> {
        let netns = Netns::create(sandbox, "underlay")?;
        let outside = Netns::create(sandbox, "outside")?;
        netns.links(async |links| {
            links.bridge(WIRE).await?;
            links.address(WIRE, on(ROUTER, 24)).await?;
            links.veth("outside", UPLINK, &outside).await?;
            links.address("outside", on(BEFORE_OUTSIDE, 24)).await
        })?;
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        outside.links(async |links| {
            links.address(UPLINK, on(OUTSIDE, 24)).await?;
            links.default_route(BEFORE_OUTSIDE.into()).await
        })?;
        Ok(Self { netns, outside })
    }

    /// Plugs a node in; returns its address.
    pub fn plug(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        ensure!((1..=MOST_NODES).contains(&number), "a lab has at most {MOST_NODES} nodes");
        let address = Ipv4Addr::new(192, 0, 2, number as u8);
        self.netns.links(async |links| {
            links.veth(node.name(), UPLINK, node).await?;
            links.plug(node.name(), WIRE).await
        })?;
        node.links(async |links| {
            links.address(UPLINK, on(address, 24)).await?;
            links.default_route(ROUTER.into()).await
        })?;
        Ok(address.into())
    }

    /// Plugs a node in a second time, with an address of another network there, which it returns.
    pub fn plug_second(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        let (port, address) = (format!("{}b", node.name()), Ipv4Addr::new(203, 0, 113, number as u8));
        self.netns.links(async |links| {
            links.veth(&port, SECOND, node).await?;
            links.plug(&port, WIRE).await
        })?;
        node.links(async |links| links.address(SECOND, on(address, 24)).await)?;
        Ok(address.into())
    }

    /// Gives a node an IPv6 address on its cable, which it returns.
    pub fn plug_ipv6(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        // RFC 3849: for documentation only. Usable at once, without detection of duplicates.
        let address = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number as u16);
        node.sysctl(&format!("net/ipv6/conf/{UPLINK}/accept_dad"), "0")?;
        node.links(async |links| links.address(UPLINK, IpNet::new(address.into(), 64)?).await)?;
        Ok(address.into())
    }

    /// Gives a node address number `number` instead of one that it has, which it returns.
    pub fn renumber(&self, node: &Netns, from: IpAddr, number: usize) -> anyhow::Result<IpAddr> {
        ensure!((1..=MOST_NODES).contains(&number), "the underlay has {MOST_NODES} addresses for nodes");
        let address = Ipv4Addr::new(192, 0, 2, number as u8);
        node.links(async |links| {
            // The routes go with it.
            links.remove_address(from).await?;
            links.address(UPLINK, on(address, 24)).await?;
            links.default_route(ROUTER.into()).await
        })?;
        Ok(address.into())
    }

    pub fn outside_address(&self) -> IpAddr {
        OUTSIDE.into()
    }
}

fn on(address: Ipv4Addr, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(address, length))
}

/// A node's interface on the underlay.
pub const UPLINK: &str = "eth0";
const SECOND: &str = "eth1";
/// The bridge in the underlay's namespace.
pub const WIRE: &str = "wire";
/// 192.0.2.0/24 holds them and the router.
pub const MOST_NODES: usize = 250;
// RFC 5737: TEST-NET-1 and TEST-NET-2 (and 203.0.113.0/24, TEST-NET-3), which nothing real uses.
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
const BEFORE_OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
