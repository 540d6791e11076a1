//! What a configuration is checked against: the host as it was found, as plain data.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{
    linux::netlink::RTPROT_WEFT,
    types::{BRIDGE, Prefix, TUN},
};
use std::net::IpAddr;

/// The host at the start of the agent, gathered once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    pub host_name: String,
    /// Sockets of family AF_INET6 can be made.
    pub ipv6: bool,
    /// Processors that this process may use; 0 counts as 1.
    pub cores: usize,
    pub links: Vec<HostLink>,
    pub addresses: Vec<HostAddress>,
    /// Of the main table; of other tables too where they may carry traffic of ours.
    pub routes: Vec<HostRoute>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLink {
    pub device: String,
    /// Bytes.
    pub mtu: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAddress {
    pub device: String,
    /// The address with the length of its prefix, such as 192.0.2.1/24.
    pub address: Prefix,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    pub destination: Prefix,
    /// None for routes that only refuse: unreachable, blackhole, prohibit.
    pub device: Option<String>,
    pub gateway: Option<IpAddr>,
    /// The preferred source address.
    pub source: Option<IpAddr>,
    /// Less is better.
    pub metric: u32,
    /// Who set it, as in `rtm_protocol`.
    pub protocol: u8,
}

impl HostFacts {
    /// The address of the default route's interface: over IPv4 if there is such a route, by the least metric.
    /// The route's own preferred source comes first, then an address in the gateway's network, then any that is not
    /// link-local.
    pub fn default_address(&self) -> Option<IpAddr> {
        let mut routes: Vec<_> =
            self.routes.iter().filter(|r| r.destination.prefix_len() == 0 && !r.is_ours()).collect();
        routes.sort_by_key(|route| (route.is_ipv6(), route.metric));
        routes.into_iter().find_map(|route| {
            let usable = self.addresses.iter().filter(|a| {
                Some(&a.device) == route.device.as_ref()
                    && a.ip().is_ipv6() == route.is_ipv6()
                    && is_global(a.ip())
            });
            let near = |a: &&HostAddress| route.gateway.is_some_and(|gateway| a.address.contains(&gateway));
            let preferred = route.source.filter(|source| is_global(*source));
            preferred.or_else(|| usable.clone().find(near).or(usable.clone().next()).map(HostAddress::ip))
        })
    }

    /// The interface that has an address.
    pub fn device_of(&self, ip: IpAddr) -> Option<&str> {
        self.addresses.iter().find(|a| a.ip() == ip).map(|a| a.device.as_str())
    }

    pub fn mtu_of(&self, device: &str) -> Option<u32> {
        self.links.iter().find(|link| link.device == device).map(|link| link.mtu)
    }
}

impl HostAddress {
    pub fn ip(&self) -> IpAddr {
        self.address.addr()
    }

    pub fn is_ours(&self) -> bool {
        is_our_device(&self.device)
    }
}

impl HostRoute {
    /// Weft set it, or it leads to a device of Weft: left over from the agent before this one.
    pub fn is_ours(&self) -> bool {
        self.protocol == RTPROT_WEFT || self.device.as_deref().is_some_and(is_our_device)
    }

    fn is_ipv6(&self) -> bool {
        matches!(self.destination, Prefix::V6(_))
    }
}

/// Of use to others on the underlay: neither loopback nor link-local.
pub fn is_global(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified()),
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified()),
    }
}

/// The bridge, the TUN, or the host's end of a pod's veth.
fn is_our_device(name: &str) -> bool {
    let is_veth = |rest: &str| rest.len() == 12 && rest.bytes().all(|b| b.is_ascii_hexdigit());
    name == BRIDGE || name == TUN || name.strip_prefix("wf").is_some_and(is_veth)
}
