//! Where an inner packet's headers are, for the few kinds of packets that can be parts of a super-packet.
//!
//! ```text
//!   ┌ ip ──────────┬ transport ─────────┬ payload …
//!   0              at                   len
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    checksum::Sum,
    virtio::{Kind, Place},
};

/// The headers of a TCP or UDP packet that is no fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    pub kind: Kind,
    /// Where the transport header begins.
    pub at: usize,
    /// Where the payload begins.
    pub len: usize,
}

impl Headers {
    /// Reads the headers of a whole packet with plain IP headers: no option, no extension, no fragment.
    pub fn plain(packet: &[u8]) -> Option<Self> {
        let (v6, at, protocol) = match packet.first()? {
            0x45 => {
                let header: &[u8; 20] = packet.first_chunk()?;
                let fragment = u16::from_be_bytes([header[6], header[7]]) & !DONT_FRAGMENT != 0;
                (false, 20, if fragment { return None } else { header[9] })
            }
            first if first >> 4 == 6 => (true, 40, *packet.get(6)?),
            _ => return None,
        };
        let kind = match (protocol, v6) {
            (TCP, false) => Kind::TcpV4,
            (TCP, true) => Kind::TcpV6,
            (UDP, _) => Kind::Udp,
            _ => return None,
        };
        Self::behind(packet, kind, at)
    }

    /// Reads the transport header at `at`; the payload may be missing.
    pub fn behind(packet: &[u8], kind: Kind, at: usize) -> Option<Self> {
        let len = match kind {
            Kind::Udp => at + UDP_LEN,
            Kind::TcpV4 | Kind::TcpV6 => match usize::from(*packet.get(at + 12)? >> 4) * 4 {
                len if len >= TCP_LEN => at + len,
                _ => return None,
            },
        };
        (len <= packet.len()).then_some(Self { kind, at, len })
    }

    /// Whether two packets of such headers have the same addresses and ports.
    pub fn is_same_flow(&self, packet: &[u8], headers: &Self, other: &[u8]) -> bool {
        let addresses = if self.at == IPV6_LEN { 8..40 } else { 12..20 };
        self.kind == headers.kind
            && self.at == headers.at
            && packet[addresses.clone()] == other[addresses]
            && packet[self.at..self.at + 4] == other[self.at..self.at + 4]
    }

    pub fn is_tcp(&self) -> bool {
        self.kind != Kind::Udp
    }

    /// Where the transport checksum is.
    pub fn checksum(&self) -> Place {
        Place { start: self.at as u16, offset: if self.is_tcp() { 16 } else { 6 } }
    }

    /// Where the transport checksum's field is.
    pub fn checksum_at(&self) -> usize {
        self.at + if self.is_tcp() { 16 } else { 6 }
    }

    /// The sum of the pseudo-header, less its length field (RFC 9293, 3.1; RFC 8200, 8.1).
    pub fn pseudo(&self, packet: &[u8]) -> Sum {
        let addresses = if packet[0] >> 4 == 6 { &packet[8..40] } else { &packet[12..20] };
        Sum::default().over(addresses).and(u16::from(if self.is_tcp() { TCP } else { UDP }))
    }
}

const IPV6_LEN: usize = 40;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
/// IPv4's flag in the word of flags and fragment offset.
pub const DONT_FRAGMENT: u16 = 0x4000;
const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;

/// TCP's flags, in the byte at offset 13.
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const ECE: u8 = 0x40;
    pub const CWR: u8 = 0x80;
}
