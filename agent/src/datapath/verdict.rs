//! The two decisions of the data path: where a packet from here goes, and whether one from there may come in.
//!
//! ```text
//!   outward  martian? ─▶ home of the destination ─▶ endpoint or relay ─▶ size ─▶ Route
//!   inward   header ─▶ [open] ─▶ parse ─▶ home of the source is the sender? ─▶ home of the destination is here? ─▶ peer
//! ```
//!
//! Nothing comes in for an address that does not live here: so nothing loops between the TUN and the kernel.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    counters::Drop,
    header::HeaderError,
    icmp::Problem,
    offload::headers::Headers,
    packet::{Ends, Packet},
    table::{Home, Refused, Table},
};
use crate::types::{DataId, PeerName};
use std::net::SocketAddr;

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The peer's place in the table.
    pub peer: u32,
    /// Where the datagrams are sent.
    pub to: SocketAddr,
    /// That is a relay, which wants a prefix before each.
    pub relayed: bool,
}

/// Why a packet goes nowhere, and what its sender is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub drop: Drop,
    pub answer: Option<Problem>,
}

/// Decides on a packet that the kernel gave to the TUN. `largest` is its size in bytes, or that of its largest segment;
/// `narrow` says of a peer what its path takes, where that is known to be less than the table says.
pub fn outward(
    table: &Table,
    packet: &Packet,
    largest: usize,
    narrow: impl Fn(u32) -> Option<u16>,
) -> Result<Route, Refusal> {
    if packet.is_martian() {
        return Err(Refusal { drop: Drop::Martian, answer: None });
    }
    let answered = |drop, problem| Refusal { drop, answer: Some(problem) };
    // What lives here has a route of its own in the kernel; if that is gone, sending it back would loop.
    let Home::Peer(place) = table.home(packet.destination) else {
        return Err(answered(Drop::NoRoute, Problem::Unreachable));
    };
    let peer = &table.peers()[place as usize];
    let to = peer.hop().ok_or(answered(Drop::NoEndpoint, Problem::Unreachable))?;
    let mtu = narrow(place).map_or(peer.mtu, |mtu| mtu.min(peer.mtu));
    if largest > usize::from(mtu) {
        return Err(answered(Drop::TooBig, Problem::TooBig { mtu }));
    }
    Ok(Route { peer: place, to, relayed: peer.relay.is_some() })
}

/// Decides on packets from the underlay, most of which are like the one before.
pub struct Gate<'a> {
    table: &'a Table,
    last: Option<(Sender<'a>, Ends, u32)>,
}

/// Who sent a packet: by its own account, or as its session proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender<'a> {
    Says(DataId),
    Is(&'a PeerName),
}

impl<'a> Gate<'a> {
    pub fn new(table: &'a Table) -> Self {
        Self { table, last: None }
    }

    /// Whether an inner packet that `sender` sent may come in; gives the peer's place in the table.
    pub fn admit(&mut self, sender: Sender<'a>, inner: &[u8], partial: bool) -> Result<u32, Drop> {
        let ends = Ends::of(inner).ok_or(Drop::Malformed)?;
        if partial && Headers::plain(inner).is_none() {
            return Err(Drop::Malformed);
        }
        if let Some((last, same, peer)) = self.last
            && (last, same) == (sender, ends)
        {
            return Ok(peer);
        }
        let packet = Packet::parse(inner).ok_or(Drop::Malformed)?;
        let place = match sender {
            Sender::Says(data_id) => self.table.sender(data_id, packet.source),
            Sender::Is(name) => self.table.named_sender(name, packet.source),
        };
        let peer = place.map_err(|refused| match refused {
            Refused::Unknown => Drop::UnknownPeer,
            Refused::Spoofed => Drop::SpoofedSource,
        })?;
        if self.table.home(packet.destination) != Home::Local {
            return Err(Drop::NotLocal);
        }
        self.last = Some((sender, ends, peer));
        Ok(peer)
    }
}

impl From<HeaderError> for Drop {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::Short | HeaderError::Flags(_) => Self::Malformed,
            HeaderError::Version(_) => Self::UnknownVersion,
            HeaderError::Kind(_) => Self::UnknownKind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::table::{Inputs, Owner, Peer};
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    const HERE: [u8; 4] = [10, 32, 0, 2];
    const THERE: [u8; 4] = [10, 32, 1, 2];
    const LOST: [u8; 4] = [10, 32, 2, 2];

    fn table() -> Table {
        let endpoint = Some(SocketAddr::from(([192, 0, 2, 2], 6783)));
        let peer = |name: &str, id, endpoint| Peer {
            name: name.parse().unwrap(),
            data_id: DataId(id),
            endpoint,
            relay: None,
            mtu: 1400,
        };
        Table::new(Inputs {
            me: DataId(1),
            peers: [peer("there", 2, endpoint), peer("lost", 3, None)].into(),
            ranges: vec![
                ("10.32.0.0/24".parse().unwrap(), Owner::Me),
                ("10.32.1.0/24".parse().unwrap(), Owner::Peer(0)),
                ("10.32.2.0/24".parse().unwrap(), Owner::Peer(1)),
            ],
            held: vec![],
            bridge: vec![[10, 32, 0, 1].into()],
            pods: vec![HERE.into()],
        })
    }

    fn udp(source: [u8; 4], destination: [u8; 4], len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ipv4(source, destination, 64).udp(1, 2);
        builder.write(&mut bytes, &vec![0; len - 28]).unwrap();
        bytes
    }

    fn route(bytes: &[u8], narrow: Option<u16>) -> Result<Route, Refusal> {
        let packet = Packet::parse(bytes).unwrap();
        outward(&table(), &packet, bytes.len(), |_| narrow)
    }

