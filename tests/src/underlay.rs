//! The network under the overlay, wholly in namespaces of its own.
//!
//! ```text
//!   n1 eth0 192.0.2.1 ──┐
//!   n2 eth0 192.0.2.2 ──┤ bridge "wire" ── underlay namespace, 192.0.2.254 ── 198.51.100.1 ── outside, 198.51.100.2
//!   n3 eth0 192.0.2.3 ──┘                  routes, knows no overlay address
//! ```
//! Where something else is to have such addresses, [`Networks`] has others.
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use anyhow::ensure;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{namespace::Netns, sandbox::Sandbox};

pub struct Underlay {
    pub netns: Netns,
    /// A host beyond the nodes' default route.
    pub outside: Netns,
    networks: Networks,
}

/// Which addresses the underlay has.
#[derive(Clone, Copy, Debug)]
pub struct Networks {
    /// The nodes' cables, a /24; the router has its last address.
    pub wire: Ipv4Net,
    /// The network of the outside, another /24.
    pub beyond: Ipv4Net,
    /// The same for IPv6, /64 both.
    pub wire6: Ipv6Net,
    pub beyond6: Ipv6Net,
}

impl Underlay {
    pub fn create(sandbox: &Arc<Sandbox>, networks: Networks) -> anyhow::Result<Self> {
        let netns = Netns::create(sandbox, "underlay")?;
        let outside = Netns::create(sandbox, "outside")?;
        netns.links(async |links| {
            links.bridge(WIRE).await?;
            links.address(WIRE, in_v4(networks.wire, ROUTER)).await?;
            links.veth("outside", UPLINK, &outside).await?;
            links.address("outside", in_v4(networks.beyond, BEFORE_OUTSIDE)).await
        })?;
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        outside.links(async |links| {
            links.address(UPLINK, in_v4(networks.beyond, OUTSIDE)).await?;
            links.default_route(in_v4(networks.beyond, BEFORE_OUTSIDE).addr()).await
        })?;
        Ok(Self { netns, outside, networks })
    }

    /// Routes IPv6 too: for nodes that have been plugged into it.
    pub fn route_ipv6(&self) -> anyhow::Result<()> {
        let Networks { wire6, beyond6, .. } = self.networks;
        self.netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let at_once = [(&self.netns, WIRE), (&self.netns, "outside"), (&self.outside, UPLINK)];
        for (netns, link) in at_once {
            netns.sysctl(&format!("net/ipv6/conf/{link}/accept_dad"), "0")?;
        }
        self.netns.links(async |links| {
            links.address(WIRE, in_v6(wire6, ROUTER)).await?;
            links.address("outside", in_v6(beyond6, BEFORE_OUTSIDE)).await
        })?;
        self.outside.links(async |links| {
            links.address(UPLINK, in_v6(beyond6, OUTSIDE)).await?;
            links.default_route(in_v6(beyond6, BEFORE_OUTSIDE).addr()).await
        })
    }

    /// Gives the host beyond the router one more address, whatever it is.
    pub fn settle_outside(&self, address: IpAddr) -> anyhow::Result<()> {
        let alone = IpNet::new(address, if address.is_ipv4() { 32 } else { 128 })?;
        let via = match address {
            IpAddr::V4(_) => self.outside_address(),
            IpAddr::V6(_) => in_v6(self.networks.beyond6, OUTSIDE).addr(),
        };
        if address.is_ipv6() {
            self.outside.sysctl("net/ipv6/conf/lo/accept_dad", "0")?;
        }
        self.outside.links(async |links| links.address("lo", alone).await)?;
        self.netns.links(async |links| links.route(alone, via).await)
    }

    /// Leads a part of the overlay to the node that has it, as a network without address translation may.
    pub fn lead(&self, part: IpNet, node: IpAddr) -> anyhow::Result<()> {
        self.netns.links(async |links| links.route(part, node).await)
    }

    /// Plugs a node in; returns its address.
    pub fn plug(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        ensure!((1..=MOST_NODES).contains(&number), "a lab has at most {MOST_NODES} nodes");
        self.netns.links(async |links| {
            links.veth(node.name(), UPLINK, node).await?;
            links.plug(node.name(), WIRE).await
        })?;
        self.number(node, number)
    }

