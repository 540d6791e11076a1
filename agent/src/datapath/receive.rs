//! The way in: from the underlay to a TUN queue. The steps are listed in worker.rs.

use super::{
    counters::Drop,
    header::{Envelope, Header},
    offload::coalesce::{Coalescer, MAX_SEGMENTS, Takes},
    verdict::Gate,
    worker::Shift,
};
use crate::linux::udp::{BATCH, Incoming, Message};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use std::io::IoSlice;

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

    /// Takes a batch from one lane and hands in what may come in. False if none waited.
    ///
    /// # Errors
    /// `EBADFD` when the TUN device is gone; else what the socket says.
    pub(super) fn batch(&mut self, shift: &Shift<'_>, lane: usize) -> Result<bool, Errno> {
        let received = match self.incoming.receive(&shift.lanes[lane], self.most) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            Err(errno) => return Err(errno),
        };
        let mut gate = Gate::new(shift.table);
        let mut merged = false;
        for at in 0..received {
            let Message { range, segment } = self.incoming.message(at);
            merged |= range.len() > segment;
            for start in range.clone().step_by(segment) {
                let datagram = start..(start + segment).min(range.end);
                self.datagram(shift, &mut gate, datagram);
            }
        }
        // Large messages in few buffers stay in the cache; many small ones need not.
        if merged {
            self.most = FEW;
        } else if received == self.most {
            self.most = BATCH;
        }
        self.hand_in(shift)?;
        Ok(true)
    }

    fn datagram(&mut self, shift: &Shift<'_>, gate: &mut Gate<'_>, place: std::ops::Range<usize>) {
        let buffer = self.incoming.buffer();
        let admitted = Header::decode(&buffer[place.clone()]).map_err(Drop::from).and_then(|header| {
            let inner = place.start + header.len()..place.end;
            match header.envelope {
                Envelope::Clear { sender } => {
                    let peer = gate.admit(sender, &buffer[inner.clone()], header.partial)?;
                    Ok((inner, header.partial, peer))
                }
                Envelope::Sealed { .. } => Err(Drop::UnknownKind),
            }
        });
        match admitted {
            Ok((inner, partial, peer)) => self.coalescer.push(buffer, inner, partial, peer),
            Err(drop) => shift.dropped(drop, 1),
        }
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

/// Messages in one system call while they are large.
const FEW: usize = 4;
