//! One control link: what it still has to be told, and how much of it may be on the way.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{buffer::SendBuffer, dial::Target, replica::Replica};
use crate::types::{Incarnation, PeerName};
use std::{
    fmt,
    time::{Duration, Instant},
};
use weft_proto::mesh::Items;

/// Names a link of this agent; the task that owns the sockets draws them, each once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

#[derive(Debug)]
pub struct Link {
    /// Whom we called; `None` if they called us.
    pub dialled: Option<Target>,
    /// The other end's address, for display.
    pub remote: String,
    /// Whom the other end's certificate names; `None`: the link is in clear.
    pub certified: Option<Vec<PeerName>>,
    pub opened: Instant,
    /// Who the other end is, once it said hello.
    pub peer: Option<(PeerName, Incarnation)>,
    /// There is another link with the same agent, which came before this one.
    pub double: bool,
    pub buffer: SendBuffer,
    /// The other side has told all that it has.
    pub synced: bool,
    begun: bool,
    first: FirstExchange,
    in_flight: usize,
    flush_at: Instant,
    compared: Option<Instant>,
}

/// We have yet to tell the other side what it lacks: it is not known, it is in the buffer, it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstExchange {
    Waiting,
    Sending,
    Done,
}

impl Link {
    pub fn new(
        dialled: Option<Target>,
        remote: String,
        certified: Option<Vec<PeerName>>,
        now: Instant,
    ) -> Self {
        Self {
            dialled,
            remote,
            certified,
            opened: now,
            peer: None,
            double: false,
            buffer: SendBuffer::default(),
            synced: false,
            begun: false,
            first: FirstExchange::Waiting,
            in_flight: 0,
            flush_at: now,
            compared: None,
        }
    }

    /// The other end is welcome.
    pub fn welcome(&mut self, name: PeerName, incarnation: Incarnation) {
        self.peer = Some((name, incarnation));
    }

    /// Whether it is on us to begin the first comparison of replicas, which shows what either side lacks: then we do.
    pub fn begins(&mut self) -> bool {
        self.dialled.is_some() && self.peer.is_some() && !std::mem::replace(&mut self.begun, true)
    }

    /// Whether there is something to do about it that is done once: it has not said hello, it is a double, or it is on us to begin
    /// the first comparison.
    pub fn is_new(&self) -> bool {
        self.peer.is_none() || self.double || self.dialled.is_some() && !self.begun
    }

    /// All that the other side lacks is in the buffer now.
    pub fn tells_all(&mut self) {
        self.first = FirstExchange::Sending;
    }

    /// The other side has told all that it has. It knows by comparison what we have, so if it has not asked for anything
    /// it lacks nothing.
    pub fn told_all(&mut self) {
        self.synced = true;
        if self.first == FirstExchange::Waiting {
            self.first = FirstExchange::Done;
        }
    }

    pub fn name(&self) -> Option<&PeerName> {
        self.peer.as_ref().map(|(name, _)| name)
    }

    /// Both sides have told each other all they had.
    pub fn exchanged(&self) -> bool {
        self.synced && self.first == FirstExchange::Done
    }

    /// The next frame of items, if there is something to tell and room on the way.
    pub fn flush(&mut self, replica: &Replica, now: Instant) -> Option<Items> {
        if !self.wants_flush() || now < self.flush_at {
            return None;
        }
        let items: Vec<_> = self.buffer.take(replica, FRAME_BYTES).into_iter().map(Into::into).collect();
        let complete = self.first == FirstExchange::Sending && self.buffer.is_empty();
        if complete {
            self.first = FirstExchange::Done;
        }
        if self.buffer.is_empty() {
            self.flush_at = now + (PACE * items.len() as u32).clamp(MERGE, MAX_MERGE);
        }
        Some(Items { items, complete })
    }

    /// When to flush again, if not right after a frame has left.
    pub fn next_wake(&self) -> Option<Instant> {
        match self.peer {
            None => Some(self.opened + GREETING),
            Some(_) => self.wants_flush().then_some(self.flush_at),
        }
    }

    /// The other end has said nothing for too long.
    pub fn silent(&self, now: Instant) -> bool {
        self.peer.is_none() && now >= self.opened + GREETING
    }

    pub fn sent(&mut self) {
        self.in_flight += 1;
    }

    pub fn left(&mut self, frames: usize) {
        self.in_flight = self.in_flight.saturating_sub(frames);
    }

    /// Whether one more unicast may be sent; else it is dropped, and repeated by who needs it.
    pub fn has_room(&self) -> bool {
        self.in_flight < QUEUE_FRAMES - 2
    }

    /// Whether it is a time to compare replicas: not while there is much on the way.
    pub fn is_calm(&self) -> bool {
        self.peer.is_some() && self.in_flight < WINDOW
    }

    /// Nothing is left to tell, and all has left.
    pub fn idle(&self) -> bool {
        self.peer.is_none() || self.buffer.is_empty() && self.in_flight == 0
    }

    /// Whether a digest of the other end is to be answered: comparing takes work, so not too often.
    pub fn may_compare(&mut self, now: Instant) -> bool {
        let may = self.compared.is_none_or(|at| now >= at + COMPARE_PAUSE);
        if may {
            self.compared = Some(now);
        }
        may
    }

    fn wants_flush(&self) -> bool {
        let something = !self.buffer.is_empty() || self.first == FirstExchange::Sending;
        self.peer.is_some() && something && self.in_flight < WINDOW
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Frames of a link that may wait for the network: `WINDOW` of items, the rest short ones. The last two places are
/// for the hello and the refusal.
pub const QUEUE_FRAMES: usize = 32;
/// Frames of items on the way at a time; with more, a slow reader would be told old news.
const WINDOW: usize = 4;
/// Bytes of items in one frame, but for a single larger item.
const FRAME_BYTES: usize = 128 << 10;
/// News within this time of the last are told together, and within so much for each of those that were told then: where
/// there is much, what comes to both ends by other ways meanwhile needs not be told.
const MERGE: Duration = Duration::from_millis(10);
const PACE: Duration = Duration::from_millis(1);
const MAX_MERGE: Duration = Duration::from_millis(200);
/// How long the other end may take to say hello.
const GREETING: Duration = Duration::from_secs(2);
/// Digests of one link are answered no more often.
const COMPARE_PAUSE: Duration = Duration::from_millis(100);