    fn inward(sender: u32, packet: &[u8]) -> Result<u32, Drop> {
        Gate::new(&table()).admit(Sender::Says(DataId(sender)), packet, false)
    }

    #[test]
    fn a_packet_goes_to_the_peer_where_its_destination_lives() {
        let to = SocketAddr::from(([192, 0, 2, 2], 6783));
        let there = Route { peer: 0, to, relayed: false };
        assert_eq!(route(&udp(HERE, THERE, 1400), None), Ok(there));
        assert_eq!(route(&udp(HERE, THERE, 1400), Some(9000)), Ok(there), "the table says less");
    }

    #[test]
    fn what_goes_nowhere_is_counted_and_answered() {
        let refused = |bytes: &[u8]| {
            let refusal = route(bytes, None).unwrap_err();
            (refusal.drop, refusal.answer)
        };
        let unreachable = Some(Problem::Unreachable);
        assert_eq!(refused(&udp(HERE, [10, 32, 9, 9], 100)), (Drop::NoRoute, unreachable), "nobody's");
        assert_eq!(refused(&udp(HERE, [10, 32, 0, 9], 100)), (Drop::NoRoute, unreachable), "ours, no pod");
        assert_eq!(refused(&udp(THERE, HERE, 100)), (Drop::NoRoute, unreachable), "lives here");
        assert_eq!(refused(&udp(HERE, LOST, 100)), (Drop::NoEndpoint, unreachable));
        let too_big = Some(Problem::TooBig { mtu: 1400 });
        assert_eq!(refused(&udp(HERE, THERE, 1401)), (Drop::TooBig, too_big));
        assert_eq!(refused(&udp(HERE, [224, 0, 0, 1], 100)), (Drop::Martian, None));
        let narrow = route(&udp(HERE, THERE, 1301), Some(1300)).unwrap_err();
        assert_eq!(narrow.answer, Some(Problem::TooBig { mtu: 1300 }), "a path that was found to be narrow");
    }

    #[test]
    fn only_a_peers_own_addresses_reach_what_lives_here() {
        let packet = udp(THERE, HERE, 100);
        assert_eq!(inward(2, &packet), Ok(0));
        let dropped = |sender, packet: &[u8]| inward(sender, packet).unwrap_err();
        assert_eq!(dropped(9, &packet), Drop::UnknownPeer);
        assert_eq!(dropped(3, &packet), Drop::SpoofedSource, "as another peer's pod");
        assert_eq!(dropped(2, &udp(HERE, HERE, 100)), Drop::SpoofedSource, "as our own pod");
        assert_eq!(dropped(2, &udp(THERE, LOST, 100)), Drop::NotLocal, "no relay");
        assert_eq!(dropped(2, &udp(THERE, [10, 32, 0, 9], 100)), Drop::NotLocal, "no such pod");
        assert_eq!(dropped(2, &packet[..60]), Drop::Malformed, "cut short");
        assert_eq!(dropped(2, &[]), Drop::Malformed);
    }

    #[test]
    fn a_session_proves_whose_pods_may_speak() {
        let (table, packet) = (table(), udp(THERE, HERE, 100));
        let (there, lost) = ("there".parse().unwrap(), "lost".parse().unwrap());
        assert_eq!(Gate::new(&table).admit(Sender::Is(&there), &packet, false), Ok(0));
        assert_eq!(Gate::new(&table).admit(Sender::Is(&lost), &packet, false), Err(Drop::SpoofedSource));
    }

    #[test]
    fn what_was_admitted_before_opens_the_gate_for_nobody_else() {
        let table = table();
        let mut gate = Gate::new(&table);
        let mut admit = |sender, packet: &[u8]| gate.admit(Sender::Says(DataId(sender)), packet, false);
        let packet = udp(THERE, HERE, 100);
        assert_eq!([admit(2, &packet), admit(2, &packet)], [Ok(0), Ok(0)]);
        assert_eq!(admit(3, &packet), Err(Drop::SpoofedSource));
        assert_eq!(admit(2, &udp(LOST, HERE, 100)), Err(Drop::SpoofedSource));
        assert_eq!(admit(2, &udp(THERE, LOST, 100)), Err(Drop::NotLocal));
        assert_eq!(admit(2, &packet), Ok(0));
    }

    #[test]
    fn only_plain_headers_may_have_a_partial_checksum() {
        let table = table();
        let partial = |packet: &[u8]| Gate::new(&table).admit(Sender::Says(DataId(2)), packet, true);
        let mut packet = udp(THERE, HERE, 100);
        assert_eq!(partial(&packet), Ok(0));
        packet[9] = 1;
        assert_eq!(partial(&packet), Err(Drop::Malformed), "ICMP");
    }

    proptest! {
        #[test]
        fn any_bytes_are_decided_on(bytes: Vec<u8>, partial: bool) {
            let admitted = Gate::new(&table()).admit(Sender::Says(DataId(2)), &bytes, partial);
            prop_assert!(admitted.is_err(), "no random packet has the right ends");
        }

        #[test]
        fn a_damaged_packet_is_delivered_only_where_it_may(at in 0usize..100, byte: u8) {
            let mut bytes = udp(THERE, HERE, 100);
            bytes[at] = byte;
            if let Ok(peer) = inward(2, &bytes) {
                let packet = Packet::parse(&bytes).unwrap();
                prop_assert_eq!(table().home(packet.destination), Home::Local);
                prop_assert_eq!(table().home(packet.source), Home::Peer(peer));
            }
        }
    }
}
