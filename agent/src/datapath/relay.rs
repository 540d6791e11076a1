//! Packets for a third node: what stands before them, and where they go on to.
//!
//! ```text
//!   a ──✗── c        0: version<<4|6   1: hops left   2-3: 0   4: source's data id   8: destination's data id
//!   └─▶ b ──┘        12..: a data packet, a handshake's message or a probe, as it would go directly
//! ```
//!
//! A relay goes by the prefix alone: what is behind it, it cannot open. It passes on only what two peers that it knows
//! have for each other, and never back to where it came from; what still runs in a circle ends with its hops.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{counters::Drop, table::Table};
use crate::types::DataId;
use std::net::SocketAddr;

/// What stands before a relayed packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// How many more relays may pass it on.
    pub hops: u8,
    pub source: DataId,
    pub destination: DataId,
}

/// What is to be done with a relayed packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is for us, from the peer at that place in the table.
    Here { source: u32 },
    /// It is for the peer at that place, and goes there with one hop less.
    Onward { destination: u32, to: SocketAddr },
}

impl Prefix {
    /// As its source sends it.
    pub fn new(source: DataId, destination: DataId) -> Self {
        Self { hops: HOP_LIMIT, source, destination }
    }

    pub fn encode(self) -> [u8; PREFIX_LEN] {
        let mut bytes = [0; PREFIX_LEN];
        bytes[0] = RELAYED;
        bytes[1] = self.hops;
        bytes[4..8].copy_from_slice(&self.source.0.to_be_bytes());
        bytes[8..].copy_from_slice(&self.destination.0.to_be_bytes());
        bytes
    }

    /// None where the datagram is not relayed.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let &[RELAYED, hops, 0, 0, s0, s1, s2, s3, d0, d1, d2, d3] = datagram.first_chunk()? else {
            return None;
        };
        let id = |bytes| DataId(u32::from_be_bytes(bytes));
        Some(Self { hops, source: id([s0, s1, s2, s3]), destination: id([d0, d1, d2, d3]) })
    }

    /// Where a packet that came from there goes.
    pub fn verdict(self, table: &Table, from: Option<SocketAddr>) -> Result<Verdict, Drop> {
        let source = table.by_data_id(self.source).ok_or(Drop::RelayUnknown)?;
        if self.destination == table.me() {
            return Ok(Verdict::Here { source });
        }
        let destination = table.by_data_id(self.destination).ok_or(Drop::RelayUnknown)?;
        if self.hops == 0 {
            return Err(Drop::RelayExpired);
        }
        let to = table.peers()[destination as usize].hop().ok_or(Drop::RelayNoWay)?;
        if from.is_none_or(|from| from.ip() == to.ip()) {
            return Err(Drop::RelayNoWay);
        }
        Ok(Verdict::Onward { destination, to })
    }
}

/// Takes one hop from a relayed packet.
pub fn count_down(datagram: &mut [u8]) {
    datagram[1] = datagram[1].saturating_sub(1);
}

