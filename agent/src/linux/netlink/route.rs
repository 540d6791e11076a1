use super::{Mode, Netlink, NetlinkError};
use crate::types::Prefix;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteScope as Scope, RouteType,
    },
};
use std::{fmt, net::IpAddr};

/// Tells our routes from others' (`ip route` shows it as `proto 99`).
pub const RTPROT_WEFT: u8 = 99;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

/// A route of the main table. `L` names the link: the kernel's index, or a name where that reads better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route<L = u32> {
    pub destination: Prefix,
    pub kind: RouteKind,
    /// The link it leads to; none for an unreachable route.
    pub link: Option<L>,
    pub gateway: Option<IpAddr>,
    /// The address that the host's own packets leave with.
    pub source: Option<IpAddr>,
    /// None: the link's.
    pub mtu: Option<u32>,
    pub protocol: u8,
    pub scope: RouteScope,
    /// 0 stands for the family's default.
    pub metric: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    Unicast,
    Unreachable,
    /// Any other, by the kernel's number.
    Other(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteScope {
    /// Through a gateway; all of IPv6's.
    Universe,
    /// Directly on the link.
    Link,
    /// Any other, by the kernel's number.
    Other(u8),
}

impl<L> Route<L> {
    /// A route that leads onto a link itself.
    pub fn on_link(destination: Prefix, link: L) -> Self {
        let scope = if destination.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
        Self { link: Some(link), kind: RouteKind::Unicast, scope, ..Self::unreachable(destination) }
    }

    /// A route through a gateway, for which there must be an on-link route.
    pub fn via(destination: Prefix, gateway: IpAddr, link: L) -> Self {
        Self { gateway: Some(gateway), scope: RouteScope::Universe, ..Self::on_link(destination, link) }
    }

    /// A route that answers with "host unreachable".
    pub fn unreachable(destination: Prefix) -> Self {
        Self {
            destination: destination.trunc(),
            kind: RouteKind::Unreachable,
            link: None,
            gateway: None,
            source: None,
            mtu: None,
            protocol: RTPROT_WEFT,
            scope: RouteScope::Universe,
            metric: 0,
        }
    }

    /// The same route with another word for its link.
    pub fn with_link<M>(&self, link: Option<M>) -> Route<M> {
        let Self { destination, kind, gateway, source, mtu, protocol, scope, metric, .. } = *self;
        Route { destination, kind, link, gateway, source, mtu, protocol, scope, metric }
    }

    pub fn is_default(&self) -> bool {
        self.destination.prefix_len() == 0
    }
}

impl Netlink {
    /// The main table's routes of one family, IPv6's cached and the kernel's own local ones left out.
    pub async fn routes(&self, family: Family) -> Result<Vec<Route>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = address_family(family);
        let as_route = |message| match message {
            RouteNetlinkMessage::NewRoute(message) => route_of(message),
            _ => None,
        };
        self.query(RouteNetlinkMessage::GetRoute(message), true, as_route, || {
            format!("list the {family:?} routes")
        })
        .await
    }

    /// Fails with [`NetlinkError::is_exists`] if there is a route to that destination with that metric, whoever's.
    pub async fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewRoute(message(route));
        self.request(message, Mode::Create, || format!("add route {route}")).await
    }

    /// Overwrites the route to that destination with that metric, whoever's.
    pub async fn replace_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewRoute(message(route));
        self.request(message, Mode::Replace, || format!("set route {route}")).await
    }

    pub async fn delete_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelRoute(message(route));
        self.request(message, Mode::Existing, || format!("delete route {route}")).await
    }
}

impl<L: fmt::Display> fmt::Display for Route<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == RouteKind::Unreachable {
            write!(f, "unreachable ")?;
        }
        write!(f, "{}", self.destination)?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))?;
        self.link.as_ref().map_or(Ok(()), |link| write!(f, " dev {link}"))?;
        self.source.map_or(Ok(()), |source| write!(f, " src {source}"))?;
        self.mtu.map_or(Ok(()), |mtu| write!(f, " mtu {mtu}"))?;
        write!(f, " proto {}", self.protocol)
    }
}

/// What IPv6 makes of metric 0.
const IPV6_DEFAULT_METRIC: u32 = 1024;
/// IPv6 hangs unreachable routes on the loopback link.
const LOOPBACK: u32 = 1;

pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn message(route: &Route) -> RouteMessage {
    let ip = RouteAddress::from;
    let mut message = RouteMessage::default();
    let v4 = route.destination.addr().is_ipv4();
    message.header.address_family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = route.protocol.into();
    message.header.scope = match route.scope {
        RouteScope::Universe => Scope::Universe,
        RouteScope::Link => Scope::Link,
        RouteScope::Other(number) => number.into(),
    };
    message.header.kind = match route.kind {
        RouteKind::Unicast => RouteType::Unicast,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Other(number) => number.into(),
    };
    let attributes = &mut message.attributes;
    if !route.is_default() {
        attributes.push(RouteAttribute::Destination(ip(route.destination.addr())));
    }
    attributes.extend(route.link.map(RouteAttribute::Oif));
    attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(ip(gateway))));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(ip(source))));
    attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

pub(super) fn route_of(message: RouteMessage) -> Option<Route> {
    let header = message.header;
    let (unspecified, v6): (IpAddr, bool) = match header.address_family {
        AddressFamily::Inet => (std::net::Ipv4Addr::UNSPECIFIED.into(), false),
        AddressFamily::Inet6 => (std::net::Ipv6Addr::UNSPECIFIED.into(), true),
        _ => return None,
    };
    let mut table = u32::from(header.table);
    let mut destination = unspecified;
    let (mut link, mut gateway, mut source, mut mtu, mut metric) = (None, None, None, None, 0);
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = number,
            RouteAttribute::Destination(address) => destination = plain(address)?,
            RouteAttribute::Oif(index) => link = Some(index),
            RouteAttribute::Gateway(address) => gateway = plain(address),
            RouteAttribute::PrefSource(address) => source = plain(address),
            RouteAttribute::Priority(number) => metric = number,
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.into_iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        other => RouteKind::Other(other.into()),
    };
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    if kind == RouteKind::Unreachable {
        link = link.filter(|link| *link != LOOPBACK);
    }
    Some(Route {
        destination: Prefix::new(destination, header.destination_prefix_length).ok()?,
        kind,
        link,
        gateway,
        source,
        mtu,
        protocol: u8::from(header.protocol),
        scope: match header.scope {
            Scope::Universe => RouteScope::Universe,
            Scope::Link => RouteScope::Link,
            other => RouteScope::Other(other.into()),
        },
        metric: if v6 && metric == IPV6_DEFAULT_METRIC { 0 } else { metric },
    })
}

fn plain(address: RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.into()),
        RouteAddress::Inet6(ip) => Some(ip.into()),
        _ => None,
    }
}
