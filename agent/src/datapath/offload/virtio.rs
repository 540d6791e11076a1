//! The virtio network header that precedes every packet at the TUN: what is left to do for the packet.
//!
//! ```text
//!   0      1         2           4          6            8             10
//!   │flags │GSO type │header len │GSO size  │csum start  │csum offset  │ packet …
//! ```
//!
//! In the machine's byte order (Virtual I/O Device 1.2, 5.1.6; the TUN's legacy form).
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// What the kernel says of a packet, or is told of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Virtio {
    /// The transport checksum is partial: the sum of the pseudo-header alone.
    pub partial: Option<Place>,
    /// It is a super-packet.
    pub gso: Option<Gso>,
}

/// Where a checksum begins to sum, and where behind that its field is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub start: u16,
    pub offset: u16,
}

/// How a super-packet is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    pub kind: Kind,
    /// Bytes of headers that every segment has. What the kernel says here is only a hint.
    pub headers: u16,
    /// Bytes of payload in every segment but the last, which may have fewer.
    pub size: u16,
    /// The first segment has the flag CWR (RFC 3168), the others don't.
    pub ecn: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    TcpV4,
    TcpV6,
    Udp,
}

impl Virtio {
    /// None for a kind of super-packet that was never asked for.
    pub fn decode(bytes: &[u8; VIRTIO_LEN]) -> Option<Self> {
        let u16_at = |at| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let place = Place { start: u16_at(6), offset: u16_at(8) };
        let gso = |kind| Gso { kind, headers: u16_at(2), size: u16_at(4), ecn: bytes[1] & GSO_ECN != 0 };
        Some(Self {
            partial: (bytes[0] & NEEDS_CSUM != 0).then_some(place),
            gso: match bytes[1] & !GSO_ECN {
                GSO_NONE => None,
                GSO_TCPV4 => Some(gso(Kind::TcpV4)),
                GSO_TCPV6 => Some(gso(Kind::TcpV6)),
                GSO_UDP_L4 => Some(gso(Kind::Udp)),
                _ => return None,
            },
        })
    }

    pub fn encode(&self) -> [u8; VIRTIO_LEN] {
        let mut bytes = [0; VIRTIO_LEN];
        let mut put = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        if let Some(place) = self.partial {
            put(6, place.start);
            put(8, place.offset);
        }
        if let Some(gso) = self.gso {
            put(2, gso.headers);
            put(4, gso.size);
        }
        bytes[0] = if self.partial.is_some() { NEEDS_CSUM } else { 0 };
        bytes[1] = self.gso.map_or(GSO_NONE, |gso| {
            let ecn = if gso.ecn { GSO_ECN } else { 0 };
            ecn | match gso.kind {
                Kind::TcpV4 => GSO_TCPV4,
                Kind::TcpV6 => GSO_TCPV6,
                Kind::Udp => GSO_UDP_L4,
            }
        });
        bytes
    }
}

pub const VIRTIO_LEN: usize = 10;
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tcp_super_packet_is_as_the_kernel_has_it() {
        let place = Place { start: 20, offset: 16 };
        let gso = Gso { kind: Kind::TcpV4, headers: 52, size: 1388, ecn: false };
        let bytes = Virtio { partial: Some(place), gso: Some(gso) }.encode();
        let words = bytes[2..].chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]]));
        assert_eq!((bytes[0], bytes[1], words.collect::<Vec<_>>()), (1, 1, vec![52, 1388, 20, 16]));
        assert_eq!(Virtio::default().encode(), [0; VIRTIO_LEN]);
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_the_same_meaning(bytes: [u8; VIRTIO_LEN]) {
            if let Some(virtio) = Virtio::decode(&bytes) {
                prop_assert_eq!(Virtio::decode(&virtio.encode()), Some(virtio));
            }
        }
    }
}
