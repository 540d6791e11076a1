//! Who reaches whom: a socket for everything on every pod, and who heard what.
//!
//! TCP connections are made, UDP datagrams sent; SCTP is an INIT of our own making, because few kernels have the protocol.
use crate::namespace::Netns;
use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol as Number, SockAddr, Socket, Type};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    time::Duration,
};
use weft::policy::model::{Protocol, Service};

/// One connection to be tried: from, to, and the number by which it is told from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Try {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub service: Service,
}

/// A pod's sockets: they stay in its namespace, whichever thread uses them.
pub struct Station {
    address: IpAddr,
    listeners: BTreeMap<u16, Socket>,
    servers: BTreeMap<u16, UdpSocket>,
    sctp: Socket,
    client: UdpSocket,
}

/// Tries that are under way.
#[derive(Default)]
pub struct Round {
    number: u32,
    tries: Vec<Try>,
    tcp: BTreeMap<usize, Socket>,
    pub heard: BTreeSet<Try>,
}

impl Station {
    /// Listens on all those ports with every protocol.
    pub fn open(netns: &Netns, address: IpAddr, ports: &BTreeSet<u16>) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<Self> {
            let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let (mut listeners, mut servers) = (BTreeMap::new(), BTreeMap::new());
            for port in ports {
                let listener = Socket::new(domain, Type::STREAM, None)?;
                listener.set_reuse_address(true)?;
                listener.bind(&SocketAddr::new(address, *port).into())?;
                listener.listen(BACKLOG)?;
                listener.set_nonblocking(true)?;
                listeners.insert(*port, listener);
                let server = UdpSocket::bind((address, *port))?;
                server.set_nonblocking(true)?;
                servers.insert(*port, server);
            }
            let sctp = Socket::new(domain, Type::RAW, Some(Number::from(SCTP)))?;
            sctp.bind(&SocketAddr::new(address, 0).into())?;
            sctp.set_nonblocking(true)?;
            let client = UdpSocket::bind((address, 0))?;
            Ok(Self { address, listeners, servers, sctp, client })
        };
        netns.run(open).with_context(|| format!("open sockets of {address}"))
    }

    fn send(&self, number: u32, at: usize, to: &Try) -> anyhow::Result<()> {
        let identity = identity(number, at);
        let sent = match to.service {
            Service::Port(Protocol::Udp, port) => {
                self.client.send_to(&identity, (to.destination, port)).map(drop)
            }
            Service::Port(Protocol::Sctp, port) => {
                let packet = sctp_init(port, &identity);
                let target = SockAddr::from(SocketAddr::new(to.destination, 0));
                self.sctp.send_to(&packet, &target).map(drop)
            }
            Service::Port(Protocol::Tcp, _) | Service::Other => Ok(()),
        };
        match sent {
            // What the last round's packets met, if their policy says so by ICMP.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
            sent => sent.with_context(|| format!("send to {}", to.destination)),
        }
    }

    /// A connection attempt; it must be made in the pod's namespace.
    fn connect(&self, to: SocketAddr) -> anyhow::Result<Socket> {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::new(self.address, 0).into())?;
        // It ends without a trace.
        socket.set_linger(Some(Duration::ZERO))?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => Ok(socket),
            connected => connected.map(|()| socket).with_context(|| format!("connect to {to}")),
        }
    }

    /// What has come in, as (port, identity).
    fn receive(&self) -> Vec<(Service, [u8; IDENTITY])> {
        let mut heard = Vec::new();
        let mut buffer = [0; 256];
        for (port, server) in &self.servers {
            let mut bytes = [0; 64];
            while let Ok(length) = server.recv(&mut bytes) {
                if let Ok(identity) = bytes[..length].try_into() {
                    heard.push((Service::Port(Protocol::Udp, *port), identity));
                }
            }
        }
        while let Ok(length) = (&self.sctp).read(&mut buffer) {
            let bytes = &buffer[..length];
            // An IPv4 raw socket shows the header, an IPv6 one does not.
            let header = if self.address.is_ipv4() { usize::from(bytes[0] & 15) * 4 } else { 0 };
            let Some(sctp) = bytes.get(header..).filter(|sctp| sctp.len() >= SCTP_INIT) else { continue };
            let port = u16::from_be_bytes([sctp[2], sctp[3]]);
            let identity = sctp[16..16 + IDENTITY].try_into().expect("the slice is as long");
            heard.push((Service::Port(Protocol::Sctp, port), identity));
        }
        // Or the queue of connections nobody asks for fills up.
        for listener in self.listeners.values() {
            while listener.accept().is_ok() {}
        }
        heard
    }
}

