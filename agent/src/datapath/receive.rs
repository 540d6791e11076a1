//! The way in: from the underlay to a TUN queue. The steps are listed in worker.rs.

use super::{
    counters::Drop,
    handshake::message,
    header::{CLEAR_LEN, Envelope, Header, SEALED_LEN},
    offload::coalesce::{Coalescer, MAX_SEGMENTS, Takes},
    pace::Load,
    relay::{self, PREFIX_LEN, Prefix, RELAYED, Verdict},
    session_task::{Requests, canonical},
    sessions::{OpenError, Opener},
    verdict::{Gate, Sender},
    worker::Shift,
};
use crate::{
    linux::udp::{BATCH, Incoming, Message, Outgoing, Report, Target},
    types::SessionIndex,
};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::{io::IoSlice, net::SocketAddr, ops::Range, time::Instant};

pub(super) struct Receiver {
    incoming: Incoming,
    coalescer: Coalescer,
    /// The flow of each run of the coalescer's.
    flows: Vec<u16>,
    /// Messages to take with one system call.
    most: usize,
    requests: Option<Requests>,
}

/// An inner packet that may come in.
struct Admitted {
    /// Where in the batch's buffer it is.
    inner: Range<usize>,
    partial: bool,
    flow: u16,
    /// The sending peer's place in the table.
    peer: u32,
}

impl Receiver {
    /// Opens sealed packets if it is told whom to tell of sessions.
    pub(super) fn new(takes: Takes, requests: Option<Requests>) -> Self {
        Self {
            incoming: Incoming::new(),
            coalescer: Coalescer::new(takes),
            flows: Vec::new(),
            most: FEW,
            requests,
        }
    }

    /// Takes a batch from one lane and hands in what may come in.
    ///
    /// # Errors
    /// `EBADFD` when the TUN device is gone; else what the socket says.
    pub(super) fn batch(
        &mut self,
        shift: &Shift<'_>,
        lane: usize,
        onward: &mut Outgoing,
    ) -> Result<Load, Errno> {
        let received = match self.incoming.receive(&shift.lanes[lane], self.most) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Load::default()),
            Err(errno) => return Err(errno),
        };
        let mut gate = Gate::new(shift.table);
        let mut merged = false;
        let mut load = Load::default();
        for at in 0..received {
            let Message { range, segment } = self.incoming.message(at);
            if range.is_empty() {
                shift.dropped(Drop::Malformed, 1);
            }
            merged |= range.len() > segment;
            load += Load { datagrams: range.len().div_ceil(segment), bytes: range.len() };
            let from = self.incoming.source(at).map(canonical);
            let mut opener = None;
            for start in range.clone().step_by(segment) {
                let mut place = start..(start + segment).min(range.end);
                let buffer = self.incoming.buffer();
                let (mut direct, mut origin) = (from, from);
                if buffer[place.start] == RELAYED {
                    match pass_on(shift, lane, from, &mut buffer[place.clone()], onward) {
                        Ok(Passed::On) => continue,
                        // Where it came from is not where its sender is.
                        Ok(Passed::ToUs { sender }) => (direct, origin) = (None, sender),
                        Err(drop) => {
                            shift.dropped(drop, 1);
                            continue;
                        }
                    }
                    place.start += PREFIX_LEN;
                }
                let requests = self.requests.as_mut();
                match admit(shift, &mut gate, &mut opener, requests, direct, buffer, place.clone()) {
                    Ok(Some(Admitted { inner, partial, flow, peer })) => {
                        self.coalescer.push(buffer, inner, partial, peer);
                        self.flows.resize(self.coalescer.len(), flow);
                    }
                    Ok(None) => {}
                    Err(drop) => self.refuse(shift, drop, origin, place),
                }
            }
        }
        flush(shift, onward);
        // Large messages in few buffers stay in the cache; many small ones need not.
        if merged {
            self.most = FEW;
        } else if received == self.most {
            self.most = BATCH;
        }
        self.hand_in(shift).map(|()| load)
    }

    /// Counts a datagram that is no packet for us, unless it is a handshake's.
    fn refuse(&mut self, shift: &Shift<'_>, drop: Drop, origin: Option<SocketAddr>, place: Range<usize>) {
        let datagram = &self.incoming.buffer()[place];
        let drop = match (drop, origin, &mut self.requests) {
            (Drop::UnknownKind, Some(from), Some(requests))
                if message::Message::decode(datagram).is_some() =>
            {
                if requests.message(from, datagram) {
                    return;
                }
                Drop::Handshake
            }
            (Drop::NoSession, Some(from), Some(requests)) => {
                requests.surprised(from, Instant::now());
                drop
            }
            _ => drop,
        };
        shift.dropped(drop, 1);
    }

    /// Writes the batch's packets to the TUN.
    fn hand_in(&mut self, shift: &Shift<'_>) -> Result<(), Errno> {
        let Self { incoming, coalescer, flows, .. } = self;
        let mut result = Ok(());
        for (run, flow) in flows.drain(..).enumerate() {
            let written = coalescer.finish(run, incoming.buffer());
            let buffer = &*incoming.buffer();
            let virtio = written.virtio.encode();
            let mut parts = ArrayVec::<_, { 2 + MAX_SEGMENTS }>::new();
            parts.push(IoSlice::new(&virtio));
            parts.push(IoSlice::new(&buffer[written.head.clone()]));
            parts.extend(written.pieces().map(|piece| IoSlice::new(&buffer[piece])));
            // The kernel hands the flow's other direction to the queue that it was last seen in.
            let queue = &shift.queues[usize::from(flow >> 4) % shift.queues.len()];
            match queue.write(&parts) {
                Ok(()) => shift.received(written.peer, written.packets, written.bytes),
                Err(errno) => {
                    shift.dropped(Drop::TunWrite, written.packets);
                    if errno == Errno::EBADFD {
                        result = Err(errno);
                    }
                }
            }
        }
        coalescer.clear();
        result
    }
}

