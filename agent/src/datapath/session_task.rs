//! The task of the handshakes: owns the machine, the timer and a socket to send from.
//!
//! ```text
//!   workers ──Requests──▶ ┌──────┐ ──▶ UDP
//!                         │ task │ ──▶ ArcSwap<Sessions>, then wakes the workers
//!   records ───watch────▶ └──────┘
//! ```
//! Both queues from the workers are bounded, and a worker never waits. What it wants and notices is small and goes
//! first; handshake messages have a queue of their own, so that a flood of them keeps nobody from calling. What finds
//! its queue full is dropped, and the worker counts it: peers say everything again.

use super::{
    handshake::{Config, Datagram, Estate, Machine, Peer, Random, Refusal, message::MESSAGE_LEN_MAX},
    icmp::Bucket,
    relay::Prefix,
    sessions::{SessionIndex, Sessions},
    table::Table,
};
use crate::{linux::udp::Socket, types::PeerName};
use anyhow::Context;
use arc_swap::ArcSwap;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::sleep_until,
};

/// What a worker has to say; each has its own. Each call says whether it was taken; none waits.
#[derive(Clone)]
pub struct Requests {
    signals: mpsc::Sender<Signal>,
    messages: mpsc::Sender<Message>,
    /// Anybody can send packets of no session, and a peer can send from anywhere: they must not keep the queue full.
    surprises: Bucket,
    moves: Bucket,
}

enum Signal {
    Wanted(PeerName),
    Surprised(SocketAddr),
    Shown { index: SessionIndex, from: SocketAddr },
    Moved { index: SessionIndex, before: SocketAddr, from: SocketAddr },
    Confirmed(SessionIndex),
    Revived(PeerName),
}

struct Message {
    from: SocketAddr,
    len: usize,
    bytes: [u8; MESSAGE_LEN_MAX],
}

/// Reads how many handshake messages were of no use, by reason.
#[derive(Clone, Default)]
pub struct Refusals(Arc<[AtomicU64; Refusal::ALL.len()]>);

/// The running task. It ends when it is dropped.
pub struct Handshakes {
    sealing: Sealing,
    refusals: Refusals,
    ending: Option<oneshot::Sender<()>>,
    task: JoinHandle<Machine>,
}

/// What the workers need to seal and open packets.
#[derive(Clone)]
pub struct Sealing {
    pub sessions: Arc<ArcSwap<Sessions>>,
    pub requests: Requests,
    /// Each worker's becomes readable when there are new sessions.
    pub wakes: Vec<Arc<EventFd>>,
}

/// Starts the task for so many workers, each of which may have several lanes. It sends from `socket`, which stays with
/// its worker, and neither calls nor hears anybody until `peers` has some. `tables` say who is to be reached by a relay.
/// It goes on with what another agent's handed over.
///
/// # Errors
/// The socket cannot be shared.
pub fn spawn(
    config: Config,
    socket: &Socket,
    peers: watch::Receiver<Vec<Peer>>,
    workers: usize,
    tables: Arc<ArcSwap<Table>>,
    estate: Option<Estate>,
) -> anyhow::Result<Handshakes> {
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let wakes = (0..workers).map(|_| EventFd::from_flags(flags).map(Arc::new)).collect::<Result<Vec<_>, _>>();
    let (wakes, sessions) = (wakes.context("make an eventfd for each data worker")?, Arc::default());
    let mut machine = Machine::new(config, Instant::now());
    if let Some(estate) = estate {
        machine.resume(&estate, Instant::now());
    }
    let socket = socket.as_fd().try_clone_to_owned().context("share a data socket with the handshakes")?;
    let (signals, signal_queue) = mpsc::channel(SIGNALS);
    let (messages, message_queue) = mpsc::channel(MESSAGES);
    let refusals = Refusals::default();
    let (ending, ended) = oneshot::channel();
    let mut task = Task {
        machine,
        socket: socket.into(),
        sessions: Arc::clone(&sessions),
        workers: wakes.clone(),
        refusals: refusals.clone(),
        tables,
    };
    // The workers have them when they start.
    task.carry_out();
    let task = tokio::spawn(task.run(peers, signal_queue, message_queue, ended));
    let (surprises, moves) = (Bucket::new(SURPRISE, SURPRISE_BURST), Bucket::new(MOVE, MOVE_BURST));
    let requests = Requests { signals, messages, surprises, moves };
    Ok(Handshakes { sealing: Sealing { sessions, requests, wakes }, refusals, ending: Some(ending), task })
}