pub const PREFIX_LEN: usize = 12;
/// The first byte of a relayed packet.
pub const RELAYED: u8 = 1 << 4 | 6;
/// Relays that a packet may pass.
pub const HOP_LIMIT: u8 = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::table::{Inputs, Peer};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn address(node: u32) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, node as u8], 6783))
    }

    /// The table of `me`, who sends to each node by the next one in `next`; to itself where they are neighbours.
    fn table(me: u32, next: &[Option<u32>]) -> Table {
        let peer = |(node, next): (usize, &Option<u32>)| Peer {
            name: format!("n{node}").parse().unwrap(),
            data_id: DataId(node as u32),
            endpoint: Some(address(node as u32)),
            relay: next.filter(|next| *next != node as u32).map(address),
            mtu: 1400,
        };
        let peers = next.iter().enumerate().filter(|(node, _)| *node as u32 != me).map(peer);
        Table::new(Inputs { me: DataId(me), peers: peers.collect(), ..Inputs::default() })
    }

    #[test]
    fn the_prefix_is_what_the_picture_says() {
        let prefix = Prefix { hops: 8, source: DataId(0x0102_0304), destination: DataId(0x0506_0708) };
        assert_eq!(prefix.encode(), [0x16, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Prefix::decode(&prefix.encode()), Some(prefix));
        assert_eq!(Prefix::decode(&prefix.encode()[..11]), None);
        assert_eq!(Prefix::decode(&[0x12; 20]), None);
    }

    #[test]
    fn a_relay_serves_only_peers_and_never_sends_back() {
        let table = table(1, &[Some(0), None, Some(2), Some(2)]);
        let verdict = |source, destination, hops, from| {
            let (source, destination) = (DataId(source), DataId(destination));
            Prefix { hops, source, destination }.verdict(&table, Some(address(from)))
        };
        assert_eq!(verdict(0, 1, 0, 2), Ok(Verdict::Here { source: 0 }), "for us, by whatever way");
        assert_eq!(verdict(0, 2, 8, 0), Ok(Verdict::Onward { destination: 1, to: address(2) }));
        assert_eq!(verdict(0, 3, 8, 0), Ok(Verdict::Onward { destination: 2, to: address(2) }), "by another");
        assert_eq!(verdict(0, 2, 0, 0), Err(Drop::RelayExpired));
        assert_eq!(verdict(0, 9, 8, 0), Err(Drop::RelayUnknown));
        assert_eq!(verdict(9, 2, 8, 0), Err(Drop::RelayUnknown));
        assert_eq!(verdict(0, 3, 8, 2), Err(Drop::RelayNoWay), "it would go back");
        assert_eq!(verdict(2, 0, 8, 0), Err(Drop::RelayNoWay), "it would go back");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            if let Some(prefix) = Prefix::decode(&bytes) {
                prop_assert_eq!(&prefix.encode()[..], &bytes[..PREFIX_LEN]);
            }
        }

        /// Whatever the tables say, and be it nonsense, a packet ends.
        #[test]
        fn no_packet_goes_round_for_ever(
            next in prop::collection::vec(prop::collection::vec(0u32..6, 6), 6),
            source in 0u32..6,
            destination in 0u32..6,
        ) {
            prop_assume!(source != destination);
            let tables: Vec<_> = (0..6).map(|me| {
                let next: Vec<_> = next[me as usize].iter().map(|next| Some(*next)).collect();
                table(me, &next)
            }).collect();
            let mut prefix = Prefix::new(DataId(source), DataId(destination));
            let (mut at, mut from, mut hops) = (next[source as usize][destination as usize], source, 0);
            while let Ok(Verdict::Onward { to, .. }) =
                prefix.verdict(&tables[at as usize], Some(address(from)))
            {
                let mut bytes = prefix.encode();
                count_down(&mut bytes);
                prefix = Prefix::decode(&bytes).unwrap();
                (from, at) = (at, (0..6).find(|node| address(*node) == to).unwrap());
                hops += 1;
            }
            prop_assert!(hops <= HOP_LIMIT);
        }
    }

    #[test]
    fn each_node_is_passed_once() {
        let chain = [
            table(0, &[None, Some(1), Some(1), Some(1)]),
            table(1, &[Some(0), None, Some(2), Some(2)]),
            table(2, &[Some(1), Some(1), None, Some(3)]),
            table(3, &[Some(2), Some(2), Some(2), None]),
        ];
        let mut prefix = Prefix::new(DataId(0), DataId(3));
        let (mut from, mut at) = (0, 1);
        let mut passed = BTreeSet::new();
        while let Verdict::Onward { to, .. } = prefix.verdict(&chain[at], Some(address(from))).unwrap() {
            assert!(passed.insert(at));
            prefix.hops -= 1;
            (from, at) = (at as u32, (0..4).find(|node| address(*node) == to).unwrap() as usize);
        }
        assert_eq!((at, passed.len()), (3, 2));
    }
}
