use super::monitor::{HEADER, NFGENMSG, attributes, messages};
use netlink_sys::{Socket, SocketAddr, protocols};
use std::{io, net::IpAddr};

/// The kernel's table of connections. Its calls wait for the kernel; a big table takes some milliseconds.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

/// Who began to talk to whom: the beginner as it sent, and who really answers, past all translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// As in the IP header.
    pub protocol: u8,
    /// Where it answers; 0 where the protocol has no ports.
    pub port: u16,
}

impl Conntrack {
    /// Of the calling thread's network namespace, whichever thread uses it later.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(protocols::NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        Ok(Self { socket })
    }

    /// Forgets all connections from or to an address, so that its next owner does not inherit them. Returns how many
    /// there were. Linux 5.8 and later.
    ///
    /// Who begins is the source of the original direction, who answers that of the reply, whatever is translated.
    pub fn forget(&mut self, address: IpAddr) -> io::Result<usize> {
        let mut forgotten = 0;
        for tuple in [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY] {
            for connection in self.list(address, tuple)? {
                let message = request(IPCTNL_MSG_CT_DELETE, NLM_F_ACK, address, &connection);
                match self.exchange(&message, |_| {}) {
                    Ok(()) => forgotten += 1,
                    // It ended meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(forgotten)
    }

    /// Ends all connections that are `forbidden`, and returns how many there were.
    pub fn end(&mut self, forbidden: impl Fn(&Connection) -> bool) -> io::Result<usize> {
        let mut ended = 0;
        for family in [IpAddr::from([0; 4]), IpAddr::from([0; 16])] {
            let mut found = Vec::new();
            self.exchange(&request(IPCTNL_MSG_CT_GET, NLM_F_DUMP, family, &[]), |entry| {
                if connection(entry).is_some_and(|connection| forbidden(&connection)) {
                    found.push(names(entry));
                }
            })?;
            for names in found {
                match self.exchange(&request(IPCTNL_MSG_CT_DELETE, NLM_F_ACK, family, &names), |_| {}) {
                    Ok(()) => ended += 1,
                    // It ended meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(ended)
    }

    /// How many connections there are from or to an address. Linux 5.8 and later.
    pub fn connections(&self, address: IpAddr) -> io::Result<usize> {
        let directions = [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY];
        directions.iter().map(|tuple| Ok(self.list(address, *tuple)?.len())).sum()
    }

    /// Connections with this source in this direction, each as the attributes that name it.
    fn list(&self, address: IpAddr, tuple: u16) -> io::Result<Vec<Vec<u8>>> {
        let source = match address {
            IpAddr::V4(ip) => attribute(CTA_IP_V4_SRC, &ip.octets()),
            IpAddr::V6(ip) => attribute(CTA_IP_V6_SRC, &ip.octets()),
        };
        let ip = nested(CTA_TUPLE_IP, &source);
        let by = |wanted| u32::from(tuple == wanted) * CTA_FILTER_F_IP_SRC;
        let filter = [
            attribute(CTA_FILTER_ORIG_FLAGS, &by(CTA_TUPLE_ORIG).to_ne_bytes()),
            attribute(CTA_FILTER_REPLY_FLAGS, &by(CTA_TUPLE_REPLY).to_ne_bytes()),
        ];
        let body = [nested(tuple, &ip), nested(CTA_FILTER, &filter.concat())].concat();
        let mut found = Vec::new();
        self.exchange(&request(IPCTNL_MSG_CT_GET, NLM_F_DUMP, address, &body), |entry| {
            found.push(names(entry));
        })?;
        Ok(found)
    }

    /// Sends a request and hands over the attributes of each object in the answer.
    fn exchange(&self, message: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        self.socket.send_to(message, &SocketAddr::new(0, 0), 0)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for (kind, _, message) in messages(&bytes) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let errno = message.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok());
                        return match errno.map_or(-libc::EBADMSG, i32::from_ne_bytes) {
                            0 => Ok(()),
                            errno => Err(io::Error::from_raw_os_error(-errno)),
                        };
                    }
                    _ => message.get(HEADER + NFGENMSG..).into_iter().for_each(&mut each),
                }
            }
        }
    }
}

/// The attributes that name a connection in a request.
fn names(entry: &[u8]) -> Vec<u8> {
    let names = |kind: &u16| [CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE].contains(kind);
    let parts = attributes(entry).into_iter().filter(|(kind, _)| names(kind));
    let flagged = |kind| if kind == CTA_TUPLE_ORIG { kind | NLA_F_NESTED } else { kind };
    parts.map(|(kind, value)| attribute(flagged(kind), value)).collect::<Vec<_>>().concat()
}

fn connection(entry: &[u8]) -> Option<Connection> {
    let parts = attributes(entry);
    let (source, ..) = end(&parts, CTA_TUPLE_ORIG)?;
    let (destination, protocol, port) = end(&parts, CTA_TUPLE_REPLY)?;
    Some(Connection { source, destination, protocol, port })
}

/// A direction's source: address, protocol, port.
fn end(parts: &[(u16, &[u8])], tuple: u16) -> Option<(IpAddr, u8, u16)> {
    let part =
        |parts: &[(u16, &[u8])], wanted| parts.iter().find(|(kind, _)| *kind == wanted).map(|p| p.1.to_vec());
    let tuple = part(parts, tuple)?;
    let tuple = attributes(&tuple);
    let (ip, protocol) = (part(&tuple, CTA_TUPLE_IP)?, part(&tuple, CTA_TUPLE_PROTO)?);
    let (ip, protocol) = (attributes(&ip), attributes(&protocol));
    let v4 = part(&ip, CTA_IP_V4_SRC).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(IpAddr::from);
    let v6 = || part(&ip, CTA_IP_V6_SRC).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from);
    let port = part(&protocol, CTA_PROTO_SRC_PORT).and_then(|bytes| <[u8; 2]>::try_from(bytes).ok());
    let number = *part(&protocol, CTA_PROTO_NUM)?.first()?;
    Some((v4.or_else(v6)?, number, port.map_or(0, u16::from_be_bytes)))
}

fn request(kind: u16, flags: u16, address: IpAddr, body: &[u8]) -> Vec<u8> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8;
    let length = (HEADER + NFGENMSG + body.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend((NFNL_SUBSYS_CTNETLINK << 8 | kind).to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence number and our port: one request at a time needs neither. Then family, version, resource.
    message.extend([0; 8]);
    message.extend([family, 0, 0, 0]);
    message.extend(body);
    message
}

fn nested(kind: u16, body: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, body)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend((length as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// `linux/netlink.h`
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;

/// `linux/netfilter/nfnetlink.h` and `nfnetlink_conntrack.h`
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_FILTER_F_IP_SRC: u32 = 1;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
