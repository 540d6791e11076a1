//! Addresses as numbers: a span of offsets into the universe, IPv4 and IPv6 alike.
//!
//! ```text
//!   universe 10.32.0.0/12     offset 0 ─ 10.32.0.0 ... offset 1048575 ─ 10.47.255.255
//!   unit /24                  |--- 256 ---|--- 256 ---|  ...  what is handed over from node to node
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{Prefix, Universe};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Offsets from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub first: u128,
    pub last: u128,
}

impl Span {
    pub fn size(self) -> u128 {
        self.last - self.first + 1
    }

    pub fn contains(self, offset: u128) -> bool {
        self.first <= offset && offset <= self.last
    }

    pub fn intersect(self, other: Span) -> Option<Span> {
        let span = Span { first: self.first.max(other.first), last: self.last.min(other.last) };
        (span.first <= span.last).then_some(span)
    }

    /// What none of the others covers, in ascending order.
    pub fn without(self, others: &[Span]) -> Vec<Span> {
        others.iter().fold(vec![self], |parts, other| {
            let outside = |part: Span| {
                let before = (part.first < other.first)
                    .then(|| Span { first: part.first, last: part.last.min(other.first - 1) });
                let after = (other.last < part.last)
                    .then(|| Span { first: part.first.max(other.last + 1), last: part.last });
                [before, after].into_iter().flatten()
            };
            parts.into_iter().flat_map(outside).collect()
        })
    }

    /// The fewest aligned powers of two that make up the span, in ascending order: each is one CIDR.
    pub fn aligned(self) -> impl Iterator<Item = Span> {
        let mut next = Some(self.first);
        std::iter::from_fn(move || {
            let first = next.filter(|first| *first <= self.last)?;
            let fits = 127 - (self.last - first + 1).leading_zeros();
            let size = 1u128 << fits.min(first.trailing_zeros());
            next = first.checked_add(size);
            Some(Span { first, last: first + (size - 1) })
        })
    }
}

/// Joins neighbours in an ascending list of spans.
pub fn coalesce(spans: impl IntoIterator<Item = Span>) -> Vec<Span> {
    let mut joined: Vec<Span> = Vec::new();
    for span in spans {
        match joined.last_mut() {
            Some(last) if last.last + 1 == span.first => last.last = span.last,
            _ => joined.push(span),
        }
    }
    joined
}

/// How offsets map to the universe's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout(Universe);

impl Layout {
    pub fn new(universe: Universe) -> Self {
        Self(universe)
    }

    pub fn universe(&self) -> Universe {
        self.0
    }

    pub fn whole(&self) -> Span {
        let prefix = self.0.prefix();
        let bits = u32::from(prefix.max_prefix_len() - prefix.prefix_len());
        Span { first: 0, last: u128::MAX.checked_shr(128 - bits).unwrap_or(0) }
    }

    /// Addresses in a block: the unit in which space is handed over.
    pub fn unit(&self) -> u128 {
        1 << (self.0.prefix().max_prefix_len() - self.0.block_len())
    }

    pub fn offset(&self, address: IpAddr) -> Option<u128> {
        self.0.contains(address).then(|| number(address) - number(self.0.prefix().network()))
    }

    /// The address at an offset that lies inside the universe.
    pub fn address(&self, offset: u128) -> IpAddr {
        let number = number(self.0.prefix().network()) + offset;
        match self.0.prefix() {
            Prefix::V4(_) => Ipv4Addr::from_bits(number as u32).into(),
            Prefix::V6(_) => Ipv6Addr::from_bits(number).into(),
        }
    }

    /// The part of the universe that `prefix` covers.
    pub fn span(&self, prefix: Prefix) -> Option<Span> {
        let universe = self.0.prefix();
        if prefix.contains(&universe) {
            return Some(self.whole());
        }
        let first = self.offset(prefix.network())?;
        Some(Span { first, last: self.offset(prefix.broadcast())? })
    }

