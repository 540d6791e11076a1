use super::{Mode, Netlink, NetlinkError};
use crate::types::Prefix;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags as Flags, AddressMessage, AddressScope},
};
use std::net::IpAddr;

/// An address on a link, with the length of the link's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    pub link: u32,
    pub address: Prefix,
}

/// What an address does beside being there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressFlags {
    /// IPv6: usable at once, without duplicate address detection.
    pub no_dad: bool,
    /// The kernel adds no route to the prefix.
    pub no_prefix_route: bool,
}

impl Netlink {
    /// All links' addresses of both families.
    pub async fn addresses(&self) -> Result<Vec<Address>, NetlinkError> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.query(message, true, as_address, || "list the addresses".into()).await
    }

    pub async fn add_address(
        &self,
        link: u32,
        address: Prefix,
        flags: AddressFlags,
    ) -> Result<(), NetlinkError> {
        let mut bits = Flags::empty();
        bits.set(Flags::Nodad, flags.no_dad && address.addr().is_ipv6());
        bits.set(Flags::Noprefixroute, flags.no_prefix_route);
        let mut message = message(link, address);
        if !bits.is_empty() {
            message.attributes.push(AddressAttribute::Flags(bits));
        }
        self.request(RouteNetlinkMessage::NewAddress(message), Mode::Create, || {
            format!("add address {address} to link number {link}")
        })
        .await
    }

    pub async fn delete_address(&self, link: u32, address: Prefix) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelAddress(message(link, address));
        self.request(message, Mode::Existing, || format!("delete address {address} of link number {link}"))
            .await
    }
}

fn message(link: u32, address: Prefix) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.index = link;
    message.header.prefix_len = address.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.attributes =
        vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    message
}

fn as_address(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    let mut local: Option<IpAddr> = None;
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(ip),
            // Of a point-to-point link this is the far end; IPv6 knows no other.
            AddressAttribute::Address(ip) => local = local.or(Some(ip)),
            _ => {}
        }
    }
    let address = Prefix::new(local?, message.header.prefix_len).ok()?;
    Some(Address { link: message.header.index, address })
}
