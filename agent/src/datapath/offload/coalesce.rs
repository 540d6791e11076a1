//! From segments back to super-packets, one batch at a time.
//!
//! ```text
//!   segments of a batch   a1 a2 b1 a3 c1 b2 a4*          (* pushed: the last of a write)
//!   runs, in order        [a1 a2 a3 a4*] [b1 b2] [c1]    one TUN write each
//! ```
//!
//! A packet joins the newest run of its flow if it is exactly what the kernel would cut off that run's super-packet
//! next: the next sequence number and IP id, and all else equal, but for the flags that only a first or a last segment
//! may have. So nothing crosses a gap, a flow is never reordered, and what comes out of the super-packet again is what
//! went in. Only an id that means nothing, since the packet must not be fragmented (RFC 6864, 4), may have been equal in
//! all and come out as a row: these are the rules of the kernel's GRO.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    MAX_PACKET,
    checksum::Sum,
    headers::{DONT_FRAGMENT, Headers, flags},
    virtio::{Gso, Kind, Virtio},
};
use std::ops::Range;

/// Which kinds of super-packets the kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takes {
    pub tcp: bool,
    pub udp: bool,
}

/// The runs of one batch. It is used again for the next: nothing is allocated per packet.
pub struct Coalescer {
    takes: Takes,
    runs: Vec<Run>,
    /// Each joined packet's payload, and the next one of its run.
    pieces: Vec<(Range<usize>, Option<usize>)>,
    /// Runs before this are over for all flows.
    barrier: usize,
}

/// A packet, or several that are one super-packet.
#[derive(Debug)]
struct Run {
    /// The sending peer's place in the table.
    peer: u32,
    /// The first packet's place in the batch's buffer.
    head: Range<usize>,
    packets: usize,
    /// Bytes of the packets that came, each with its headers.
    bytes: usize,
    /// The transport checksum of what is handed on is partial.
    partial: bool,
    /// None for a packet that nothing may join.
    open: Option<Open>,
    first_piece: Option<usize>,
    last_piece: usize,
}

/// What the next packet of a run must be.
#[derive(Debug)]
struct Open {
    headers: Headers,
    /// Bytes of payload in each segment.
    size: usize,
    /// Bytes of the super-packet so far.
    total: usize,
    /// A short segment or a push ends it.
    closed: bool,
    /// PSH and FIN of the last segment.
    ends: u8,
}

/// A packet to write: its own bytes are at `head`, more payload at the pieces.
pub struct Written<'a> {
    pub peer: u32,
    pub virtio: Virtio,
    pub head: Range<usize>,
    /// How many packets came for it, and their bytes.
    pub packets: usize,
    pub bytes: usize,
    coalescer: &'a Coalescer,
    piece: Option<usize>,
}

impl Coalescer {
    pub fn new(takes: Takes) -> Self {
        Self { takes, runs: Vec::new(), pieces: Vec::new(), barrier: 0 }
    }

    /// Takes a whole inner packet, which lies at `place` of the batch's `buffer`. `partial` says that its transport
    /// checksum is, which only plain headers may have.
    pub fn push(&mut self, buffer: &[u8], place: Range<usize>, partial: bool, peer: u32) {
        let packet = &buffer[place.clone()];
        let headers = Headers::plain(packet);
        let joins = headers.filter(|headers| match headers.kind {
            Kind::Udp => self.takes.udp,
            Kind::TcpV4 | Kind::TcpV6 => self.takes.tcp,
        });
        let Some(headers) = joins else {
            self.barrier = self.runs.len() + 1;
            return self.begin(place, partial, peer, None);
        };
        if let Some(run) = self.newest(buffer, packet, &headers, peer) {
            let run = &mut self.runs[run];
            if run.joins(buffer, packet, &headers) && (partial || is_intact(packet, &headers)) {
                return run.join(&mut self.pieces, packet, place, &headers);
            }
        }
        let size = packet.len() - headers.len;
        let may_go_on = size > 0 && is_plain(packet, &headers) && (partial || is_intact(packet, &headers));
        let ends = if headers.is_tcp() { packet[headers.at + 13] & ENDS } else { 0 };
        let open = Open { headers, size, total: packet.len(), closed: !may_go_on || ends != 0, ends };
        self.begin(place, partial, peer, Some(open));
    }