/// Random bytes for [`Config`], by way of the crypto library.
pub fn random() -> Random {
    Box::new(|bytes| aws_lc_rs::rand::fill(bytes).expect("the system has random bytes"))
}

impl Requests {
    /// A packet for the peer has no key, or its lane has no number left.
    pub fn wanted(&self, peer: &PeerName) -> bool {
        self.signals.try_send(Signal::Wanted(peer.clone())).is_ok()
    }

    /// A sealed packet from there names no session of ours.
    pub fn surprised(&mut self, from: SocketAddr, now: Instant) -> bool {
        self.surprises.take(now) && self.signals.try_send(Signal::Surprised(canonical(from))).is_ok()
    }

    /// An empty packet of that session came from there. If it is not taken, there are more.
    pub fn shown(&mut self, index: SessionIndex, from: SocketAddr, now: Instant) -> bool {
        self.moves.take(now) && self.signals.try_send(Signal::Shown { index, from }).is_ok()
    }

    /// [`super::sessions::Opener::moved`] said so. If it is not taken, the lane's next packet tells again.
    pub fn moved(&mut self, index: SessionIndex, before: SocketAddr, from: SocketAddr, now: Instant) -> bool {
        self.moves.take(now) && self.signals.try_send(Signal::Moved { index, before, from }).is_ok()
    }

    /// [`super::sessions::Receiving::confirm`] said so. If it is not taken, the task finds out by itself in a second.
    pub fn confirmed(&self, index: SessionIndex) -> bool {
        self.signals.try_send(Signal::Confirmed(index)).is_ok()
    }

    /// The peer answers probes again. If it is not taken, the next try comes in a second or two.
    pub fn revived(&self, peer: &PeerName) -> bool {
        self.signals.try_send(Signal::Revived(peer.clone())).is_ok()
    }

    /// A datagram of kind 3, 4 or 5. One that is too long is none of the handshake's, and not taken.
    pub fn message(&self, from: SocketAddr, datagram: &[u8]) -> bool {
        let mut bytes = [0; MESSAGE_LEN_MAX];
        let Some(place) = bytes.get_mut(..datagram.len()) else { return false };
        place.copy_from_slice(datagram);
        self.messages.try_send(Message { from: canonical(from), len: datagram.len(), bytes }).is_ok()
    }
}

impl Refusals {
    /// Every reason, also where there was none.
    pub fn read(&self) -> BTreeMap<Refusal, u64> {
        Refusal::ALL.into_iter().zip(self.0.iter().map(|count| count.load(Relaxed))).collect()
    }

    fn count(&self, refusal: Refusal) {
        self.0[refusal as usize].fetch_add(1, Relaxed);
    }
}

impl Handshakes {
    pub fn sealing(&self) -> &Sealing {
        &self.sealing
    }

    pub fn refusals(&self) -> Refusals {
        self.refusals.clone()
    }

