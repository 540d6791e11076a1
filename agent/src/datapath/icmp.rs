//! ICMP errors about packets that we can't carry, and when not to send them.
//!
//! ```text
//!   too big for the path ──▶ fragmentation needed / packet too big, with the MTU
//!   nowhere to send it   ──▶ host unreachable / address unreachable
//! ```
//!
//! Never about an ICMP error, a fragment but the first, or a packet whose source is not one host's address
//! (RFC 1122, 3.2.2; RFC 1812, 4.3.2.7; RFC 4443, 2.4). A packet without "don't fragment" is told its MTU as well:
//! we fragment nothing, and its sender, once it knows, does.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::packet::Packet;
use etherparse::{
    Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4::DestUnreachableHeader, icmpv6::DestUnreachableCode,
};
use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Its destination is not to be reached.
    Unreachable,
    /// It is larger than `mtu` bytes, which is what the way to its destination takes.
    TooBig { mtu: u16 },
}

/// Writes into `out` the packet that tells the sender of `bytes` about a problem; `from` is our own address.
/// False, and nothing is to be sent, where the rules forbid an answer or `from` is of the other family.
pub fn answer(problem: Problem, packet: &Packet, bytes: &[u8], from: IpAddr, out: &mut Vec<u8>) -> bool {
    out.clear();
    if packet.is_martian() || !is_answerable(packet, bytes) {
        return false;
    }
    let quote = |limit: usize| &bytes[..bytes.len().min(limit)];
    match (from, packet.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let what = match problem {
                Problem::Unreachable => DestUnreachableHeader::Host,
                Problem::TooBig { mtu } => DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu },
            };
            let builder = PacketBuilder::ipv4(from.octets(), to.octets(), HOPS);
            let builder = builder.icmpv4(Icmpv4Type::DestinationUnreachable(what));
            builder.write(out, quote(LARGEST_V4 - 28)).is_ok()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let what = match problem {
                Problem::Unreachable => Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Address),
                Problem::TooBig { mtu } => Icmpv6Type::PacketTooBig { mtu: mtu.into() },
            };
            let builder = PacketBuilder::ipv6(from.octets(), to.octets(), HOPS).icmpv6(what);
            builder.write(out, quote(LARGEST_V6 - 48)).is_ok()
        }
        _ => false,
    }
}

/// How often something may be done: a token bucket, kept as the time at which it will be full again.
#[derive(Clone, Debug)]
pub struct Bucket {
    interval: Duration,
    burst: u32,
    full: Option<Instant>,
}

impl Bucket {
    /// One token each `interval`; at most `burst` are saved up. It begins full.
    pub fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, burst, full: None }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let full = self.full.map_or(now, |full| full.max(now)) + self.interval;
        let granted = full - now <= self.interval * self.burst;
        if granted {
            self.full = Some(full);
        }
        granted
    }

    /// Whether nothing is missing: who is forgotten and begins anew would not notice.
    pub fn is_full(&self, now: Instant) -> bool {
        self.full.is_none_or(|full| full <= now)
    }
}

/// Neither an ICMP error itself nor a later fragment.
fn is_answerable(packet: &Packet, bytes: &[u8]) -> bool {
    match packet.source {
        IpAddr::V4(_) => {
            let first = bytes[6] & 0x1f == 0 && bytes[7] == 0;
            let ihl = usize::from(bytes[0] & 0x0f) * 4;
            first && (packet.protocol != ICMP || bytes.get(ihl).is_some_and(|kind| !is_error_v4(*kind)))
        }
        IpAddr::V6(_) => is_answerable_v6(packet.protocol, &bytes[40..]),
    }
}

/// Destination unreachable, source quench, redirect, time exceeded, parameter problem.
fn is_error_v4(kind: u8) -> bool {
    matches!(kind, 3 | 4 | 5 | 11 | 12)
}

