use super::{NetlinkError, Route, link::link_of, route::route_of};
use netlink_sys::{Socket, SocketAddr, protocols};
use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{AddressFamily, RouteNetlinkMessage},
};
use std::{io, os::fd::AsRawFd};
use tokio::io::{Interest, unix::AsyncFd};

/// Tells what changes in the network namespace it was opened in, whoever changes it.
#[derive(Debug)]
pub struct Monitor {
    routing: AsyncFd<Socket>,
    firewall: AsyncFd<Socket>,
}

/// Something changed. What it is now must be looked at: events may be late, doubled or, with `Lost`, missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Link {
        index: u32,
        name: String,
    },
    Address {
        link: u32,
    },
    Route(Route),
    Neighbour {
        link: u32,
    },
    /// A bridge's static or learnt MAC.
    Fdb {
        port: u32,
    },
    /// Forwarding, reverse path filter and the like of some link.
    Sysctl,
    /// A change of an nftables table, or of what may be a base chain in it, by the process with this netlink port.
    Firewall {
        table: String,
        base_chain: bool,
        by: u32,
    },
    /// More happened than the socket could hold.
    Lost,
}

impl Monitor {
    /// Opens two sockets in the calling thread's network namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// No permission (`CAP_NET_ADMIN`), or the kernel has no nftables.
    pub fn open() -> Result<Self, NetlinkError> {
        let routing = subscribe(protocols::NETLINK_ROUTE, &ROUTING_GROUPS);
        let firewall = subscribe(protocols::NETLINK_NETFILTER, &[NFNLGRP_NFTABLES]);
        let named = |what: &str| {
            let action = format!("watch the kernel's {what} events");
            move |errno| NetlinkError { action, errno }
        };
        Ok(Self {
            routing: routing.map_err(named("routing"))?,
            firewall: firewall.map_err(named("nftables"))?,
        })
    }

    /// Waits for the next events, and returns all of one datagram. Can be dropped while it waits without losing any.
    pub async fn next(&self) -> io::Result<Vec<Event>> {
        tokio::select! {
            datagram = receive(&self.routing) => Ok(lost_or(datagram?, routing_events)),
            datagram = receive(&self.firewall) => Ok(lost_or(datagram?, firewall_events)),
        }
    }
}

/// Tells when an address or a default route comes or goes.
#[derive(Debug)]
pub struct AddressMonitor(AsyncFd<Socket>);

impl AddressMonitor {
    /// Opens a socket in the calling thread's network namespace. Needs a tokio runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let action = "watch the kernel's events of addresses".to_string();
        let socket = subscribe(protocols::NETLINK_ROUTE, &ADDRESS_GROUPS);
        socket.map(Self).map_err(|errno| NetlinkError { action, errno })
    }

    /// Waits for the next change. Can be dropped while it waits without losing any.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let events = lost_or(receive(&self.0).await?, routing_events);
            let matters = |event: &Event| !matches!(event, Event::Route(route) if !route.is_default());
            if events.iter().any(matters) {
                return Ok(());
            }
        }
    }
}

fn subscribe(protocol: isize, groups: &[u32]) -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(protocol)?;
    socket.set_non_blocking(true)?;
    force_receive_buffer(&socket)?;
    socket.bind(&SocketAddr::new(0, groups.iter().fold(0, |mask, group| mask | 1 << (group - 1))))?;
    // SAFETY: the socket owns its descriptor, never replaces it, and closes it only when it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Room for a burst of some thousand events, also where `net.core.rmem_max` is small.
fn force_receive_buffer(socket: &Socket) -> io::Result<()> {
    let bytes: libc::c_int = 1 << 20;
    // SAFETY: the option takes a c_int, whose address and size are given; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    // In a user namespace only the limit may be used.
    if result == 0 { Ok(()) } else { socket.set_rx_buf_sz(bytes) }
}

/// None: the socket overflowed.
async fn receive(socket: &AsyncFd<Socket>) -> io::Result<Option<Vec<u8>>> {
    let result = socket.async_io(Interest::READABLE, |socket| socket.recv_from_full()).await;
    match result {
        Ok((bytes, _)) => Ok(Some(bytes)),
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
        Err(error) => Err(error),
    }
}

fn lost_or(datagram: Option<Vec<u8>>, read: fn(&[u8]) -> Vec<Event>) -> Vec<Event> {
    datagram.map_or_else(|| vec![Event::Lost], |bytes| read(&bytes))
}

