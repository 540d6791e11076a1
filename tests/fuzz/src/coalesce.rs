//! Inner packets from peers, joined for the TUN: what the kernel cuts off again is what came.

use super::script::Script;
use std::{collections::BTreeMap, ops::Range};
use weft::datapath::{
    offload::{
        MAX_PACKET,
        coalesce::{Coalescer, Takes},
        headers::Headers,
        split::Split,
    },
    packet::Packet,
};

/// A packet that has passed the gate.
struct Packed {
    place: Range<usize>,
    partial: bool,
    peer: u32,
    bytes: Vec<u8>,
}

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let takes = script.byte();
    let mut coalescer = Coalescer::new(Takes { tcp: takes & 1 == 0, udp: takes & 2 == 0 });
    let (mut buffer, mut came) = (Vec::new(), BTreeMap::new());
    while let Some(how) = script.next() {
        let (packet, partial, peer) = (script.piece(), how & 1 != 0, u32::from(how >> 1 & 1));
        if Packet::parse(packet).is_none() || partial && Headers::plain(packet).is_none() {
            continue;
        }
        buffer.extend([0; 8]);
        let place = buffer.len()..buffer.len() + packet.len();
        buffer.extend_from_slice(packet);
        came.insert(place.end, Packed { place, partial, peer, bytes: packet.to_vec() });
    }
    for Packed { place, partial, peer, .. } in came.values() {
        coalescer.push(&buffer, place.clone(), *partial, *peer);
    }
    let mut delivered = 0;
    for run in 0..coalescer.len() {
        let written = coalescer.finish(run, &mut buffer);
        let places: Vec<_> = [written.head.clone()].into_iter().chain(written.pieces()).collect();
        let packet = places.iter().flat_map(|place| &buffer[place.clone()]).copied().collect::<Vec<u8>>();
        assert!(packet.len() <= MAX_PACKET && Packet::parse(&packet).is_some());
        let of: Vec<_> = places.iter().map(|place| &came[&place.end]).collect();
        assert!(of.iter().all(|packed| packed.peer == written.peer), "peers are not mixed");
        assert_eq!(
            (of.len(), of.iter().map(|packed| packed.bytes.len()).sum()),
            (written.packets, written.bytes)
        );
        delivered += of.len();
        let virtio = written.virtio;
        let Some(gso) = virtio.gso else {
            let [alone] = &of[..] else { panic!("only a super-packet is made of several") };
            assert_eq!((packet, virtio.partial.is_some()), (alone.bytes.clone(), alone.partial));
            continue;
        };
        let split = Split::new(&virtio, gso, &packet, packet.len(), (0, 0)).expect("the kernel can cut it");
        assert_eq!(split.segments(), of.len());
        for (segment, packed) in of.iter().enumerate() {
            let shape = split.shape();
            let from = shape.headers + segment * shape.payload;
            let mut cut = vec![0; shape.headers];
            cut.extend_from_slice(&packet[from..packet.len().min(from + shape.payload)]);
            split.write(segment, &mut cut);
            assert_eq!(told(&cut, true), told(&packed.bytes, packed.partial), "segment {segment}");
        }
    }
    assert_eq!(delivered, came.len(), "none is lost, none is made up");
}

/// What a packet says: without its checksums, after a look at a complete one, the id of a packet that must not be
/// fragmented, and the urgent pointer of one that is not urgent.
fn told(packet: &[u8], partial: bool) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let headers = Headers::plain(&packet).expect("it was joined");
    let transport = &packet[headers.at..];
    let sum = headers.pseudo(&packet).and(transport.len() as u16).over(transport);
    assert!(partial || sum.fold() == 0xffff, "damage is not covered up");
    packet[headers.checksum_at()..][..2].fill(0);
    if headers.is_tcp() {
        packet[headers.at + 18..headers.at + 20].fill(0);
    }
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        if packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
        }
    }
    packet
}
