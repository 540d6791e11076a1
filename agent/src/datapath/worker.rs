//! A worker's loop: a thread that owns some queues of the TUN device and some UDP sockets, its lanes.
//!
//! ```text
//!   out:  TUN read, scattered into the slots of its segments      until none waits, or a batch is full
//!           ─▶ parse, verdict::outward: table, size               a refused packet is counted, some are answered by ICMP
//!           ─▶ split: headers of each segment
//!           ─▶ header before each [, seal]
//!         ─▶ sendmmsg, by the lane of its flow, cut by the kernel EMSGSIZE: the next packet is answered by ICMP
//!
//!   in:   recvmmsg, a few large messages or many small ones
//!           ─▶ relayed, and not for us: sent on
//!           ─▶ header [, open], Gate: parse, source check, does the destination live here
//!           ─▶ coalesce
//!         ─▶ TUN writes, one for each run of segments
//! ```
//!
//! The kernel spreads flows over the queues, and they have their turns: what overruns one leaves room in the others.
//!
//! The table is read once per batch. No packet takes a lock or an allocation, none makes the worker wait, and nothing
//! but the device's loss ends it before it is told to stop. After work it looks for more for a while before it sleeps:
//! waking up costs more time than a packet's whole way.

use super::{
    counters::{Counters, Drop, PeerCounters, WorkerCounters},
    offload::coalesce::Takes,
    pace::{Load, Pace},
    receive::Receiver,
    session_task::Sealing,
    sessions::{Sessions, Way},
    table::{Peer, Table},
    transmit::Transmitter,
};
use crate::linux::{
    tun::{Offloads, Queue},
    udp::Socket,
};
use arc_swap::{ArcSwap, Cache};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::EventFd,
    },
};
use std::{
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

pub(super) struct Worker {
    number: usize,
    queues: Vec<Queue>,
    lanes: Vec<Socket>,
    tables: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    counters: Arc<Counters>,
    /// The table's peers, and their counters in the same order.
    peers: Arc<[Peer]>,
    places: Vec<Arc<[PeerCounters]>>,
    keys: Option<Keys>,
    transmitter: Transmitter,
    receiver: Receiver,
    epoll: Epoll,
    stop: Arc<EventFd>,
    pace: Pace,
}

/// The sessions that are in force, and the way to each peer of the table, in its order.
struct Keys {
    sessions: Cache<Arc<ArcSwap<Sessions>>, Arc<Sessions>>,
    /// Becomes readable when there are new ones.
    wake: Arc<EventFd>,
    known: Arc<Sessions>,
    ways: Vec<Option<Way>>,
}

/// What a worker works with during one batch.
pub(super) struct Shift<'a> {
    pub(super) table: &'a Table,
    pub(super) queues: &'a [Queue],
    pub(super) lanes: &'a [Socket],
    /// This worker's first lane among those of all workers.
    pub(super) first_lane: u8,
    /// None where packets go in clear.
    pub(super) sessions: Option<&'a Sessions>,
    ways: &'a [Option<Way>],
    counters: &'a WorkerCounters,
    number: usize,
    places: &'a [Arc<[PeerCounters]>],
}

#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    #[error("the TUN device is gone: someone removed it")]
    TunGone,
    #[error("wait for packets: {0}")]
    Wait(Errno),
}

/// What a worker owns from the start.
pub(super) struct Parts {
    pub(super) number: usize,
    pub(super) queues: Vec<Queue>,
    pub(super) offloads: Offloads,
    pub(super) lanes: Vec<Socket>,
    pub(super) linger: Duration,
    pub(super) sealing: Option<Sealing>,
}

