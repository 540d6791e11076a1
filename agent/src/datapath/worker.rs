//! One queue's loop: a thread that owns a queue of the TUN device and a UDP socket.
//!
//! ```text
//!   out:  TUN read into the slot, behind the header's place     until none waits, or a batch is full
//!           ─▶ verdict::outward: parse, table, size             a refused packet is counted, some are answered by ICMP
//!           ─▶ header before it, commit
//!         ─▶ sendmmsg, the whole batch                          EMSGSIZE: the path's MTU goes back by ICMP
//!
//!   in:   recvmmsg, a whole batch
//!           ─▶ verdict::inward: header, parse, source check, does the destination live here
//!           ─▶ TUN write
//! ```
//!
//! The table is read once per batch. No packet takes a lock or an allocation, none makes the worker wait, and nothing
//! but the device's loss ends it before it is told to stop. Without packets it sleeps in `epoll_wait`.

use super::{
    counters::{Counters, Drop, PeerCounters, WorkerCounters},
    header::{HEADER_LEN, Header},
    icmp::{self, Bucket, Problem},
    packet::Packet,
    table::{Home, Peer, Table},
    verdict,
};
use crate::{
    linux::{
        tun::Queue,
        udp::{BATCH, Incoming, Outgoing, Socket},
    },
    types::{CLEAR_OVERHEAD, IPV6_EXTRA},
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
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) struct Worker {
    number: usize,
    queue: Queue,
    socket: Socket,
    tables: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    counters: Arc<Counters>,
    /// The table's peers, and their counters in the same order.
    peers: Arc<[Peer]>,
    places: Vec<Arc<[PeerCounters]>>,
    outgoing: Box<Outgoing>,
    /// The peer's place of each outgoing datagram.
    targets: [u32; BATCH],
    incoming: Box<Incoming>,
    answers: Answers,
    epoll: Epoll,
    stop: Arc<EventFd>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    #[error("the TUN device is gone: someone removed it")]
    TunGone,
    #[error("wait for packets: {0}")]
    Wait(Errno),
}