/// Splits a datagram into messages: (type, sender's port, whole message).
pub(super) fn messages(mut bytes: &[u8]) -> Vec<(u16, u32, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= HEADER {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if !(HEADER..=bytes.len()).contains(&length) {
            break;
        }
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        let port = u32::from_ne_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        found.push((kind, port, &bytes[..length]));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

fn routing_events(bytes: &[u8]) -> Vec<Event> {
    messages(bytes)
        .into_iter()
        .filter_map(|(kind, _, message)| match kind {
            RTM_NEWNETCONF => Some(Event::Sysctl),
            RTM_DELNETCONF => None,
            _ => match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).map(|m| m.payload) {
                Ok(NetlinkPayload::InnerMessage(message)) => routing_event(message),
                Ok(_) => None,
                // Newer kernels may say what this build cannot read; look for ourselves then.
                Err(_) => Some(Event::Lost),
            },
        })
        .collect()
}

fn routing_event(message: RouteNetlinkMessage) -> Option<Event> {
    use RouteNetlinkMessage::*;
    match message {
        NewLink(link) | DelLink(link) => match link.header.interface_family {
            AddressFamily::Unspec => {
                link_of(link).map(|link| Event::Link { index: link.index, name: link.name })
            }
            // A port's bridge settings changed.
            _ => Some(Event::Fdb { port: link.header.index }),
        },
        NewAddress(address) | DelAddress(address) => Some(Event::Address { link: address.header.index }),
        NewRoute(route) | DelRoute(route) => route_of(route).map(Event::Route),
        NewNeighbour(neighbour) | DelNeighbour(neighbour) => Some(match neighbour.header.family {
            AddressFamily::Bridge => Event::Fdb { port: neighbour.header.ifindex },
            _ => Event::Neighbour { link: neighbour.header.ifindex },
        }),
        _ => None,
    }
}

/// Every nftables message but `NEWGEN` and `TRACE` begins, behind a 4-byte header, with its table's name as attribute 1.
fn firewall_events(bytes: &[u8]) -> Vec<Event> {
    messages(bytes)
        .into_iter()
        .filter(|(kind, ..)| kind >> 8 == NFNL_SUBSYS_NFTABLES)
        .filter_map(|(kind, by, message)| {
            let kind = kind & 0xff;
            let attributes = attributes(message.get(HEADER + NFGENMSG..)?);
            let hook = attributes.iter().any(|(kind, _)| *kind == NFTA_CHAIN_HOOK);
            // Not every kernel says of a chain that is gone whether it was one.
            let base_chain = kind == NFT_MSG_DELCHAIN || kind == NFT_MSG_NEWCHAIN && hook;
            let named = !matches!(kind, NFT_MSG_NEWGEN | NFT_MSG_TRACE);
            let (_, name) = attributes.into_iter().find(|(kind, _)| named && *kind == NFTA_TABLE)?;
            let table = String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned();
            Some(Event::Firewall { table, base_chain, by })
        })
        .collect()
}

/// Type, without its flags, and value of each attribute.
pub(super) fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        if !(4..=bytes.len()).contains(&length) {
            break;
        }
        found.push((u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff, &bytes[4..length]));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

/// Links, neighbours (FDB too), addresses, routes and per-link settings of both families; `linux/rtnetlink.h`.
const ROUTING_GROUPS: [u32; 8] = [1, 3, 5, 7, 9, 11, 24, 25];
/// Addresses and routes of both families.
const ADDRESS_GROUPS: [u32; 4] = [5, 7, 9, 11];
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;

/// `linux/netfilter/nfnetlink.h` and `nf_tables.h`.
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWGEN: u16 = 15;
const NFT_MSG_TRACE: u16 = 17;
const NFTA_TABLE: u16 = 1;
const NFTA_CHAIN_HOOK: u16 = 4;

pub(super) const HEADER: usize = 16;
pub(super) const NFGENMSG: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            routing_events(&bytes);
            firewall_events(&bytes);
        }
    }

    #[test]
    fn a_table_is_named_by_its_events() {
        let mut message = vec![0; HEADER];
        message[0] = 32;
        message[4..6].copy_from_slice(&(NFNL_SUBSYS_NFTABLES << 8 | 2).to_ne_bytes());
        message[12] = 7;
        message.extend([1, 0, 0, 0, 9, 0, 1, 0]);
        message.extend(b"weft\0\0\0\0");
        let event = Event::Firewall { table: "weft".into(), base_chain: false, by: 7 };
        assert_eq!(firewall_events(&message), [event]);
    }
}
