//! What the data path needs to know of an inner packet: where from, where to, and that its lengths agree.
//!
//! Nothing is copied and nothing is verified that the kernel verifies anyway before it delivers (checksums, options).
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::offload::headers::{TCP, UDP};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An inner packet's ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IPv4's protocol or IPv6's first next header.
    pub protocol: u8,
}

/// A packet's source and destination as they stand in it, to be compared at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    V4([u8; 8]),
    V6([u8; 32]),
}

impl Packet {
    /// Reads an IPv4 or IPv6 packet. None unless `bytes` are exactly one packet, to its header's own account.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Self::parse_head(bytes, bytes.len())
    }

    /// Reads a packet of `len` bytes of which `head` are the first.
    pub fn parse_head(head: &[u8], len: usize) -> Option<Self> {
        Some(match Ends::of_head(head, len)? {
            Ends::V4([s0, s1, s2, s3, d0, d1, d2, d3]) => Self {
                source: Ipv4Addr::new(s0, s1, s2, s3).into(),
                destination: Ipv4Addr::new(d0, d1, d2, d3).into(),
                protocol: head[9],
            },
            Ends::V6(ends) => {
                let [source, destination] = *ends.as_chunks::<16>().0 else { return None };
                Self {
                    source: Ipv6Addr::from(source).into(),
                    destination: Ipv6Addr::from(destination).into(),
                    protocol: head[6],
                }
            }
        })
    }

    /// Whether no router may pass it on: one of its ends is multicast, broadcast, loopback, unspecified or only of
    /// its link (RFC 1812, 5.3.7; RFC 4291, 2.5).
    pub fn is_martian(&self) -> bool {
        let unroutable = |address| match address {
            IpAddr::V4(a) => {
                // 0.0.0.0/8, 127.0.0.0/8, and 224.0.0.0 to the end: multicast, reserved, broadcast.
                let first = a.octets()[0];
                first == 0 || first == 127 || first >= 224 || a.is_link_local()
            }
            IpAddr::V6(a) => {
                a.is_multicast() || a.is_loopback() || a.is_unspecified() || a.is_unicast_link_local()
            }
        };
        unroutable(self.source) || unroutable(self.destination)
    }

    /// A hash of the flow, the same for all its packets and for all fragments of one: of its ends and, where each
    /// packet shows them, its ports.
    pub fn flow(&self, head: &[u8]) -> u16 {
        let (at, whole) = match self.source {
            IpAddr::V4(_) => (usize::from(head[0] & 0x0f) * 4, head[6] & 0x3f == 0 && head[7] == 0),
            IpAddr::V6(_) => (40, true),
        };
        let ports = match head.get(at..at + 4) {
            Some(&[a, b, c, d]) if whole && matches!(self.protocol, TCP | UDP) => {
                u32::from_be_bytes([a, b, c, d])
            }
            _ => 0,
        };
        let ends = match (self.source, self.destination) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u64::from(a.to_bits()) << 32 | u64::from(b.to_bits()),
            (a, b) => {
                let fold = |ip| match ip {
                    IpAddr::V4(ip) => u64::from(Ipv4Addr::to_bits(ip)),
                    IpAddr::V6(ip) => ip.to_bits() as u64 ^ (ip.to_bits() >> 64) as u64,
                };
                fold(a).rotate_left(32) ^ fold(b)
            }
        };
        // Multiply and take the upper bits (Knuth, vol. 3, 6.4): they depend on all bits below them.
        let mixed = (ends ^ u64::from(self.protocol) << 56).wrapping_mul(GOLDEN).rotate_left(32);
        ((mixed ^ u64::from(ports)).wrapping_mul(GOLDEN) >> 48) as u16
    }
}

impl Ends {
    /// None unless `bytes` are exactly one packet, to its header's own account.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        Self::of_head(bytes, bytes.len())
    }

    fn of_head(head: &[u8], len: usize) -> Option<Self> {
        match head.first()? >> 4 {
            4 => Self::v4(head.first_chunk()?, len),
            6 => Self::v6(head.first_chunk()?, len),
            _ => None,
        }
    }

    fn v4(header: &[u8; 20], len: usize) -> Option<Self> {
        let headers = usize::from(header[0] & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let whole = headers >= header.len() && headers <= total && total == len;
        whole.then_some(Self::V4(*header.last_chunk()?))
    }

    fn v6(header: &[u8; 40], len: usize) -> Option<Self> {
        let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
        (header.len() + payload == len).then_some(Self::V6(*header.last_chunk()?))
    }
}