impl Worker {
    /// The worker stops when `stop` becomes readable.
    pub(super) fn new(
        parts: Parts,
        tables: Arc<ArcSwap<Table>>,
        counters: Arc<Counters>,
        stop: Arc<EventFd>,
    ) -> Result<Self, Errno> {
        let Parts { number, queues, offloads, lanes, linger, sealing } = parts;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        for (at, queue) in queues.iter().enumerate() {
            epoll.add(queue, EpollEvent::new(EpollFlags::EPOLLIN, FIRST_QUEUE + at as u64))?;
        }
        for (lane, socket) in lanes.iter().enumerate() {
            epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, FIRST_LANE + lane as u64))?;
        }
        let requests = sealing.as_ref().map(|sealing| sealing.requests.clone());
        let keys = sealing.map(|Sealing { sessions, wakes, .. }| {
            let mut sessions = Cache::new(sessions);
            let known = Arc::clone(sessions.load());
            Keys { sessions, wake: Arc::clone(&wakes[number]), known, ways: Vec::new() }
        });
        if let Some(keys) = &keys {
            epoll.add(&*keys.wake, EpollEvent::new(EpollFlags::EPOLLIN, KEYS))?;
        }
        Ok(Self {
            number,
            queues,
            lanes,
            tables: Cache::new(tables),
            counters,
            peers: Arc::default(),
            places: Vec::new(),
            keys,
            transmitter: Transmitter::new(requests.clone()),
            receiver: Receiver::new(Takes { tcp: true, udp: offloads.udp }, requests),
            epoll,
            stop,
            pace: Pace::new(linger),
        })
    }

    /// Carries packets until it is told to stop. A batch out and a batch in alternate while both have work.
    pub(super) fn run(mut self) -> Result<(), WorkerError> {
        let mut events = [EpollEvent::empty(); 16];
        let mut timeout = EpollTimeout::NONE;
        // Since when there was nothing to do.
        let mut idle: Option<Instant> = None;
        loop {
            let ready = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => continue,
                ready => ready.map_err(WorkerError::Wait)?,
            };
            for event in &events[..ready] {
                let lost = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                match event.data() {
                    STOP => return Ok(()),
                    KEYS => self.resume(),
                    lane @ FIRST_LANE.. => self.receive((lane - FIRST_LANE) as usize)?,
                    _ if lost => return Err(WorkerError::TunGone),
                    queue => self.transmit((queue - FIRST_QUEUE) as usize)?,
                }
            }
            if ready == 0 && timeout != EpollTimeout::ZERO {
                self.resume();
            }
            if ready > 0 {
                idle = None;
                timeout = if self.pace.linger().is_zero() { self.patience() } else { EpollTimeout::ZERO };
            } else if timeout == EpollTimeout::ZERO {
                // Only now: with some clocks, to ask for the time is a system call too.
                match idle.get_or_insert_with(Instant::now).elapsed() < self.pace.linger() {
                    true => thread::yield_now(),
                    false => timeout = self.patience(),
                }
            }
        }
    }

    fn transmit(&mut self, queue: usize) -> Result<(), WorkerError> {
        let table = self.look_up();
        let (shift, transmitter, _) = self.shift(&table);
        let result = transmitter.batch(&shift, queue);
        self.worked(result)
    }

    fn receive(&mut self, lane: usize) -> Result<(), WorkerError> {
        let table = self.look_up();
        let (shift, transmitter, receiver) = self.shift(&table);
        let result = receiver.batch(&shift, lane, transmitter.outgoing());
        self.worked(result)
    }

    /// There are new keys, or packets have waited for some for long.
    fn resume(&mut self) {
        if let Some(keys) = &self.keys {
            // Nothing to read means that only time has passed.
            let _ = keys.wake.read();
        }
        let table = self.look_up();
        let (shift, transmitter, _) = self.shift(&table);
        transmitter.resume(&shift);
    }

    /// How long to sleep.
    fn patience(&self) -> EpollTimeout {
        if self.transmitter.waits() { EpollTimeout::from(WAIT_MS) } else { EpollTimeout::NONE }
    }

    fn worked(&mut self, result: Result<Load, Errno>) -> Result<(), WorkerError> {
        match result {
            Ok(load) => self.pace.worked(load),
            Err(Errno::EBADFD) => return Err(WorkerError::TunGone),
            Err(_) => self.pause(),
        }
        Ok(())
    }

    /// The table to use for one batch; makes what is kept for each peer fit it and the sessions.
    fn look_up(&mut self) -> Arc<Table> {
        let table = Arc::clone(self.tables.load());
        let changed = !Arc::ptr_eq(table.peers(), &self.peers);
        if changed {
            self.peers = Arc::clone(table.peers());
            self.places = self.counters.places(&self.peers);
            self.counters.forget_unplaced();
            self.transmitter.forget_peers();
        }
        if let Some(keys) = &mut self.keys {
            let sessions = keys.sessions.load();
            if changed || !Arc::ptr_eq(sessions, &keys.known) {
                keys.known = Arc::clone(sessions);
                keys.ways = self.peers.iter().map(|peer| keys.known.way(&peer.name).cloned()).collect();
            }
        }
        table
    }

    fn shift<'a>(&'a mut self, table: &'a Table) -> (Shift<'a>, &'a mut Transmitter, &'a mut Receiver) {
        let keys = self.keys.as_ref();
        let shift = Shift {
            table,
            queues: &self.queues,
            lanes: &self.lanes,
            first_lane: (self.number * self.lanes.len()) as u8,
            sessions: keys.map(|keys| &*keys.known),
            ways: keys.map_or(&[], |keys| &keys.ways),
            counters: self.counters.worker(self.number),
            number: self.number,
            places: &self.places,
        };
        (shift, &mut self.transmitter, &mut self.receiver)
    }

    /// An error that should not be, and may come back at once: keeps the loop from turning without rest.
    fn pause(&self) {
        let mut fds = [PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        // Whether it was the time or the stop, the next wait tells.
        let _ = poll(&mut fds, PAUSE_MS);
    }
}

impl<'a> Shift<'a> {
    /// How packets to the peer go, once keys are agreed.
    pub(super) fn way(&self, peer: u32) -> Option<&'a Way> {
        self.ways.get(peer as usize)?.as_ref()
    }

    pub(super) fn sent(&self, peer: u32, packets: usize, bytes: usize) {
        self.counters.sent(self.place(peer), packets, bytes);
    }

    pub(super) fn received(&self, peer: u32, packets: usize, bytes: usize) {
        self.counters.received(self.place(peer), packets, bytes);
    }

    pub(super) fn dropped(&self, drop: Drop, packets: usize) {
        self.counters.dropped(drop, packets);
    }

    pub(super) fn relayed(&self, packets: usize, bytes: usize) {
        self.counters.relayed(packets, bytes);
    }

    pub(super) fn answered(&self) {
        self.counters.answered();
    }

    fn place(&self, peer: u32) -> &PeerCounters {
        &self.places[peer as usize][self.number]
    }
}

/// How often packets that wait for a key are looked at, in milliseconds.
const WAIT_MS: u16 = 1000;
/// Rest after an error that should not be, in milliseconds.
const PAUSE_MS: u8 = 10;
const STOP: u64 = 0;
const KEYS: u64 = 1;
const FIRST_QUEUE: u64 = 2;
const FIRST_LANE: u64 = 1 << 32;
