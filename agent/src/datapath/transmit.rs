//! The way out: from a TUN queue to the underlay. The steps are listed in worker.rs.

use super::{
    counters::Drop,
    header::{CLEAR_LEN, Envelope, Header, SEALED_LEN},
    icmp::{self, Bucket, Problem},
    offload::{
        MAX_PACKET,
        headers::Headers,
        split::{Shape, Split, complete},
        virtio::{Gso, VIRTIO_LEN, Virtio},
    },
    pace::Load,
    packet::Packet,
    pending::Pending,
    relay::{PREFIX_LEN, Prefix},
    seal::TAG_LEN,
    session_task::Requests,
    sessions::Sending,
    table::{Home, Table},
    verdict::{self, Refusal, Route},
    worker::Shift,
};
use crate::{
    linux::{
        tun::Queue,
        udp::{MAX_MESSAGE, MAX_SEGMENTS, Outgoing, ROOM, Report, Target},
    },
    types::{CLEAR_OVERHEAD, DataId, IPV6_EXTRA, PeerName, SEALED_OVERHEAD},
};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::{
    io::{IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

pub(super) struct Transmitter {
    outgoing: Outgoing,
    around: Around,
    /// How the next super-packet will probably lie.
    foreseen: Shape,
    /// Packets that may come alone before none is foreseen any more.
    patience: u32,
    narrow: Vec<Narrow>,
    answers: Answers,
    /// What waits for a key.
    pending: Pending,
    requests: Option<Requests>,
    /// Whose key was asked for in this batch.
    wanted: Option<u32>,
}

/// Room around each inner packet, in bytes, and what the outer headers make of it.
#[derive(Clone, Copy)]
struct Around {
    front: usize,
    back: usize,
    overhead: u16,
}

/// What is put around the packets of one flow.
struct Wrap<'a> {
    /// For the relay.
    prefix: Option<[u8; PREFIX_LEN]>,
    cover: Cover<'a>,
}

enum Cover<'a> {
    Clear(DataId),
    /// The next counter, and the key.
    Sealed(u64, &'a Sending),
}

/// A path that takes less than the table says.
struct Narrow {
    peer: u32,
    mtu: u16,
    until: Instant,
}

impl Transmitter {
    /// Seals if it is told whom to ask for keys.
    pub(super) fn new(requests: Option<Requests>) -> Self {
        let around = if requests.is_some() { SEALED } else { CLEAR };
        Self {
            outgoing: Outgoing::new(),
            around,
            foreseen: around.whole(),
            patience: 0,
            narrow: Vec::new(),
            answers: Answers::new(),
            pending: Pending::default(),
            requests,
            wanted: None,
        }
    }

    /// The peers' places changed.
    pub(super) fn forget_peers(&mut self) {
        self.narrow.clear();
    }

    /// Takes packets from a TUN queue until none waits or a batch is full, and sends what has a way.
    ///
    /// # Errors
    /// What the TUN says, but for `EAGAIN`.
    pub(super) fn batch(&mut self, shift: &Shift<'_>, queue: usize) -> Result<Load, Errno> {
        if !self.narrow.is_empty() {
            let now = Instant::now();
            self.narrow.retain(|narrow| narrow.until > now);
        }
        self.wanted = None;
        if self.waits() {
            // What waits for a key that there is now goes before what comes: it may be of one flow.
            self.resume(shift);
        }
        let mut result = Ok(());
        let mut load = Load::default();
        for _ in 0..PACKETS {
            if load.bytes >= BYTES {
                break;
            }
            if !self.outgoing.has_room() {
                self.flush(shift);
            }
            match self.read(&shift.queues[queue]) {
                Ok((virtio, len)) => {
                    let gso = virtio.and_then(|virtio| virtio.gso);
                    let datagrams = gso.map_or(1, |gso| len / usize::from(gso.size).max(1));
                    load += Load { datagrams, bytes: len };
                    self.take(shift, virtio, len);
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    result = Err(errno);
                    break;
                }
            }
        }
        self.flush(shift);
        result.map(|()| load)
    }

    /// Whether packets wait for a key.
    pub(super) fn waits(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends what has waited for the keys that there are now, and gives up what has waited for too long.
    pub(super) fn resume(&mut self, shift: &Shift<'_>) {
        shift.dropped(Drop::NoSession, self.pending.expire(Instant::now()));
        let known = |peer: &PeerName| shift.sessions.is_some_and(|sessions| sessions.sending(peer).is_some());
        for packet in self.pending.take(known).into_iter().flat_map(|(_, packets)| packets) {
            let Some((virtio, bytes)) = packet.split_first_chunk() else { continue };
            if !self.outgoing.has_room() {
                self.flush(shift);
            }
            self.foreseen = self.around.whole();
            self.outgoing.room()[self.around.front..][..bytes.len()].copy_from_slice(bytes);
            self.take(shift, Virtio::decode(virtio), bytes.len());
        }
        self.flush(shift);
    }

    /// Keeps the packet that lies in one piece at the room's beginning until there is a key for its peer.
    fn wait(&mut self, shift: &Shift<'_>, virtio: &Virtio, len: usize, peer: u32) {
        let name = &shift.table.peers()[peer as usize].name;
        let packet = &self.outgoing.room()[self.around.front..][..len];
        if !self.pending.push(name, &[&virtio.encode()[..], packet].concat(), Instant::now()) {
            shift.dropped(Drop::NoSession, 1);
        }
        if let Some(requests) = &self.requests
            && self.wanted != Some(peer)
        {
            // If it is not taken, the next packet asks again.
            requests.wanted(name);
            self.wanted = Some(peer);
        }
    }

    /// Reads a packet into the room, as it is foreseen to lie.
    fn read(&mut self, queue: &Queue) -> Result<(Option<Virtio>, usize), Errno> {
        let mut virtio = [0; VIRTIO_LEN];
        let mut parts = ArrayVec::<_, PLACES>::new();
        parts.push(IoSliceMut::new(&mut virtio));
        parts.extend(self.foreseen.places(self.outgoing.room(), MAX_PACKET).map(IoSliceMut::new));
        let len = queue.read(&mut parts)?;
        drop(parts);
        Ok((Virtio::decode(&virtio), len.saturating_sub(VIRTIO_LEN)))
    }

    fn take(&mut self, shift: &Shift<'_>, virtio: Option<Virtio>, len: usize) {
        match virtio {
            Some(virtio) => match virtio.gso {
                Some(gso) => self.super_packet(shift, &virtio, gso, len),
                None => self.packet(shift, &virtio, len),
            },
            None => shift.dropped(Drop::Malformed, 1),
        }
    }

    fn packet(&mut self, shift: &Shift<'_>, virtio: &Virtio, len: usize) {
        let Around { front, back, .. } = self.around;
        let foreseen = self.foreseen;
        self.patience = self.patience.saturating_sub(1);
        if self.patience == 0 {
            self.foreseen = self.around.whole();
        }
        let room = self.outgoing.room();
        foreseen.gather(room, len);
        let bytes = &mut room[front..front + len];
        let Some(packet) = Packet::parse(bytes) else { return shift.dropped(Drop::Malformed, 1) };
        let Some(partial) = keep_or_complete(virtio, bytes) else { return shift.dropped(Drop::Malformed, 1) };
        let route = match verdict::outward(shift.table, &packet, len, narrow(&self.narrow)) {
            Ok(route) => route,
            Err(refusal) => return self.answers.refuse(shift, refusal, &packet, bytes),
        };
        let flow = packet.flow(bytes);
        let target = target(shift, route, flow);
        let Some(mut wrap) = Wrap::new(shift, route, &target, 1) else {
            return self.wait(shift, &if partial { *virtio } else { Virtio::default() }, len, route.peer);
        };
        let prefix = wrap.prefix_len();
        if prefix > 0 {
            room.copy_within(front..front + len, front + prefix);
        }
        let len = prefix + front + len + back;
        wrap.put(partial, flow, &mut room[..len]);
        self.outgoing.push(target, len, len);
    }

    fn super_packet(&mut self, shift: &Shift<'_>, virtio: &Virtio, gso: Gso, len: usize) {
        let Around { front, back, .. } = self.around;
        let room = self.outgoing.room();
        let head = &room[front..front + len.min(self.foreseen.headers + self.foreseen.payload)];
        let split = Split::new(virtio, gso, head, len, (front, back));
        let (Some(split), Some(packet)) = (split, Packet::parse_head(head, len)) else {
            return shift.dropped(Drop::Malformed, 1);
        };
        let (shape, segments) = (split.shape(), split.segments());
        if segments * (shape.stride() + PREFIX_LEN) > ROOM {
            return shift.dropped(Drop::Malformed, segments);
        }
        let route = match verdict::outward(shift.table, &packet, split.largest(len), narrow(&self.narrow)) {
            Ok(route) => route,
            Err(refusal) => return self.answers.refuse(shift, refusal, &packet, head),
        };
        let flow = packet.flow(head);
        let target = target(shift, route, flow);
        let Some(mut wrap) = Wrap::new(shift, route, &target, segments) else {
            self.foreseen.gather(room, len);
            return self.wait(shift, virtio, len, route.peer);
        };
        let prefix = wrap.prefix_len();
        // Nobody foresees a relay: its prefix costs a copy.
        let (foreseen, shape) = (shape, Shape { front: shape.front + prefix, ..shape });
        if shape != self.foreseen {
            self.foreseen.gather(room, len);
            if prefix > 0 {
                room.copy_within(front..front + len, shape.front);
            }
            shape.spread(room, len);
        }
        let total = segments * (shape.front + shape.headers + back) + len - shape.headers;
        for (segment, datagram) in room[..total].chunks_mut(shape.stride()).enumerate() {
            let end = datagram.len() - back;
            split.write(segment, &mut datagram[shape.front..end]);
            wrap.put(split.is_partial(), flow, datagram);
        }
        // In as few messages as may be, equally long: a short last one would cost as much as a long one.
        let most = (MAX_MESSAGE / shape.stride()).clamp(1, MAX_SEGMENTS);
        let each = segments.div_ceil(segments.div_ceil(most)) * shape.stride();
        for start in (0..total).step_by(each) {
            self.outgoing.push(target, each.min(total - start), shape.stride());
        }
        self.foresee(foreseen);
        self.flush(shift);
    }

    fn foresee(&mut self, shape: Shape) {
        self.foreseen = if shape.segments(MAX_PACKET) < PLACES { shape } else { self.around.whole() };
        self.patience = PATIENCE;
    }

    /// Where datagrams are collected that only pass through. Empty between batches, and to be sent by who fills it.
    pub(super) fn outgoing(&mut self) -> &mut Outgoing {
        &mut self.outgoing
    }

    /// Sends the batch. What the kernel does not take is dropped: waiting for room would stall the way in and the other
    /// lanes, and a sender learns of a loss sooner than of a queue.
    fn flush(&mut self, shift: &Shift<'_>) {
        if self.outgoing.is_empty() {
            return;
        }
        let Self { outgoing, narrow, around, .. } = self;
        let relayed = |peer| shift.table.peers()[peer as usize].relay.is_some();
        let prefix_len = |peer| if relayed(peer) { PREFIX_LEN } else { 0 };
        outgoing.send(shift.lanes, |Report { target, datagrams, bytes, result }| match result {
            Ok(()) => {
                let around = around.front + around.back + prefix_len(target.peer);
                shift.sent(target.peer, datagrams, bytes - datagrams * around);
            }
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => {
                shift.dropped(Drop::SendBufferFull, datagrams)
            }
            Err(Errno::EMSGSIZE) => {
                shift.dropped(Drop::TooBig, datagrams);
                // The next one is answered before it is sent.
                if let Ok(path) = shift.lanes[usize::from(target.lane)].path_mtu(target.to) {
                    narrow.retain(|narrow| narrow.peer != target.peer);
                    let path = path.saturating_sub(prefix_len(target.peer));
                    let (mtu, until) = (around.inner_mtu(path, target.to), Instant::now() + NARROW_FOR);
                    narrow.push(Narrow { peer: target.peer, mtu, until });
                }
            }
            Err(_) => shift.dropped(Drop::SendRefused, datagrams),
        });
    }
}

impl Around {
    /// A packet in one piece.
    fn whole(&self) -> Shape {
        Shape { front: self.front, headers: 0, payload: MAX_PACKET, back: self.back }
    }

    /// What an underlay path of `path` bytes leaves for an inner packet.
    fn inner_mtu(&self, path: usize, endpoint: SocketAddr) -> u16 {
        let largest = u16::try_from(path).unwrap_or(u16::MAX);
        let extra = if endpoint.ip().to_canonical().is_ipv6() { IPV6_EXTRA } else { 0 };
        largest.saturating_sub(self.overhead + extra)
    }
}

impl<'a> Wrap<'a> {
    /// None while no key is agreed with the peer.
    fn new(shift: &Shift<'a>, route: Route, target: &Target, datagrams: usize) -> Option<Self> {
        let cover = match shift.sessions {
            None => Cover::Clear(shift.table.me()),
            Some(_) => {
                let sending = &*shift.way(target.peer)?.sending;
                let counter = sending.take(shift.first_lane + target.lane, datagrams as u64).ok()?;
                Cover::Sealed(u64::from_be_bytes(counter.encode()), sending)
            }
        };
        let prefix =
            || Prefix::new(shift.table.me(), shift.table.peers()[route.peer as usize].data_id).encode();
        Some(Self { prefix: route.relayed.then(prefix), cover })
    }

    fn prefix_len(&self) -> usize {
        self.prefix.map_or(0, |prefix| prefix.len())
    }

    /// Puts a header before the inner packet that `datagram` has room around, and seals it.
    fn put(&mut self, partial: bool, flow: u16, mut datagram: &mut [u8]) {
        if let Some(prefix) = &self.prefix {
            let (front, rest) = datagram.split_first_chunk_mut().expect("room for a prefix");
            *front = *prefix;
            datagram = rest;
        }
        match &mut self.cover {
            Cover::Clear(me) => {
                Header { partial, flow, envelope: Envelope::Clear { sender: *me } }.write(datagram);
            }
            Cover::Sealed(counter, sending) => {
                let envelope = Envelope::Sealed { index: sending.index(), counter: *counter };
                Header { partial, flow, envelope }.write(datagram);
                *counter += 1;
                let (header, rest) = datagram.split_first_chunk_mut().expect("room for a header");
                let (inner, tag) = rest.split_last_chunk_mut().expect("room for a tag");
                sending.key().seal(header, inner, tag);
            }
        }
    }
}

fn target(shift: &Shift<'_>, route: Route, flow: u16) -> Target {
    // The receiver picks its worker by the number as a whole.
    let lane = usize::from(flow >> 8) % shift.lanes.len();
    // Where it is is known better than where its record says that it is.
    let way = shift.way(route.peer).filter(|_| !route.relayed);
    let to = way.and_then(|way| way.to).unwrap_or(route.to);
    Target { peer: route.peer, to, lane: lane as u8 }
}

fn narrow(known: &[Narrow]) -> impl Fn(u32) -> Option<u16> {
    move |peer| known.iter().find(|narrow| narrow.peer == peer).map(|narrow| narrow.mtu)
}

/// Whether the packet's checksum is partial on the wire; completes it where the other end would not find it. None if
/// the kernel's account of it does not fit the packet.
fn keep_or_complete(virtio: &Virtio, packet: &mut [u8]) -> Option<bool> {
    match virtio.partial {
        None => Some(false),
        Some(place) if Headers::plain(packet).is_some_and(|headers| headers.checksum() == place) => {
            Some(true)
        }
        Some(place) => complete(packet, place).then_some(false),
    }
}

/// ICMP errors to those who live here. Each kind has its own limit: a scan of empty addresses must not keep a flow
/// from learning its MTU.
struct Answers {
    unreachable: Bucket,
    too_big: Bucket,
    buffer: Vec<u8>,
}

impl Answers {
    fn new() -> Self {
        let bucket = || Bucket::new(ICMP_INTERVAL, ICMP_BURST);
        Self { unreachable: bucket(), too_big: bucket(), buffer: Vec::with_capacity(icmp::LARGEST_V6) }
    }

    /// Counts a packet that goes nowhere, and tells its sender where that is called for.
    fn refuse(&mut self, shift: &Shift<'_>, refusal: Refusal, packet: &Packet, bytes: &[u8]) {
        shift.dropped(refusal.drop, 1);
        let Some(problem) = refusal.answer else { return };
        let Some(from) = self.grant(problem, packet, shift.table) else { return };
        if !icmp::answer(problem, packet, bytes, from, &mut self.buffer) {
            return;
        }
        let plain = Virtio::default().encode();
        match shift.queues[0].write(&[IoSlice::new(&plain), IoSlice::new(&self.buffer)]) {
            Ok(()) => shift.answered(),
            Err(_) => shift.dropped(Drop::TunWrite, 1),
        }
    }

    /// Whether the sender of `packet` is to be told now, and if so from which address of ours.
    fn grant(&mut self, problem: Problem, packet: &Packet, table: &Table) -> Option<IpAddr> {
        let from = match packet.source {
            IpAddr::V4(_) => table.bridge_v4().map(IpAddr::from),
            IpAddr::V6(_) => table.bridge_v6().map(IpAddr::from),
        }?;
        let bucket = match problem {
            Problem::Unreachable => &mut self.unreachable,
            Problem::TooBig { .. } => &mut self.too_big,
        };
        (table.home(packet.source) == Home::Local && bucket.take(Instant::now())).then_some(from)
    }
}

const CLEAR: Around = Around { front: CLEAR_LEN, back: 0, overhead: CLEAR_OVERHEAD };
const SEALED: Around = Around { front: SEALED_LEN, back: TAG_LEN, overhead: SEALED_OVERHEAD };
/// Packets in one batch, and bytes after which it is over: then the way in has its turn, and acknowledgements theirs.
const PACKETS: usize = 64;
const BYTES: usize = 256 << 10;
/// Places that a read is scattered to, at most, with the virtio header's.
const PLACES: usize = 72;
/// Packets that come alone between super-packets, as acknowledgements do, before it is worth to foresee none.
const PATIENCE: u32 = 16;
/// How long a path is believed to be narrow: then a packet is lost to see whether it still is.
const NARROW_FOR: Duration = Duration::from_secs(10);
/// One ICMP error of a kind each so often, for each worker: a hundred a second.
const ICMP_INTERVAL: Duration = Duration::from_millis(10);
/// So many at once.
const ICMP_BURST: u32 = 50;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_headers_are_taken_off_a_path() {
        let v4 = SocketAddr::from(([192, 0, 2, 1], 1));
        let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:1".parse().unwrap();
        assert_eq!(CLEAR.inner_mtu(1500, v4), 1464);
        assert_eq!(CLEAR.inner_mtu(1500, v6), 1444);
        assert_eq!(CLEAR.inner_mtu(1500, mapped), 1464);
        assert_eq!(CLEAR.inner_mtu(65_536, v4), 65_499, "loopback's MTU is more than IP has");
        assert_eq!(CLEAR.inner_mtu(0, v4), 0);
    }
}