/// Walks the extension headers to what the packet carries. What can't be read to its end is not answered.
fn is_answerable_v6(mut protocol: u8, mut rest: &[u8]) -> bool {
    for _ in 0..MOST_EXTENSIONS {
        let len = match protocol {
            // ICMPv6 errors are those below 128; a redirect is not to be answered either.
            ICMP_V6 => return rest.first().is_some_and(|kind| *kind >= 128 && *kind != 137),
            HOP_BY_HOP | ROUTING | DESTINATION => rest.get(1).map_or(0, |len| (usize::from(*len) + 1) * 8),
            FRAGMENT => match rest.get(2..4) {
                Some(&[high, low]) if high == 0 && low & 0xf8 == 0 => 8,
                _ => return false,
            },
            _ => return true,
        };
        let (Some(next), Some(behind)) = (rest.first(), rest.get(len..)) else { return false };
        (protocol, rest) = (*next, behind);
    }
    false
}

/// Bytes of the largest ICMP error over IPv4 (RFC 1812, 4.3.2.3).
const LARGEST_V4: usize = 576;
/// Bytes of the largest ICMPv6 error (RFC 4443, 2.4 c).
pub const LARGEST_V6: usize = 1280;
/// Time to live of an ICMP error.
const HOPS: u8 = 64;
/// Extension headers that are looked behind; nobody sends more.
const MOST_EXTENSIONS: usize = 8;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{IcmpEchoHeader, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    const BRIDGE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 32, 0, 1));

    fn v4() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ipv4([10, 32, 0, 2], [10, 32, 1, 2], 64)
    }

    fn v6() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], 64)
    }

    fn answered(problem: Problem, bytes: &[u8], from: IpAddr) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let packet = Packet::parse(bytes).unwrap();
        answer(problem, &packet, bytes, from, &mut out).then_some(out)
    }

    fn large_udp() -> Vec<u8> {
        let mut bytes = Vec::new();
        v4().udp(1, 2).write(&mut bytes, &[0x5a; 1400]).unwrap();
        bytes
    }

    #[test]
    fn fragmentation_needed_carries_the_mtu_and_the_packet() {
        let bytes = large_udp();
        let out = answered(Problem::TooBig { mtu: 1300 }, &bytes, BRIDGE).unwrap();
        assert_eq!(out.len(), LARGEST_V4);
        let read = Packet::parse(&out).unwrap();
        assert_eq!((read.source, read.destination.to_string()), (BRIDGE, "10.32.0.2".into()));
        let Some(TransportSlice::Icmpv4(icmp)) = SlicedPacket::from_ip(&out).unwrap().transport else {
            panic!("not ICMP")
        };
        let what = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1300 };
        assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(what));
        assert_eq!(icmp.payload(), &bytes[..LARGEST_V4 - 28]);
    }

    #[test]
    fn both_families_and_problems_have_their_message() {
        let mut bytes = Vec::new();
        v6().udp(1, 2).write(&mut bytes, &[0x5a; 1400]).unwrap();
        let from = IpAddr::from([0xfe; 16]);
        for (problem, kind) in [
            (Problem::Unreachable, Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Address)),
            (Problem::TooBig { mtu: 1300 }, Icmpv6Type::PacketTooBig { mtu: 1300 }),
        ] {
            let out = answered(problem, &bytes, from).unwrap();
            assert_eq!(out.len(), LARGEST_V6);
            let Some(TransportSlice::Icmpv6(icmp)) = SlicedPacket::from_ip(&out).unwrap().transport else {
                panic!("not ICMPv6")
            };
            assert_eq!(icmp.icmp_type(), kind);
        }
        assert!(answered(Problem::Unreachable, &bytes, BRIDGE).is_none(), "of the other family");
        let out = answered(Problem::Unreachable, &large_udp(), BRIDGE).unwrap();
        let Some(TransportSlice::Icmpv4(icmp)) = SlicedPacket::from_ip(&out).unwrap().transport else {
            panic!("not ICMP")
        };
        assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Host));
    }

    #[test]
    fn an_icmp_error_is_never_answered_but_a_ping_is() {
        let ping = IcmpEchoHeader { id: 1, seq: 1 };
        let (mut error4, mut ping4, mut error6, mut ping6) = (vec![], vec![], vec![], vec![]);
        let host = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Host);
        v4().icmpv4(host).write(&mut error4, &[0; 28]).unwrap();
        v4().icmpv4(Icmpv4Type::EchoRequest(ping)).write(&mut ping4, &[]).unwrap();
        v6().icmpv6(Icmpv6Type::PacketTooBig { mtu: 1300 }).write(&mut error6, &[0; 48]).unwrap();
        v6().icmpv6(Icmpv6Type::EchoRequest(ping)).write(&mut ping6, &[]).unwrap();
        let from6 = IpAddr::from([0xfe; 16]);
        assert!(answered(Problem::Unreachable, &error4, BRIDGE).is_none());
        assert!(answered(Problem::Unreachable, &ping4, BRIDGE).is_some());
        assert!(answered(Problem::Unreachable, &error6, from6).is_none());
        assert!(answered(Problem::Unreachable, &ping6, from6).is_some());
        // The same error behind an extension header.
        let mut hidden = [&error6[..40], &[ICMP_V6, 0, 1, 4, 0, 0, 0, 0], &error6[40..]].concat();
        hidden[6] = DESTINATION;
        let payload = hidden.len() as u16 - 40;
        hidden[4..6].copy_from_slice(&payload.to_be_bytes());
        assert!(answered(Problem::Unreachable, &hidden, from6).is_none());
    }

    #[test]
    fn of_a_fragmented_packet_only_the_first_is_answered() {
        let mut bytes = large_udp();
        bytes[6] = 0x20;
        assert!(answered(Problem::Unreachable, &bytes, BRIDGE).is_some(), "first, more follow");
        bytes[7] = 1;
        assert!(answered(Problem::Unreachable, &bytes, BRIDGE).is_none(), "the second");
        let fragment = |offset: u16| {
            let [high, low] = (offset << 3 | 1).to_be_bytes();
            is_answerable_v6(FRAGMENT, &[17, 0, high, low, 0, 0, 0, 1, 0, 0])
        };
        assert!(fragment(0) && !fragment(1) && !fragment(64));
    }

    #[test]
    fn only_one_hosts_address_is_answered() {
        for source in [[0, 0, 0, 0], [224, 0, 0, 1], [255; 4], [127, 0, 0, 1], [240, 0, 0, 1]] {
            let mut bytes = Vec::new();
            PacketBuilder::ipv4(source, [10, 32, 1, 2], 64).udp(1, 2).write(&mut bytes, &[]).unwrap();
            assert!(answered(Problem::Unreachable, &bytes, BRIDGE).is_none(), "from {source:?}");
            let mut bytes = Vec::new();
            PacketBuilder::ipv4([10, 32, 0, 2], source, 64).udp(1, 2).write(&mut bytes, &[]).unwrap();
            assert!(answered(Problem::Unreachable, &bytes, BRIDGE).is_none(), "to {source:?}");
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "any moment does")]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let now = Instant::now();
        let mut bucket = Bucket::new(Duration::from_millis(10), 5);
        assert_eq!((0..100).filter(|_| bucket.take(now)).count(), 5);
        let second = |millis: u64| now + Duration::from_millis(millis);
        assert_eq!((1..=100).filter(|millis| bucket.take(second(*millis))).count(), 10);
        assert_eq!(
            (0..100).filter(|_| bucket.take(second(60_000))).count(),
            5,
            "no more than the burst is saved"
        );
    }

    proptest! {
        #[test]
        fn any_packet_is_answered_or_not(mut bytes in prop::collection::vec(any::<u8>(), 20..200), six: bool, protocol in 0u8..64) {
            if six && bytes.len() >= 40 {
                let payload = bytes.len() as u16 - 40;
                bytes[0] = 0x60;
                bytes[4..6].copy_from_slice(&payload.to_be_bytes());
                bytes[6] = protocol;
            } else {
                let total = bytes.len() as u16;
                bytes[0] = 0x40 | (bytes[0] & 0x0f).clamp(5, (total / 4).min(15) as u8);
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                bytes[9] = protocol;
            }
            let from = if six { IpAddr::from([0xfe; 16]) } else { BRIDGE };
            if let Some(out) = answered(Problem::Unreachable, &bytes, from) {
                prop_assert!(Packet::parse(&out).is_some() && out.len() <= LARGEST_V6);
            }
        }
    }
}
