use super::{Mode, Netlink, NetlinkError};
use crate::types::Mac;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use std::net::IpAddr;

/// An address on a link and the MAC behind it, learnt or permanent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    pub link: u32,
    pub address: IpAddr,
    pub mac: Mac,
    pub permanent: bool,
}

/// A MAC that a bridge knows behind one of its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FdbEntry {
    /// Index of the port.
    pub port: u32,
    pub mac: Mac,
    /// Set by hand; never the port's own MAC, nor what was learnt.
    pub is_static: bool,
}

impl Netlink {
    /// Both families' neighbours that have a MAC.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        let message = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.query(message, true, as_neighbour, || "list the neighbours".into()).await
    }

    /// Sets a permanent entry over whatever there is for that address.
    pub async fn set_neighbour(&self, link: u32, address: IpAddr, mac: Mac) -> Result<(), NetlinkError> {
        let mut message = neighbour(link, address);
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        self.request(RouteNetlinkMessage::NewNeighbour(message), Mode::Replace, || {
            format!("set neighbour {address} at {mac} on link number {link}")
        })
        .await
    }

    pub async fn delete_neighbour(&self, link: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelNeighbour(neighbour(link, address));
        self.request(message, Mode::Existing, || format!("delete neighbour {address} of link number {link}"))
            .await
    }

    /// What all bridges know about their ports, without the ports' own MACs.
    pub async fn fdb(&self) -> Result<Vec<FdbEntry>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        let message = RouteNetlinkMessage::GetNeighbour(message);
        self.query(message, true, as_fdb, || "list the bridges' MACs".into()).await
    }

    /// Sets a static entry over whatever there is for that MAC.
    pub async fn set_fdb(&self, port: u32, mac: Mac) -> Result<(), NetlinkError> {
        let mut message = fdb(port, mac);
        message.header.state = NeighbourState::Noarp;
        self.request(RouteNetlinkMessage::NewNeighbour(message), Mode::Replace, || {
            format!("set MAC {mac} behind port number {port}")
        })
        .await
    }

    pub async fn delete_fdb(&self, port: u32, mac: Mac) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelNeighbour(fdb(port, mac));
        self.request(message, Mode::Existing, || format!("delete MAC {mac} behind port number {port}")).await
    }
}

fn neighbour(link: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    let (family, destination) = match address {
        IpAddr::V4(ip) => (AddressFamily::Inet, NeighbourAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, NeighbourAddress::Inet6(ip)),
    };
    message.header.family = family;
    message.header.ifindex = link;
    message.attributes = vec![NeighbourAttribute::Destination(destination)];
    message
}

fn fdb(port: u32, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.flags = NeighbourFlags::Controller;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

fn as_neighbour(message: RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(ip)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok().map(Mac),
            _ => {}
        }
    }
    let permanent = message.header.state == NeighbourState::Permanent;
    Some(Neighbour { link: message.header.ifindex, address: address?, mac: mac?, permanent })
}

fn as_fdb(message: RouteNetlinkMessage) -> Option<FdbEntry> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    let state = message.header.state;
    let (mut mac, mut bridge) = (None, false);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok().map(Mac),
            NeighbourAttribute::Controller(_) => bridge = true,
            _ => {}
        }
    }
    // NUD_PERMANENT entries are the ports' own MACs; those without a bridge belong to the device itself.
    if !bridge || state == NeighbourState::Permanent {
        return None;
    }
    Some(FdbEntry { port: message.header.ifindex, mac: mac?, is_static: state == NeighbourState::Noarp })
}
