//! What the kernel hands out of the TUN: a virtio header and a packet, which we cut as it says.

use super::script::Script;
use std::cell::RefCell;
use weft::{
    datapath::{
        offload::{
            MAX_PACKET,
            split::{Shape, Split, complete},
            virtio::{Gso, Virtio},
        },
        packet::Packet,
    },
    linux::udp::ROOM,
};

/// The first bytes say how the super-packet was foreseen to lie.
pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let (headers, payload) = (script.below(200), usize::from(script.number()));
    let Some((virtio, packet)) = script.rest().split_first_chunk() else { return };
    let Some(virtio) = Virtio::decode(virtio) else { return };
    assert_eq!(Virtio::decode(&virtio.encode()), Some(virtio));
    let packet = &packet[..packet.len().min(MAX_PACKET)];
    match virtio.gso {
        Some(gso) if payload >= 256 => {
            cut(&virtio, gso, packet, Shape { front: FRONT, headers, payload, back: BACK });
        }
        Some(gso) => {
            cut(&virtio, gso, packet, Shape { front: FRONT, headers: 0, payload: MAX_PACKET, back: BACK })
        }
        None => _ = virtio.partial.map(|place| complete(&mut packet.to_vec(), place)),
    }
}

/// As `transmit.rs` does it.
fn cut(virtio: &Virtio, gso: Gso, packet: &[u8], foreseen: Shape) {
    thread_local!(static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 2 * ROOM]));
    let len = packet.len();
    if foreseen.segments(len) * foreseen.stride() > 2 * ROOM {
        return;
    }
    BUFFER.with_borrow_mut(|buffer| {
        let mut rest = packet;
        for place in foreseen.places(buffer, len) {
            let (part, behind) = rest.split_at(place.len().min(rest.len()));
            place[..part.len()].copy_from_slice(part);
            rest = behind;
        }
        assert!(rest.is_empty());
        let head = &buffer[FRONT..FRONT + len.min(foreseen.headers + foreseen.payload)];
        let split = Split::new(virtio, gso, head, len, (FRONT, BACK));
        let (Some(split), Some(_)) = (split, Packet::parse_head(head, len)) else { return };
        let (shape, segments) = (split.shape(), split.segments());
        if segments * shape.stride() > ROOM {
            return;
        }
        if shape != foreseen {
            foreseen.gather(buffer, len);
            shape.spread(buffer, len);
        }
        let total = segments * (FRONT + shape.headers + BACK) + len - shape.headers;
        let mut payload = Vec::new();
        for (segment, datagram) in buffer[..total].chunks_mut(shape.stride()).enumerate() {
            let end = datagram.len() - BACK;
            let inner = &mut datagram[FRONT..end];
            split.write(segment, inner);
            assert!(Packet::parse(inner).is_some(), "each segment is a whole packet");
            assert!(inner.len() <= split.largest(len));
            payload.extend_from_slice(&inner[shape.headers..]);
        }
        assert_eq!(payload, packet[shape.headers..], "nothing is lost or made up");
    });
}

const FRONT: usize = 16;
const BACK: usize = 16;
