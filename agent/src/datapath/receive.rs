//! The way in: from the underlay to a TUN queue. The steps are listed in worker.rs.

use super::{
    counters::Drop,
    header::{Envelope, Header},
    offload::coalesce::{Coalescer, MAX_SEGMENTS, Takes},
    sessions::{OpenError, Opener},
    verdict::{Gate, Sender},
    worker::Shift,
};
use crate::{
    linux::udp::{BATCH, Incoming, Message},
    types::SessionIndex,
};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::{io::IoSlice, ops::Range};

pub(super) struct Receiver {
    incoming: Incoming,
    coalescer: Coalescer,
    /// Messages to take with one system call.
    most: usize,
}

impl Receiver {
    pub(super) fn new(takes: Takes) -> Self {
        Self { incoming: Incoming::new(), coalescer: Coalescer::new(takes), most: FEW }
    }

    /// Takes a batch from one lane and hands in what may come in.
    ///
    /// # Errors
    /// `EBADFD` when the TUN device is gone; else what the socket says.
    pub(super) fn batch(&mut self, shift: &Shift<'_>, lane: usize) -> Result<(), Errno> {
        let received = match self.incoming.receive(&shift.lanes[lane], self.most) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let mut gate = Gate::new(shift.table);
        let mut merged = false;
        for at in 0..received {
            let Message { range, segment } = self.incoming.message(at);
            if range.is_empty() {
                shift.dropped(Drop::Malformed, 1);
            }
            merged |= range.len() > segment;
            let mut opened = None;
            for start in range.clone().step_by(segment) {
                let place = start..(start + segment).min(range.end);
                let buffer = self.incoming.buffer();
                match admit(shift, &mut gate, &mut opened, buffer, place) {
                    Ok((inner, partial, peer)) => self.coalescer.push(buffer, inner, partial, peer),
                    Err(drop) => shift.dropped(drop, 1),
                }
            }
        }
        // Large messages in few buffers stay in the cache; many small ones need not.
        if merged {
            self.most = FEW;
        } else if received == self.most {
            self.most = BATCH;
        }
        self.hand_in(shift)
    }

    /// Writes the batch's packets to the TUN.
    fn hand_in(&mut self, shift: &Shift<'_>) -> Result<(), Errno> {
        let Self { incoming, coalescer, .. } = self;
        let mut result = Ok(());
        for run in 0..coalescer.len() {
            let written = coalescer.finish(run, incoming.buffer());
            let buffer = &*incoming.buffer();
            let virtio = written.virtio.encode();
            let mut parts = ArrayVec::<_, { 2 + MAX_SEGMENTS }>::new();
            parts.push(IoSlice::new(&virtio));
            parts.push(IoSlice::new(&buffer[written.head.clone()]));
            parts.extend(written.pieces().map(|piece| IoSlice::new(&buffer[piece])));
            match shift.queue.write(&parts) {
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

/// Whether a datagram may come in: gives the inner packet's place, whether its checksum is partial, and its peer.
fn admit<'a>(
    shift: &Shift<'a>,
    gate: &mut Gate<'a>,
    opened: &mut Option<(SessionIndex, Opener<'a>)>,
    buffer: &mut [u8],
    place: Range<usize>,
) -> Result<(Range<usize>, bool, u32), Drop> {
    let header = Header::decode(&buffer[place.clone()])?;
    let start = place.start + header.len();
    let (sender, inner) = match (header.envelope, shift.sessions) {
        (Envelope::Clear { sender }, None) => (Sender::Says(sender), start..place.end),
        (Envelope::Sealed { index, .. }, Some(sessions)) => {
            let opener = match opened {
                Some((last, opener)) if *last == index => opener,
                // The one before gives its window's lock back first.
                _ => {
                    *opened = None;
                    let session = sessions.receiving(index).ok_or(Drop::NoSession)?;
                    &mut opened.insert((index, session.opener())).1
                }
            };
            let (header, sealed) = buffer[place].split_first_chunk_mut().ok_or(Drop::Malformed)?;
            let len = opener.open(header, sealed)?;
            (Sender::Is(opener.peer()), start..start + len)
        }
        (Envelope::Clear { .. }, Some(_)) => return Err(Drop::Clear),
        (Envelope::Sealed { .. }, None) => return Err(Drop::Sealed),
    };
    let peer = gate.admit(sender, &buffer[inner.clone()], header.partial)?;
    Ok((inner, header.partial, peer))
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