impl Worker {
    /// The worker stops when `stop` becomes readable.
    pub(super) fn new(
        number: usize,
        queue: Queue,
        socket: Socket,
        tables: Arc<ArcSwap<Table>>,
        counters: Arc<Counters>,
        stop: Arc<EventFd>,
    ) -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        epoll.add(&queue, EpollEvent::new(EpollFlags::EPOLLIN, TUN))?;
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, UDP))?;
        Ok(Self {
            number,
            queue,
            socket,
            tables: Cache::new(tables),
            counters,
            peers: Arc::default(),
            places: Vec::new(),
            outgoing: Outgoing::new(),
            targets: [0; BATCH],
            incoming: Incoming::new(),
            answers: Answers::new(),
            epoll,
            stop,
        })
    }

    /// Carries packets until it is told to stop. A batch out and a batch in alternate while both have work.
    pub(super) fn run(mut self) -> Result<(), WorkerError> {
        let mut events = [EpollEvent::empty(); 3];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                ready => ready.map_err(WorkerError::Wait)?,
            };
            for event in &events[..ready] {
                let lost = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                match event.data() {
                    STOP => return Ok(()),
                    TUN if lost => return Err(WorkerError::TunGone),
                    TUN => self.transmit()?,
                    _ => self.receive()?,
                }
            }
        }
    }

    /// Takes a batch from the TUN and sends what has a way.
    fn transmit(&mut self) -> Result<(), WorkerError> {
        let table = self.table();
        let counters = self.counters.worker(self.number);
        let header = Header::whole(table.me()).encode();
        for _ in 0..BATCH {
            let Some(slot) = self.outgoing.reserve() else { break };
            let (front, rest) = slot.split_at_mut(HEADER_LEN);
            let len = match self.queue.read(rest) {
                Ok(len) => len,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    self.trouble_at_tun(errno)?;
                    break;
                }
            };
            let bytes = &rest[..len];
            match verdict::outward(&table, bytes) {
                Ok(route) => {
                    front.copy_from_slice(&header);
                    self.targets[self.outgoing.len()] = route.peer;
                    self.outgoing.commit(HEADER_LEN + len, route.endpoint);
                }
                Err(refusal) => {
                    counters.dropped(refusal.drop);
                    if let Some((packet, problem)) = refusal.answer
                        && let Some(from) = self.answers.grant(problem, &packet, &table)
                    {
                        self.answers.write(problem, &packet, bytes, from, &self.queue, counters);
                    }
                }
            }
        }
        self.flush(&table);
        Ok(())
    }

    /// Sends the batch. What the kernel does not take is dropped: waiting for room would stall the way in, and a
    /// sender learns of a loss sooner than of a queue.
    fn flush(&mut self, table: &Table) {
        let mut first = 0;
        while first < self.outgoing.len() {
            let refused = match self.outgoing.send(&self.socket, first) {
                Ok(sent) if sent > 0 => {
                    for at in first..first + sent {
                        let peer = &self.places[self.targets[at] as usize][self.number];
                        self.mine().sent(peer, self.outgoing.datagram(at).len() - HEADER_LEN);
                    }
                    first += sent;
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {
                    (first..self.outgoing.len()).for_each(|_| self.mine().dropped(Drop::SendBufferFull));
                    break;
                }
                Err(Errno::ENOBUFS | Errno::ENOMEM) => Drop::SendBufferFull,
                Err(Errno::EMSGSIZE) => {
                    self.answer_too_big(first, table);
                    Drop::TooBig
                }
                Ok(_) | Err(_) => Drop::SendRefused,
            };
            self.mine().dropped(refused);
            first += 1;
        }
        self.outgoing.clear();
    }

    /// The path takes less than the table says: asks the kernel how much, and tells the packet's sender.
    fn answer_too_big(&mut self, at: usize, table: &Table) {
        let bytes = &self.outgoing.datagram(at)[HEADER_LEN..];
        let endpoint = self.peers[self.targets[at] as usize].endpoint;
        let (Some(packet), Some(endpoint)) = (Packet::parse(bytes), endpoint) else { return };
        let Some(from) = self.answers.grant(Problem::TooBig { mtu: 0 }, &packet, table) else { return };
        let Ok(path) = self.socket.path_mtu(endpoint) else { return };
        let mtu = inner_mtu(path, endpoint);
        if usize::from(mtu) < bytes.len() {
            let counters = self.counters.worker(self.number);
            self.answers.write(Problem::TooBig { mtu }, &packet, bytes, from, &self.queue, counters);
        }
    }

    /// Takes a batch from the underlay and hands in what may come in.
    fn receive(&mut self) -> Result<(), WorkerError> {
        let received = match self.incoming.receive(&self.socket) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(_) => {
                self.pause();
                return Ok(());
            }
        };
        let table = self.table();
        let counters = self.counters.worker(self.number);
        for at in 0..received {
            match verdict::inward(&table, self.incoming.datagram(at)) {
                Ok(delivery) => match self.queue.write(delivery.packet) {
                    Ok(()) => {
                        let peer = &self.places[delivery.peer as usize][self.number];
                        counters.received(peer, delivery.packet.len());
                    }
                    Err(Errno::EBADFD) => return Err(WorkerError::TunGone),
                    Err(_) => counters.dropped(Drop::TunWrite),
                },
                Err(drop) => counters.dropped(drop),
            }
        }
        Ok(())
    }

    /// The table to use for one batch; makes the peers' places fit it.
    fn table(&mut self) -> Arc<Table> {
        let table = Arc::clone(self.tables.load());
        if !Arc::ptr_eq(table.peers(), &self.peers) {
            self.peers = Arc::clone(table.peers());
            self.places = self.counters.places(&self.peers);
            self.counters.forget_unplaced();
        }
        table
    }

    fn mine(&self) -> &WorkerCounters {
        self.counters.worker(self.number)
    }

    fn trouble_at_tun(&self, errno: Errno) -> Result<(), WorkerError> {
        if errno == Errno::EBADFD {
            return Err(WorkerError::TunGone);
        }
        self.pause();
        Ok(())
    }

    /// An error that should not be, and may come back at once: keeps the loop from turning without rest.
    fn pause(&self) {
        let mut fds = [PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        // Whether it was the time or the stop, the next wait tells.
        let _ = poll(&mut fds, PAUSE_MS);
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

    fn write(
        &mut self,
        problem: Problem,
        packet: &Packet,
        bytes: &[u8],
        from: IpAddr,
        queue: &Queue,
        counters: &WorkerCounters,
    ) {
        if !icmp::answer(problem, packet, bytes, from, &mut self.buffer) {
            return;
        }
        match queue.write(&self.buffer) {
            Ok(()) => counters.answered(),
            Err(_) => counters.dropped(Drop::TunWrite),
        }
    }
}

/// What an underlay path of `path` bytes leaves for an inner packet.
fn inner_mtu(path: usize, endpoint: SocketAddr) -> u16 {
    let largest = u16::try_from(path).unwrap_or(u16::MAX);
    let extra = if endpoint.ip().to_canonical().is_ipv6() { IPV6_EXTRA } else { 0 };
    largest.saturating_sub(CLEAR_OVERHEAD + extra)
}

/// One ICMP error of a kind each so often, for each worker: a hundred a second.
const ICMP_INTERVAL: Duration = Duration::from_millis(10);
/// So many at once.
const ICMP_BURST: u32 = 50;
/// Rest after an error that should not be, in milliseconds.
const PAUSE_MS: u8 = 10;
const STOP: u64 = 0;
const TUN: u64 = 1;
const UDP: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_headers_are_taken_off_a_path() {
        let v4 = SocketAddr::from(([192, 0, 2, 1], 1));
        let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:1".parse().unwrap();
        assert_eq!(inner_mtu(1500, v4), 1464);
        assert_eq!(inner_mtu(1500, v6), 1444);
        assert_eq!(inner_mtu(1500, mapped), 1464);
        assert_eq!(inner_mtu(65_536, v4), 65_499, "loopback's MTU is more than IP has");
        assert_eq!(inner_mtu(0, v4), 0);
    }
}
