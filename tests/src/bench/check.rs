//! Whether a path is what its name says: looks at what crosses the cable while bytes move from pod to pod.
use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
        sockopt::RcvBufForce,
    },
};

use super::{
    paths::Site,
    wires::{CABLE, CABLE_MTU, Wire},
};
use crate::{traffic, wait};

/// Waits until bytes arrive unchanged and cross the cable as they should: an overlay's inside UDP between the nodes,
/// others' as they are; on the plain wire in packets no larger than its MTU.
pub fn check(site: &Site) -> anyhow::Result<()> {
    let what = format!("{} carries traffic on wire {}", site.path.name(), site.wire);
    let carries = wait::until(&what, CARRIES_WITHIN, || {
        let capture = Capture::start(site)?;
        let way = site.way();
        traffic::transfer(way.from, way.to, way.address, BYTES, TRANSFER_WITHIN)?;
        capture.crossed(site)?.check(site)
    });
    carries.with_context(|| format!("last words:\n{}", site.last_words()))
}

/// A packet socket where the near end of the cable is.
struct Capture {
    socket: OwnedFd,
    interface: usize,
}

/// What the near end sent.
#[derive(Debug, Default)]
struct Crossed {
    /// Bytes of packets, IP headers included.
    all: u64,
    /// Those of packets as they should be.
    expected: u64,
    /// Bytes of the largest packet.
    largest: usize,
}

impl Capture {
    fn start(site: &Site) -> anyhow::Result<Self> {
        let (netns, _) = site.cable();
        let interface = netns.links(async |links| links.index(CABLE).await)? as usize;
        let open = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll)
                .context("open a packet socket")?;
            setsockopt(&socket, RcvBufForce, &BUFFER).context("enlarge its buffer")?;
            Ok(socket)
        };
        Ok(Self { socket: netns.run(open)?, interface })
    }

    /// Reads what was captured so far. Outgoing packets are seen as the driver gets them, so after segmentation.
    fn crossed(&self, site: &Site) -> anyhow::Result<Crossed> {
        let (_, addresses) = site.cable();
        let protocol = if site.path.encapsulates() { libc::IPPROTO_UDP } else { libc::IPPROTO_TCP };
        let (mut crossed, mut packet) = (Crossed::default(), vec![0; 1 << 17]);
        loop {
            let (length, from) = match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut packet) {
                Ok((length, Some(from))) => (length, from),
                Ok((_, None)) | Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok(crossed),
                Err(error) => return Err(error).context("read from the packet socket"),
            };
            if from.ifindex() == self.interface && from.pkttype() == libc::PACKET_OUTGOING {
                crossed.add(&packet[..length], (protocol as u8, addresses));
            }
        }
    }
}

impl Crossed {
    fn add(&mut self, packet: &[u8], expected: (u8, [IpAddr; 2])) {
        self.all += packet.len() as u64;
        self.largest = self.largest.max(packet.len());
        if header(packet) == Some(expected) {
            self.expected += packet.len() as u64;
        }
    }

    fn check(&self, site: &Site) -> anyhow::Result<()> {
        ensure!(
            self.expected >= BYTES,
            "of {} bytes on the cable only {} were in packets of {}",
            self.all,
            self.expected,
            site.path.name()
        );
        ensure!(
            site.wire == Wire::Offload || self.largest <= CABLE_MTU as usize,
            "a packet of {} bytes crossed the plain wire",
            self.largest
        );
        Ok(())
    }
}

/// Protocol and addresses of an IPv4 packet.
fn header(packet: &[u8]) -> Option<(u8, [IpAddr; 2])> {
    let address = |at: usize| {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddr::from(Ipv4Addr::from(octets)))
    };
    let is_v4 = packet.first()? >> 4 == 4;
    is_v4.then_some((*packet.get(9)?, [address(12)?, address(16)?]))
}

/// What is moved.
const BYTES: u64 = 2 << 20;
const TRANSFER_WITHIN: Duration = Duration::from_secs(5);
/// Some overlays need seconds to find each other and what fits through.
const CARRIES_WITHIN: Duration = Duration::from_secs(20);
/// Bytes, as the kernel counts them: every interface of the namespace is seen, in both directions.
const BUFFER: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_told_by_its_protocol_and_addresses() {
        let mut packet = vec![0; 40];
        (packet[0], packet[9]) = (0x45, 17);
        packet[12..20].copy_from_slice(&[203, 0, 113, 1, 203, 0, 113, 2]);
        let (here, there) = (IpAddr::from([203, 0, 113, 1]), IpAddr::from([203, 0, 113, 2]));
        assert_eq!(header(&packet), Some((17, [here, there])));
        let mut crossed = Crossed::default();
        crossed.add(&packet, (17, [here, there]));
        crossed.add(&packet, (6, [here, there]));
        crossed.add(&packet, (17, [there, here]));
        assert_eq!((crossed.all, crossed.expected, crossed.largest), (120, 40, 40));
        assert_eq!(header(&packet[..19]), None);
        // ARP begins with the kind of hardware.
        assert_eq!(header(&[0, 1, 8, 0]), None);
    }
}