/// What became of a relayed datagram.
enum Passed {
    On,
    /// It is for us, from who is reached directly at that address, if at any.
    ToUs {
        sender: Option<SocketAddr>,
    },
}

/// Puts a relayed datagram that is not for us where it goes out with the batch.
fn pass_on(
    shift: &Shift<'_>,
    lane: usize,
    from: Option<SocketAddr>,
    datagram: &mut [u8],
    onward: &mut Outgoing,
) -> Result<Passed, Drop> {
    let prefix = Prefix::decode(datagram).ok_or(Drop::Malformed)?;
    let (destination, to) = match prefix.verdict(shift.table, from)? {
        Verdict::Here { source } => {
            return Ok(Passed::ToUs { sender: shift.table.peers()[source as usize].endpoint });
        }
        Verdict::Onward { destination, to } => (destination, to),
    };
    if !onward.has_room() {
        flush(shift, onward);
    }
    relay::count_down(datagram);
    let len = datagram.len();
    onward.room()[..len].copy_from_slice(datagram);
    onward.push(Target { peer: destination, to, lane: lane as u8 }, len, len);
    Ok(Passed::On)
}

fn flush(shift: &Shift<'_>, onward: &mut Outgoing) {
    if onward.is_empty() {
        return;
    }
    onward.send(shift.lanes, |Report { datagrams, bytes, result, .. }| match result {
        Ok(()) => shift.relayed(datagrams, bytes),
        Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => shift.dropped(Drop::SendBufferFull, datagrams),
        Err(Errno::EMSGSIZE) => shift.dropped(Drop::TooBig, datagrams),
        Err(_) => shift.dropped(Drop::SendRefused, datagrams),
    });
}

/// Whether a datagram may come in; none if it is sealed and empty, which only shows that its sender has the key.
fn admit<'a>(
    shift: &Shift<'a>,
    gate: &mut Gate<'a>,
    last: &mut Option<(SessionIndex, Opener<'a>)>,
    requests: Option<&mut Requests>,
    from: Option<SocketAddr>,
    buffer: &mut [u8],
    place: Range<usize>,
) -> Result<Option<Admitted>, Drop> {
    let Header { partial, flow, envelope } = Header::decode(&buffer[place.clone()])?;
    let (sender, inner) = match (envelope, shift.sessions) {
        (Envelope::Clear { sender }, None) => (Sender::Says(sender), place.start + CLEAR_LEN..place.end),
        (Envelope::Sealed { index, .. }, Some(sessions)) => {
            let opener = match last {
                Some((known, opener)) if *known == index => opener,
                // The one before gives its window's lock back first.
                _ => {
                    *last = None;
                    let session = sessions.receiving(index).ok_or(Drop::NoSession)?;
                    &mut last.insert((index, session.opener())).1
                }
            };
            let start = place.start + SEALED_LEN;
            let (header, sealed) = buffer[place].split_first_chunk_mut().ok_or(Drop::Malformed)?;
            let len = opener.open(header, sealed)?;
            let session = opener.session();
            if let Some(requests) = requests {
                if session.confirm() {
                    requests.confirmed(index);
                }
                match from {
                    Some(from) if len == 0 && opener.is_latest() => {
                        requests.shown(index, from, Instant::now());
                    }
                    Some(from) => {
                        if let Some(before) = opener.moved(from)
                            && requests.moved(index, before, from, Instant::now())
                        {
                            opener.settle(from);
                        }
                    }
                    None => {}
                }
            }
            if len == 0 {
                return Ok(None);
            }
            (Sender::Is(session.peer()), start..start + len)
        }
        (Envelope::Clear { .. }, Some(_)) => return Err(Drop::Clear),
        (Envelope::Sealed { .. }, None) => return Err(Drop::Sealed),
    };
    let peer = gate.admit(sender, &buffer[inner.clone()], partial)?;
    Ok(Some(Admitted { inner, partial, flow, peer }))
}

impl From<OpenError> for Drop {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Forged(_) => Self::Forged,
            OpenError::Replayed | OpenError::TooOld => Self::Replayed,
        }
    }
}

/// Messages in one system call while they are large.
const FEW: usize = 4;