impl Round {
    /// Sends everything once.
    pub fn begin(
        number: u32,
        tries: Vec<Try>,
        stations: &BTreeMap<IpAddr, (Station, &Netns)>,
    ) -> anyhow::Result<Self> {
        // What is late from the round before is not of this one.
        stations.values().for_each(|(station, _)| drop(station.receive()));
        let mut round = Self { number, ..Self::default() };
        for (source, (station, netns)) in stations {
            let own: Vec<_> = tries.iter().enumerate().filter(|(_, it)| it.source == *source).collect();
            let connect = || {
                let tcp = own.iter().filter_map(|(at, it)| match it.service {
                    Service::Port(Protocol::Tcp, port) => Some((*at, SocketAddr::new(it.destination, port))),
                    _ => None,
                });
                tcp.map(|(at, to)| Ok((at, station.connect(to)?))).collect::<anyhow::Result<Vec<_>>>()
            };
            round.tcp.extend(netns.run(connect)?);
            own.iter().try_for_each(|(at, it)| station.send(number, *at, it))?;
        }
        round.tries = tries;
        Ok(round)
    }

    /// Takes in what has arrived so far.
    pub fn look(&mut self, stations: &BTreeMap<IpAddr, (Station, &Netns)>) -> anyhow::Result<()> {
        for (address, (station, _)) in stations {
            for (service, identity) in station.receive() {
                let at = u16::from_be_bytes([identity[2], identity[3]]);
                let known = self.tries.get(usize::from(at)).filter(|it| {
                    identity[..2] == (self.number as u16).to_be_bytes()
                        && it.destination == *address
                        && it.service == service
                });
                self.heard.extend(known);
            }
        }
        let waiting: Vec<_> = self.tcp.iter().collect();
        let mut asked: Vec<_> =
            waiting.iter().map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLOUT)).collect();
        poll(&mut asked, PollTimeout::ZERO)?;
        let answered = asked.iter().map(|it| it.revents().is_some_and(|events| !events.is_empty()));
        let answered: Vec<usize> =
            waiting.iter().zip(answered).filter(|(_, yes)| *yes).map(|((at, _), _)| **at).collect();
        for at in answered {
            let socket = self.tcp.remove(&at).expect("it was waiting");
            if socket.take_error()?.is_none() && socket.peer_addr().is_ok() {
                self.heard.insert(self.tries[at]);
            }
        }
        Ok(())
    }
}

/// Round and place in it.
fn identity(number: u32, at: usize) -> [u8; IDENTITY] {
    let (number, at) = ((number as u16).to_be_bytes(), (at as u16).to_be_bytes());
    [number[0], number[1], at[0], at[1]]
}

/// RFC 9260, 3.3.2: the packet that asks for an association, its initiate tag being the identity.
fn sctp_init(port: u16, identity: &[u8; IDENTITY]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(SCTP_INIT);
    packet.extend(SCTP_SOURCE.to_be_bytes());
    packet.extend(port.to_be_bytes());
    // Verification tag and checksum.
    packet.extend([0; 8]);
    // INIT, no flags, 20 bytes; tag, window, streams out and in, first number.
    packet.extend([1, 0, 0, 20]);
    packet.extend(identity);
    packet.extend(65_536u32.to_be_bytes());
    packet.extend([0, 1, 0, 1]);
    packet.extend(identity);
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

/// RFC 9260, appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(sum & 1)))
    };
    !bytes.iter().fold(!0, step)
}

const SCTP: i32 = 132;
const SCTP_SOURCE: u16 = 5000;
const SCTP_INIT: usize = 32;
const IDENTITY: usize = 4;
const BACKLOG: i32 = 256;