    /// Plugs a node in a second time, with an address of another network there, which it returns.
    pub fn plug_second(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        let port = format!("{}b", node.name());
        let address = in_v4(SECOND_WIRE, number as u8);
        self.netns.links(async |links| {
            links.veth(&port, SECOND, node).await?;
            links.plug(&port, WIRE).await
        })?;
        node.links(async |links| links.address(SECOND, address).await)?;
        Ok(address.addr())
    }

    /// Gives a node an IPv6 address on its cable, which it returns.
    pub fn plug_ipv6(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        let address = in_v6(self.networks.wire6, number as u8);
        // Usable at once, without detection of duplicates.
        node.sysctl(&format!("net/ipv6/conf/{UPLINK}/accept_dad"), "0")?;
        node.links(async |links| links.address(UPLINK, address).await)?;
        Ok(address.addr())
    }

    /// Where nodes on IPv6 send what is not for the wire, once that is routed.
    pub fn router_ipv6(&self) -> IpAddr {
        in_v6(self.networks.wire6, ROUTER).addr()
    }

    /// Gives a node address number `number` instead of one that it has, which it returns.
    pub fn renumber(&self, node: &Netns, from: IpAddr, number: usize) -> anyhow::Result<IpAddr> {
        ensure!((1..=MOST_NODES).contains(&number), "the underlay has {MOST_NODES} addresses for nodes");
        // The routes go with it.
        node.links(async |links| links.remove_address(from).await)?;
        self.number(node, number)
    }

    /// Tells all nodes where the others are. The kernel counts what it has found out itself over all its namespaces, and
    /// drops packets beyond 1,024 neighbours; of what it was told it takes any number.
    pub fn introduce(nodes: &[(&Netns, IpAddr)]) -> anyhow::Result<()> {
        let found = |(node, address): &(&Netns, IpAddr)| {
            let hardware = node.links(async |links| links.hardware_address(UPLINK).await)?;
            anyhow::Ok((*address, hardware))
        };
        let known = nodes.iter().map(found).collect::<anyhow::Result<Vec<_>>>()?;
        for (node, own) in nodes {
            node.links(async |links| {
                for (address, hardware) in known.iter().filter(|(address, _)| address != own) {
                    links.neighbour(UPLINK, *address, hardware).await?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    pub fn outside_address(&self) -> IpAddr {
        in_v4(self.networks.beyond, OUTSIDE).addr()
    }

    fn number(&self, node: &Netns, number: usize) -> anyhow::Result<IpAddr> {
        let (address, router) = (in_v4(self.networks.wire, number as u8), in_v4(self.networks.wire, ROUTER));
        node.links(async |links| {
            links.address(UPLINK, address).await?;
            links.default_route(router.addr()).await
        })?;
        Ok(address.addr())
    }
}

impl Default for Networks {
    /// RFC 5737: TEST-NET-1 and 2; RFC 3849: for documentation only. Nothing real uses them.
    fn default() -> Self {
        Self {
            wire: Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), 24),
            beyond: Ipv4Net::new_assert(Ipv4Addr::new(198, 51, 100, 0), 24),
            wire6: Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 64),
            beyond6: Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0), 64),
        }
    }
}

/// Host `number` of a network, with the network's length.
fn in_v4(network: Ipv4Net, number: u8) -> IpNet {
    let [a, b, c, _] = network.network().octets();
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, number), network.prefix_len()).into()
}

fn in_v6(network: Ipv6Net, number: u8) -> IpNet {
    let address = u128::from(network.network()) | u128::from(number);
    Ipv6Net::new_assert(address.into(), network.prefix_len()).into()
}

/// A node's interface on the underlay.
pub const UPLINK: &str = "eth0";
const SECOND: &str = "eth1";
/// The bridge in the underlay's namespace.
pub const WIRE: &str = "wire";
/// The wire's /24 holds them and the router.
pub const MOST_NODES: usize = 250;
/// More nodes have to be [introduced](Underlay::introduce).
pub const CROWD: usize = 24;
// Places in their networks.
const ROUTER: u8 = 254;
const BEFORE_OUTSIDE: u8 = 1;
const OUTSIDE: u8 = 2;
/// RFC 5737, TEST-NET-3.
const SECOND_WIRE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24);