    /// How many packets are to be written.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Makes one packet ready: writes the headers of a super-packet in place of its first packet's.
    pub fn finish(&self, run: usize, buffer: &mut [u8]) -> Written<'_> {
        let run = &self.runs[run];
        let packet = &mut buffer[run.head.clone()];
        let mut virtio = Virtio::default();
        if let Some(open) = &run.open {
            if run.packets > 1 {
                virtio.gso = Some(open.write(packet));
            }
            virtio.partial = (run.partial || run.packets > 1).then(|| open.headers.checksum());
        } else if run.partial {
            virtio.partial = Headers::plain(packet).map(|headers| headers.checksum());
        }
        Written {
            peer: run.peer,
            virtio,
            head: run.head.clone(),
            packets: run.packets,
            bytes: run.bytes,
            coalescer: self,
            piece: run.first_piece,
        }
    }

    /// Forgets the batch.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.pieces.clear();
        self.barrier = 0;
    }

    fn begin(&mut self, head: Range<usize>, partial: bool, peer: u32, open: Option<Open>) {
        let bytes = head.len();
        self.runs.push(Run {
            peer,
            head,
            packets: 1,
            bytes,
            partial,
            open,
            first_piece: None,
            last_piece: 0,
        });
    }

    /// The newest run of the packet's flow, among the last few.
    fn newest(&self, buffer: &[u8], packet: &[u8], headers: &Headers, peer: u32) -> Option<usize> {
        let from = self.barrier.max(self.runs.len().saturating_sub(LOOK_BACK));
        (from..self.runs.len()).rev().find(|run| {
            let run = &self.runs[*run];
            let head = &buffer[run.head.clone()];
            run.peer == peer
                && run.open.as_ref().is_some_and(|open| open.headers.is_same_flow(head, headers, packet))
        })
    }
}

impl Run {
    /// Whether a packet of the same flow is the next segment.
    fn joins(&self, buffer: &[u8], packet: &[u8], headers: &Headers) -> bool {
        let Some(open) = &self.open else { return false };
        let payload = packet.len() - headers.len;
        if open.closed
            || headers.len != open.headers.len
            || !(1..=open.size).contains(&payload)
            || open.total + payload > MAX_PACKET
            || self.packets == MAX_SEGMENTS
        {
            return false;
        }
        let head = &buffer[self.head.clone()];
        open.ip_goes_on(head, packet, self.packets) && open.transport_goes_on(head, packet, self.packets)
    }

    fn join(
        &mut self,
        pieces: &mut Vec<(Range<usize>, Option<usize>)>,
        packet: &[u8],
        place: Range<usize>,
        headers: &Headers,
    ) {
        let open = self.open.as_mut().expect("what a packet joins is open");
        let payload = packet.len() - headers.len;
        if headers.is_tcp() {
            open.ends = packet[headers.at + 13] & ENDS;
        }
        open.closed = payload < open.size || open.ends != 0;
        open.total += payload;
        self.packets += 1;
        self.bytes += packet.len();
        let piece = pieces.len();
        pieces.push((place.start + headers.len..place.end, None));
        match self.first_piece {
            None => self.first_piece = Some(piece),
            Some(_) => pieces[self.last_piece].1 = Some(piece),
        }
        self.last_piece = piece;
    }
}