/// 2^64 divided by the golden ratio, made odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    fn udp_v4(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ipv4([10, 32, 0, 2], [10, 32, 1, 2], 64).udp(ports.0, ports.1);
        builder.write(&mut bytes, payload).unwrap();
        bytes
    }

    #[test]
    fn both_families_are_read() {
        let packet = Packet::parse(&udp_v4((1, 2), b"hello")).unwrap();
        assert_eq!(packet.source.to_string(), "10.32.0.2");
        assert_eq!(packet.destination.to_string(), "10.32.1.2");
        assert_eq!(packet.protocol, UDP);
        let mut bytes = Vec::new();
        PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], 64).udp(1, 2).write(&mut bytes, b"hello").unwrap();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.source, IpAddr::from([0xfd; 16]));
        assert_eq!(packet.destination, IpAddr::from([0xfc; 16]));
        assert_eq!(packet.protocol, UDP);
    }

    #[test]
    fn a_flow_has_one_hash_and_flows_have_many() {
        let hash = |bytes: &[u8]| Packet::parse(bytes).unwrap().flow(bytes);
        assert_eq!(hash(&udp_v4((1, 2), b"hello")), hash(&udp_v4((1, 2), b"world")));
        let hashes: std::collections::BTreeSet<_> =
            (0..1000).map(|port| hash(&udp_v4((port, 2), b""))).collect();
        assert!(hashes.len() > 900, "{}", hashes.len());
        for bits in [0, 8] {
            let lanes: std::collections::BTreeSet<_> = hashes.iter().map(|hash| hash >> bits & 7).collect();
            assert_eq!(lanes.len(), 8, "from bit {bits} on");
        }
        let mut fragment = udp_v4((1, 2), b"hello");
        fragment[6] = 0x20;
        let first = hash(&fragment);
        fragment[6..8].copy_from_slice(&[0, 100]);
        fragment[20..24].fill(9);
        assert_eq!(hash(&fragment), first, "the first fragment and the last");
    }

    #[test]
    fn lengths_must_agree() {
        let bytes = udp_v4((1, 2), b"hello");
        assert!(Packet::parse(&bytes[..bytes.len() - 1]).is_none(), "cut short");
        assert!(Packet::parse(&[&bytes[..], &[0]].concat()).is_none(), "padded");
        let mut options = bytes;
        options[0] = 0x4f;
        assert!(Packet::parse(&options).is_none(), "options longer than the packet");
        options[0] = 0x44;
        assert!(Packet::parse(&options).is_none(), "header shorter than a header");
    }

    #[test]
    fn martians_are_known() {
        let martian = |source: &str, destination: &str| {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            Packet { source, destination, protocol: UDP }.is_martian()
        };
        assert!(!martian("10.32.0.2", "10.32.1.2"));
        assert!(!martian("fd00::1", "fd00::2"));
        for bad in ["0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255"] {
            assert!(martian("10.32.0.2", bad) && martian(bad, "10.32.0.2"), "{bad}");
        }
        for bad in ["::", "::1", "ff02::2", "fe80::1"] {
            assert!(martian("fd00::1", bad) && martian(bad, "fd00::1"), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(mut bytes: Vec<u8>, version in prop::sample::select(vec![4u8, 6])) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 0x0f;
            }
            if let Some(packet) = Packet::parse(&bytes) {
                packet.is_martian();
                packet.flow(&bytes);
            }
        }

        #[test]
        fn lengths_that_agree_never_lead_astray(mut bytes in prop::collection::vec(any::<u8>(), 20..100), words in 0u8..16) {
            let total = bytes.len() as u16;
            bytes[0] = 0x40 | words;
            bytes[2..4].copy_from_slice(&total.to_be_bytes());
            prop_assert_eq!(Packet::parse(&bytes).is_some(), (5..=bytes.len() / 4).contains(&usize::from(words)));
        }
    }
}
