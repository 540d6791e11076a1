//! From a super-packet to its segments, in the send buffer and without a copy where its shape was foreseen.
//!
//! ```text
//!   read scattered:  │ front │headers│payload 0│ back │ front │       │payload 1│ back │ front …
//!   headers written: │ front │headers│payload 0│ back │ front │headers│payload 1│ back │ front …
//!                    └────────── stride ──────────────┘
//! ```
//!
//! `front` and `back` are the room that each datagram's own header and tag take. A super-packet whose shape was
//! foreseen wrongly is gathered and spread again, at the cost of a copy or two.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    checksum::Sum,
    headers::{Headers, flags},
    virtio::{Gso, Kind, Place, Virtio},
};

/// How a super-packet lies in the buffer: sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub front: usize,
    pub headers: usize,
    /// Payload of each segment but the last.
    pub payload: usize,
    pub back: usize,
}

impl Shape {
    /// From one datagram's beginning to the next one's.
    pub fn stride(&self) -> usize {
        self.front + self.headers + self.payload + self.back
    }

    /// How many segments a packet of `len` bytes has.
    pub fn segments(&self, len: usize) -> usize {
        len.saturating_sub(self.headers).div_ceil(self.payload).max(1)
    }

    /// The places in the buffer of a packet's bytes, in order: the headers with the first payload, then each further
    /// payload, for a packet of up to `len` bytes.
    pub fn places<'a>(&self, buffer: &'a mut [u8], len: usize) -> impl Iterator<Item = &'a mut [u8]> {
        let Self { front, headers, payload, back } = *self;
        let (_, mut rest) = buffer.split_at_mut(front);
        (0..self.segments(len)).map(move |segment| {
            let (size, gap) = match segment {
                0 => (headers + payload, back + front + headers),
                _ => (payload, back + front + headers),
            };
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(size);
            rest = behind.get_mut(gap..).unwrap_or_default();
            place
        })
    }

    /// Makes a packet of `len` bytes that lies in this shape lie in one piece behind `front`.
    pub fn gather(&self, buffer: &mut [u8], len: usize) {
        for segment in 1..self.segments(len) {
            let (apart, together, size) = self.segment(segment, len);
            buffer.copy_within(apart..apart + size, together);
        }
    }

    /// Makes a packet of `len` bytes that lies in one piece behind `front` lie in this shape.
    pub fn spread(&self, buffer: &mut [u8], len: usize) {
        for segment in (1..self.segments(len)).rev() {
            let (apart, together, size) = self.segment(segment, len);
            buffer.copy_within(together..together + size, apart);
        }
    }

    /// Where a segment's payload lies in this shape, where in one piece, and its size.
    fn segment(&self, segment: usize, len: usize) -> (usize, usize, usize) {
        let before = self.headers + segment * self.payload;
        let apart = self.front + segment * self.stride() + self.headers;
        (apart, self.front + before, self.payload.min(len - before))
    }
}

/// Writes the headers of a super-packet's segments.
pub struct Split {
    headers: Headers,
    /// The super-packet's own headers.
    template: [u8; MAX_HEADERS],
    shape: Shape,
    segments: usize,
    partial: bool,
    pseudo: Sum,
    /// The IPv4 header's sum, without the fields that differ.
    ip: Sum,
}

impl Split {
    /// Takes the super-packet's headers from its first bytes; `len` bytes is the whole of it. None if the kernel's
    /// account of it does not fit the bytes.
    pub fn new(
        virtio: &Virtio,
        gso: Gso,
        head: &[u8],
        len: usize,
        (front, back): (usize, usize),
    ) -> Option<Self> {
        let at = usize::from(virtio.partial?.start);
        let version = head.first()? >> 4;
        let least = match (gso.kind, version) {
            (Kind::TcpV4 | Kind::Udp, 4) => usize::from(head[0] & 0x0f) * 4,
            (Kind::TcpV6 | Kind::Udp, 6) => 40,
            _ => return None,
        };
        let headers = Headers::behind(head, gso.kind, at)?;
        if gso.size == 0 || least < 20 || at < least || headers.len > MAX_HEADERS || len <= headers.len {
            return None;
        }
        let shape = Shape { front, headers: headers.len, payload: gso.size.into(), back };
        let mut template = [0; MAX_HEADERS];
        template[..headers.len].copy_from_slice(&head[..headers.len]);
        let ip = match version {
            4 => Sum::default().over(&template[..2]).over(&template[6..10]).over(&template[12..least]),
            _ => Sum::default(),
        };
        let pseudo = headers.pseudo(&template);
        let partial = Headers::plain(&template[..headers.len]) == Some(headers);
        Some(Self { headers, template, shape, segments: shape.segments(len), partial, pseudo, ip })
    }

    /// Whether the segments' transport checksums are left partial: where the other end will find them.
    pub fn is_partial(&self) -> bool {
        self.partial
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn segments(&self) -> usize {
        self.segments
    }

    /// Bytes of the largest segment.
    pub fn largest(&self, len: usize) -> usize {
        len.min(self.shape.headers + self.shape.payload)
    }

    /// Writes the headers of one segment into `packet`, which ends with its payload.
    pub fn write(&self, segment: usize, packet: &mut [u8]) {
        let Headers { at, len, .. } = self.headers;
        let total = packet.len();
        packet[..len].copy_from_slice(&self.template[..len]);
        if packet[0] >> 4 == 4 {
            let id = u16_at(packet, 4).wrapping_add(segment as u16);
            put(packet, 2, total as u16);
            put(packet, 4, id);
            put(packet, 10, self.ip.and(total as u16).and(id).checksum());
        } else {
            put(packet, 4, (total - IPV6_LEN) as u16);
        }
        if self.headers.is_tcp() {
            let sequence =
                u32::from_be_bytes([packet[at + 4], packet[at + 5], packet[at + 6], packet[at + 7]]);
            let sequence = sequence.wrapping_add((segment * self.shape.payload) as u32);
            packet[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
            if segment > 0 {
                packet[at + 13] &= !flags::CWR;
            }
            if segment + 1 < self.segments {
                packet[at + 13] &= !(flags::PSH | flags::FIN);
            }
        } else {
            put(packet, at + 4, (total - at) as u16);
        }
        let pseudo = self.pseudo.and((total - at) as u16).fold();
        put(packet, self.headers.checksum_at(), pseudo);
        if !self.partial {
            complete(packet, self.headers.checksum());
        }
    }
}

/// Completes a partial checksum: over the bytes from its start on, with the pseudo-header's sum in its field. False,
/// and nothing is done, if it lies outside the packet.
pub fn complete(packet: &mut [u8], place: Place) -> bool {
    let (start, at) = (usize::from(place.start), usize::from(place.start) + usize::from(place.offset));
    if at + 2 > packet.len() {
        return false;
    }
    let checksum = match Sum::default().over(&packet[start..]).checksum() {
        // Zero means none to UDP (RFC 768), and the same number to all others.
        0 => 0xffff,
        checksum => checksum,
    };
    put(packet, at, checksum);
    true
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Room for the longest headers that are split: IPv6 with extensions and TCP with all its options.
pub const MAX_HEADERS: usize = 256;
const IPV6_LEN: usize = 40;