    /// Ends, once no worker seals or opens any more, and gives what another agent's can go on with.
    ///
    /// # Errors
    /// The task has panicked.
    pub async fn release(mut self) -> anyhow::Result<Estate> {
        self.ending.take().map(|ending| ending.send(()));
        let machine = (&mut self.task).await.context("the handshakes' task")?;
        Ok(machine.release(Instant::now()))
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Task {
    machine: Machine,
    socket: UdpSocket,
    sessions: Arc<ArcSwap<Sessions>>,
    workers: Vec<Arc<EventFd>>,
    refusals: Refusals,
    tables: Arc<ArcSwap<Table>>,
}

impl Task {
    async fn run(
        mut self,
        mut peers: watch::Receiver<Vec<Peer>>,
        mut signals: mpsc::Receiver<Signal>,
        mut messages: mpsc::Receiver<Message>,
        mut ended: oneshot::Receiver<()>,
    ) -> Machine {
        let mut batch = Vec::with_capacity(BATCH);
        // Who calls right at the start, before anybody is known, is heard a moment later, not refused.
        let mut acquainted = false;
        peers.mark_changed();
        loop {
            let wake = self.machine.next_wake().unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                biased;
                _ = &mut ended => return self.machine,
                () = sleep_until(wake.into()) => {}
                Ok(()) = peers.changed() => {
                    let peers = peers.borrow_and_update().clone();
                    acquainted |= !peers.is_empty();
                    if acquainted {
                        self.machine.set_peers(peers, Instant::now());
                    }
                }
                Some(signal) = signals.recv() => self.signal(signal),
                received = messages.recv_many(&mut batch, BATCH), if acquainted => {
                    if received == 0 {
                        return self.machine;
                    }
                    batch.drain(..).for_each(|message| self.message(&message));
                }
            }
            self.machine.wake(Instant::now());
            self.carry_out();
        }
    }

    fn signal(&mut self, signal: Signal) {
        match signal {
            Signal::Wanted(peer) => self.machine.wanted(&peer, Instant::now()),
            Signal::Surprised(from) => self.machine.surprised(from, Instant::now()),
            Signal::Shown { index, from } => self.machine.shown(index, from),
            Signal::Moved { index, before, from } => self.machine.moved(index, before, from, Instant::now()),
            Signal::Confirmed(index) => self.machine.confirmed(index),
            Signal::Revived(peer) => self.machine.revived(&peer, Instant::now()),
        }
    }

    fn message(&mut self, message: &Message) {
        let datagram = &message.bytes[..message.len];
        if let Err(refusal) = self.machine.datagram(message.from, datagram, Instant::now()) {
            tracing::trace!(from = %message.from, ?refusal, "a handshake message was of no use");
            self.refusals.count(refusal);
        }
    }

    fn carry_out(&mut self) {
        // Before the confirmation goes out: what it makes the peer send is to find its session.
        if let Some(sessions) = self.machine.poll_sessions() {
            self.sessions.store(Arc::new(sessions));
            for worker in &self.workers {
                // It fails only where so many wakes are pending already that the next would not fit.
                let _ = worker.write(1);
            }
        }
        while let Some(datagram) = self.machine.poll_datagram() {
            if let Err(error) = self.send(&datagram) {
                // As good as lost on its way: it is said again.
                tracing::debug!(to = %datagram.to, %error, "a handshake message was not sent");
            }
        }
    }
}

impl Task {
    /// Who does not answer at an address of its own is sent to by a relay.
    fn send(&self, Datagram { to, bytes }: &Datagram) -> std::io::Result<usize> {
        let table = self.tables.load();
        let relayed = table.peers().iter().find(|peer| peer.endpoint == Some(*to) && peer.relay.is_some());
        match relayed.and_then(|peer| Some((peer.relay?, Prefix::new(table.me(), peer.data_id)))) {
            Some((relay, prefix)) => self.socket.send_to(&[&prefix.encode()[..], bytes].concat(), relay),
            None => self.socket.send_to(bytes, to),
        }
    }
}

/// An IPv4 address as records have it, also where an IPv6 socket took the datagram.
pub fn canonical(from: SocketAddr) -> SocketAddr {
    SocketAddr::new(from.ip().to_canonical(), from.port())
}

/// Waiting signals.
const SIGNALS: usize = 1024;
/// Waiting messages, 40 KiB of them.
const MESSAGES: usize = 256;
/// Messages that are read before anything else has its turn.
const BATCH: usize = 32;
/// Packets of no session that a worker tells of: a hundred a second.
const SURPRISE: Duration = Duration::from_millis(10);
const SURPRISE_BURST: u32 = 50;
/// Lanes' moves that a worker tells of: a hundred a second.
const MOVE: Duration = Duration::from_millis(10);
const MOVE_BURST: u32 = 50;
const IDLE: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datapath::{
            handshake::message::{INITIATION_LEN, Message as Decoded},
            seal::{Algorithm, SEALED_HEADER_LEN},
        },
        types::{DataKey, DataSecret, Incarnation},
    };
    use aws_lc_rs::agreement::{PrivateKey, X25519};
    use tokio::time::timeout;

    /// An agent with one worker, which only receives.
    struct End {
        handshakes: Handshakes,
        sessions: Arc<ArcSwap<Sessions>>,
        worker: Arc<EventFd>,
        socket: tokio::net::UdpSocket,
        address: SocketAddr,
    }

    fn secret(byte: u8) -> DataSecret {
        DataSecret::new([byte; 32])
    }

    fn key(byte: u8) -> DataKey {
        let private = PrivateKey::from_private_key(&X25519, secret(byte).bytes()).unwrap();
        DataKey::from_bytes(private.compute_public_key().unwrap().as_ref()).unwrap()
    }

    fn end(byte: u8, peers: watch::Receiver<Vec<Peer>>) -> End {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let data = Socket::bind_workers(any, 1, 1, 0).unwrap().remove(0).remove(0);
        let config = Config {
            name: format!("n{byte}").parse().unwrap(),
            secret: secret(byte),
            key: key(byte),
            incarnation: Incarnation(1),
            algorithm: Algorithm::preferred(),
            lanes: 1,
            random: random(),
        };
        let handshakes = spawn(config, &data, peers, 1, Arc::default(), None).unwrap();
        let Sealing { sessions, wakes, .. } = handshakes.sealing().clone();
        let worker = wakes[0].clone();
        let address = data.local_address().unwrap();
        let socket: UdpSocket = data.as_fd().try_clone_to_owned().unwrap().into();
        End {
            handshakes,
            sessions,
            worker,
            socket: tokio::net::UdpSocket::from_std(socket).unwrap(),
            address,
        }
    }

    impl End {
        fn peer(&self, byte: u8) -> Peer {
            let name = format!("n{byte}").parse().unwrap();
            Peer { name, key: key(byte), incarnation: Incarnation(1), endpoint: Some(self.address) }
        }

        /// Hands one datagram over as a worker does; gives its kind.
        async fn receive(&self) -> u8 {
            let mut bytes = [0; 2048];
            let arrival = timeout(Duration::from_secs(10), self.socket.recv_from(&mut bytes));
            let (len, from) = arrival.await.expect("a datagram comes").unwrap();
            let requests = &self.handshakes.sealing().requests;
            if Decoded::decode(&bytes[..len]).is_some() {
                assert!(requests.message(from, &bytes[..len]));
            } else {
                let (header, sealed) = bytes[..len].split_first_chunk_mut::<SEALED_HEADER_LEN>().unwrap();
                let index = SessionIndex(u32::from_be_bytes(header[4..8].try_into().unwrap()));
                let sessions = self.sessions.load();
                let session = sessions.receiving(index).unwrap();
                assert_eq!(session.opener().open(header, sealed), Ok(0));
                assert!(session.confirm() && requests.confirmed(index));
            }
            bytes[0]
        }

        async fn sends_to(&self, byte: u8) -> bool {
            let name = format!("n{byte}").parse().unwrap();
            for _ in 0..1000 {
                if self.sessions.load().sending(&name).is_some() {
                    return true;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            false
        }
    }

    #[tokio::test]
    async fn two_tasks_agree_over_real_sockets_and_wake_their_workers() {
        let (peers_of_a, of_a) = watch::channel(Vec::new());
        let (peers_of_b, of_b) = watch::channel(Vec::new());
        let (a, b) = (end(1, of_a), end(2, of_b));
        peers_of_a.send_replace(vec![b.peer(2)]);
        peers_of_b.send_replace(vec![a.peer(1)]);
        while !a.handshakes.sealing().requests.wanted(&"n2".parse().unwrap()) {}
        assert_eq!(b.receive().await, 0x13);
        assert_eq!(a.receive().await, 0x14);
        assert_eq!(b.receive().await, 0x12);
        assert!(a.sends_to(2).await && b.sends_to(1).await);
        assert!(a.worker.read().is_ok() && b.worker.read().is_ok());
        assert_eq!(a.handshakes.refusals().read().values().sum::<u64>(), 0);
    }

    #[tokio::test]
    async fn what_is_of_no_use_is_counted_and_what_is_too_long_not_taken() {
        let (peers, of_a) = watch::channel(Vec::new());
        let a = end(1, of_a);
        peers.send_replace(vec![a.peer(2)]);
        let requests = &a.handshakes.sealing().requests;
        assert!(!requests.message(a.address, &[0x13; INITIATION_LEN + 1]));
        assert!(requests.message(a.address, &[0x13; INITIATION_LEN]));
        let refusals = a.handshakes.refusals();
        let counted = async {
            while refusals.read()[&Refusal::Malformed] == 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), counted).await.unwrap();
        assert_eq!(refusals.read().values().sum::<u64>(), 1);
    }
}