impl Open {
    fn ip_goes_on(&self, head: &[u8], packet: &[u8], index: usize) -> bool {
        if self.headers.at == IPV6_LEN {
            // Version, traffic class and flow label; hop limit. The addresses are the flow's.
            return head[..4] == packet[..4] && head[7] == packet[7];
        }
        let id = |bytes: &[u8]| u16::from_be_bytes([bytes[4], bytes[5]]);
        let fixed = head[6] & (DONT_FRAGMENT >> 8) as u8 != 0 && id(packet) == id(head);
        // Type of service with ECN; "don't fragment"; time to live.
        head[1] == packet[1]
            && head[6] == packet[6]
            && head[8] == packet[8]
            && (fixed || id(packet) == id(head).wrapping_add(index as u16))
    }

    fn transport_goes_on(&self, head: &[u8], packet: &[u8], index: usize) -> bool {
        let Headers { at, len, .. } = self.headers;
        if !self.headers.is_tcp() {
            return is_plain(packet, &self.headers);
        }
        let sequence =
            |bytes: &[u8]| u32::from_be_bytes([bytes[at + 4], bytes[at + 5], bytes[at + 6], bytes[at + 7]]);
        let flags = packet[at + 13];
        // Acknowledgement; length and reserved bits; flags but the first one's and the last one's; window; options.
        sequence(packet) == sequence(head).wrapping_add((index * self.size) as u32)
            && packet[at + 8..at + 13] == head[at + 8..at + 13]
            && flags & !ENDS == head[at + 13] & !(ENDS | flags::CWR)
            && packet[at + 14..at + 16] == head[at + 14..at + 16]
            && packet[at + 20..len] == head[at + 20..len]
    }

    /// Makes the first packet's headers those of the whole.
    fn write(&self, packet: &mut [u8]) -> Gso {
        let Headers { at, len, kind } = self.headers;
        if at == IPV6_LEN {
            put(packet, 4, (self.total - IPV6_LEN) as u16);
        } else {
            put(packet, 2, self.total as u16);
            put(packet, 10, 0);
            put(packet, 10, Sum::default().over(&packet[..at]).checksum());
        }
        let transport = (self.total - at) as u16;
        if self.headers.is_tcp() {
            packet[at + 13] |= self.ends;
        } else {
            put(packet, at + 4, transport);
        }
        let pseudo = self.headers.pseudo(packet).and(transport).fold();
        put(packet, self.headers.checksum_at(), pseudo);
        let ecn = self.headers.is_tcp() && packet[at + 13] & flags::CWR != 0;
        Gso { kind, headers: len as u16, size: self.size as u16, ecn }
    }
}

impl Written<'_> {
    /// The payloads that follow the head, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let pieces = &self.coalescer.pieces;
        let mut next = self.piece;
        std::iter::from_fn(move || {
            let (range, behind) = &pieces[next?];
            next = *behind;
            Some(range.clone())
        })
    }
}

/// Whether it is one of many alike: TCP with nothing but an acknowledgement, push, end or ECN; UDP with a checksum and
/// a length that is the packet's.
fn is_plain(packet: &[u8], headers: &Headers) -> bool {
    let at = headers.at;
    if headers.is_tcp() {
        let rest = packet[at + 13] & !(ENDS | flags::ECE | flags::CWR);
        return rest == flags::ACK;
    }
    let length = usize::from(u16::from_be_bytes([packet[at + 4], packet[at + 5]]));
    length == packet.len() - at && packet[at + 6..at + 8] != [0, 0]
}

/// Whether a complete transport checksum is right. A super-packet gets a new one, which must not cover up damage.
fn is_intact(packet: &[u8], headers: &Headers) -> bool {
    let transport = &packet[headers.at..];
    headers.pseudo(packet).and(transport.len() as u16).over(transport).fold() == 0xffff
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Flags that only the last segment may have.
const ENDS: u8 = flags::PSH | flags::FIN;
/// Newest runs that are looked through for a packet's flow.
const LOOK_BACK: usize = 8;
/// Segments in one super-packet: what the kernel's own UDP segmentation takes (`UDP_MAX_SEGMENTS`, since 6.9).
pub const MAX_SEGMENTS: usize = 128;
const IPV6_LEN: usize = 40;