    pub fn prefixes(&self, span: Span) -> impl Iterator<Item = Prefix> {
        let layout = *self;
        span.aligned().map(move |piece| {
            let bits = (127 - piece.size().leading_zeros()) as u8;
            let len = layout.0.prefix().max_prefix_len() - bits;
            Prefix::new(layout.address(piece.first), len).expect("an aligned piece is at most the universe")
        })
    }

    /// No pod gets the universe's network address (IPv6: the routers' anycast address) nor IPv4's broadcast address.
    pub fn reserved(&self, offset: u128) -> bool {
        let broadcast = matches!(self.0.prefix(), Prefix::V4(_)).then_some(self.whole().last);
        offset == 0 || Some(offset) == broadcast
    }

    /// An address as the bytes that gossip and store know it by: 4 or 16.
    pub fn to_bytes(&self, offset: u128) -> Vec<u8> {
        match self.address(offset) {
            IpAddr::V4(ip) => ip.octets().into(),
            IpAddr::V6(ip) => ip.octets().into(),
        }
    }

    pub fn from_bytes(&self, bytes: &[u8]) -> Option<u128> {
        let address = match bytes.len() {
            4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
            16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
            _ => return None,
        };
        self.offset(address)
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(universe: &str) -> Layout {
        Layout::new(universe.parse().unwrap())
    }

    #[test]
    fn offsets_are_addresses_of_both_families() {
        for (universe, address, offset) in
            [("10.32.0.0/12", "10.33.0.1", 65_537), ("fd00:77::/64", "fd00:77::1:1", 65_537)]
        {
            let (layout, address) = (layout(universe), address.parse().unwrap());
            assert_eq!(layout.offset(address), Some(offset));
            assert_eq!(layout.address(offset), address);
            assert_eq!(layout.from_bytes(&layout.to_bytes(offset)), Some(offset));
            assert_eq!(layout.prefixes(layout.whole()).collect::<Vec<_>>(), [universe.parse().unwrap()]);
        }
        assert_eq!(layout("10.32.0.0/12").offset("10.48.0.0".parse().unwrap()), None);
        assert_eq!(layout("fd00:77::/64").from_bytes(&[10, 32, 0, 1]), None);
        assert!(layout("10.32.0.0/29").reserved(7) && !layout("fd00::/125").reserved(7));
    }

    #[test]
    fn what_others_cover_is_left_out() {
        let span = |first, last| Span { first, last };
        assert_eq!(span(4, 9).without(&[]), [span(4, 9)]);
        assert_eq!(span(4, 9).without(&[span(0, 4), span(6, 7), span(10, 12)]), [span(5, 5), span(8, 9)]);
        assert_eq!(span(4, 9).without(&[span(8, 12), span(0, 7)]), []);
    }

    #[test]
    fn a_prefix_is_cut_to_the_universe() {
        let layout = layout("10.32.0.0/12");
        assert_eq!(layout.span("0.0.0.0/0".parse().unwrap()), Some(layout.whole()));
        assert_eq!(layout.span("10.32.1.7/24".parse().unwrap()), Some(Span { first: 256, last: 511 }));
        assert_eq!(layout.span("192.0.2.0/24".parse().unwrap()), None);
    }

    proptest! {
        #[test]
        fn aligned_pieces_make_up_the_span(first in 0u128..5000, size in 1u128..5000) {
            let span = Span { first, last: first + size - 1 };
            let pieces: Vec<Span> = span.aligned().collect();
            prop_assert!(pieces.iter().all(|p| p.size().is_power_of_two() && p.first % p.size() == 0));
            prop_assert_eq!(coalesce(pieces), vec![span]);
        }
    }

    #[test]
    fn the_last_address_of_all_is_no_overflow() {
        let top = Span { first: u128::MAX - 2, last: u128::MAX };
        assert_eq!(top.aligned().map(Span::size).sum::<u128>(), 3);
    }
}
