//! Starting and stopping the data path's threads.

use super::{
    counters::{Counters, Drop, Snapshot},
    header::FLOW_AT,
    session_task::Sealing,
    sessions::LANES,
    table::Table,
    worker::{Parts, Worker},
};
use crate::linux::{
    tun::{self, Offloads, Queue, TunError},
    udp::{self, Socket, UdpError},
};
use anyhow::{Context, ensure};
use arc_swap::ArcSwap;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::{
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::Duration,
};
use tokio::sync::watch;

/// What the data path runs on: as many groups of queues as of sockets, one thread for each pair.
pub struct Config {
    /// The TUN device's name.
    pub tun: String,
    /// As [`open`] gives them.
    pub queues: Vec<Vec<Queue>>,
    pub offloads: Offloads,
    pub sockets: Vec<Vec<Socket>>,
    /// How long a thread looks for more packets after work before it sleeps; zero for not at all.
    pub linger: Duration,
    /// None where packets go in clear.
    pub sealing: Option<Sealing>,
}

/// Opens the TUN device's queues for `threads` workers; call it as [`tun::open`].
pub fn open(name: &str, threads: usize) -> Result<(Vec<Vec<Queue>>, Offloads), TunError> {
    let each = (tun::MAX_QUEUES / threads).clamp(1, QUEUES);
    let (queues, offloads) = tun::open(name, threads * each)?;
    let mut queues = queues.into_iter();
    Ok(((0..threads).map(|_| queues.by_ref().take(each).collect()).collect(), offloads))
}

/// The queues and sockets of another agent's workers, as [`Datapath::descriptors`] gave them.
pub fn adopt(name: &str, workers: Vec<Descriptors>) -> anyhow::Result<Adopted> {
    let (mut queues, mut sockets) = (Vec::new(), Vec::new());
    let mut offloads = None;
    for worker in workers {
        let (adopted, offers) = tun::adopt(name, worker.queues)?;
        offloads = Some(offers);
        queues.push(adopted);
        let lanes: std::io::Result<_> = worker.lanes.into_iter().map(Socket::adopt).collect();
        sockets.push(lanes.context("adopt the data sockets")?);
    }
    Ok((queues, sockets, offloads.context("adopt the data path: it has no workers")?))
}

/// The sockets of `threads` workers; see [`Socket::bind_workers`].
pub fn bind(address: SocketAddr, threads: usize) -> Result<Vec<Vec<Socket>>, UdpError> {
    // The handshakes count their own packets in a lane as well.
    Socket::bind_workers(address, threads, ((LANES - 1) / threads).clamp(1, PORTS), FLOW_AT)
}

/// The running threads. They end, and are joined, when it is stopped or dropped.
pub struct Datapath {
    counters: Reader,
    kernel: Arc<Kernel>,
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
    failure: watch::Receiver<Option<String>>,
}

/// Reads the counters, also while and after the threads run.
#[derive(Clone)]
pub struct Reader {
    counters: Arc<Counters>,
    /// What the kernel counts; gone with the data path.
    kernel: Weak<Kernel>,
}

/// What a worker reads from and writes to.
#[derive(Debug, Default)]
pub struct Descriptors {
    pub queues: Vec<OwnedFd>,
    pub lanes: Vec<OwnedFd>,
}

type Adopted = (Vec<Vec<Queue>>, Vec<Vec<Socket>>, Offloads);

/// What the kernel has of ours: it drops packets there that no worker has seen.
struct Kernel {
    tun: String,
    workers: Vec<Descriptors>,
}

/// Starts the threads. What is stored in `tables` from then on holds for the next batch of each.
pub fn spawn(config: Config, tables: Arc<ArcSwap<Table>>) -> anyhow::Result<Datapath> {
    let Config { tun, queues, offloads, sockets, linger, sealing } = config;
    ensure!(
        !queues.is_empty() && queues.len() == sockets.len(),
        "start the data path: {} groups of TUN queues and {} of UDP sockets do not pair up",
        queues.len(),
        sockets.len()
    );
    let counters = Arc::new(Counters::new(queues.len()));
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let stop = Arc::new(EventFd::from_flags(flags).context("start the data path: make an eventfd")?);
    let (failed, failure) = watch::channel(None);
    let workers = queues.iter().zip(&sockets).map(|(queues, lanes)| Descriptors::of(queues, lanes));
    let workers =
        workers.collect::<Result<_, _>>().context("start the data path: duplicate its descriptors")?;
    let kernel = Arc::new(Kernel { tun, workers });
    let reader = Reader { counters: counters.clone(), kernel: Arc::downgrade(&kernel) };
    let mut datapath =
        Datapath { counters: reader, kernel, stop: stop.clone(), threads: Vec::new(), failure };
    for (number, (queues, lanes)) in queues.into_iter().zip(sockets).enumerate() {
        let parts = Parts { number, queues, offloads, lanes, linger, sealing: sealing.clone() };
        let worker = Worker::new(parts, tables.clone(), counters.clone(), stop.clone())
            .with_context(|| format!("start data worker {number}"))?;
        let failed = failed.clone();
        let thread = thread::Builder::new()
            .name(format!("weft-data-{number}"))
            .spawn(move || work(number, worker, &failed))
            .with_context(|| format!("start data worker {number}: make a thread"))?;
        datapath.threads.push(thread);
    }
    Ok(datapath)
}

impl Datapath {
    pub fn counters(&self) -> Snapshot {
        self.counters.read()
    }

    /// For whoever reads the counters without owning the data path.
    pub fn reader(&self) -> Reader {
        self.counters.clone()
    }

    /// Waits until a worker ended by itself, as when someone removed the device, and says why. Packets of its queue
    /// are lost from then on: stop, open the device again and start anew, or end.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            // All workers were told to stop: nothing can fail any more.
            Err(_) => std::future::pending().await,
        }
    }

    /// Each worker's descriptors: whoever has them too can go on where this data path stops.
    pub fn descriptors(&self) -> &[Descriptors] {
        &self.kernel.workers
    }

    /// Ends the threads and waits for them: at most the batch that they are at.
    pub fn stop(self) {}
}

impl std::ops::Drop for Datapath {
    fn drop(&mut self) {
        self.stop.write(1).expect("an eventfd that is written once has room");
        for thread in self.threads.drain(..) {
            // It has caught its own panic and said so.
            let _ = thread.join();
        }
    }
}

impl Reader {
    pub fn read(&self) -> Snapshot {
        let mut snapshot = self.counters.snapshot();
        if let Some(kernel) = self.kernel.upgrade() {
            let sockets = kernel.workers.iter().flat_map(|worker| &worker.lanes);
            let refused = sockets.map(|socket| udp::refused(socket).unwrap_or(0)).sum();
            snapshot.drops.insert(Drop::ReceiveBufferFull, refused);
            snapshot.drops.insert(Drop::TunQueueFull, tun::refused(&kernel.tun).unwrap_or(0));
        }
        snapshot
    }
}

impl Descriptors {
    fn of(queues: &[impl AsFd], lanes: &[impl AsFd]) -> std::io::Result<Self> {
        let clones = |fds: Vec<BorrowedFd<'_>>| fds.into_iter().map(|fd| fd.try_clone_to_owned()).collect();
        let queues: std::io::Result<_> = clones(queues.iter().map(AsFd::as_fd).collect());
        let lanes: std::io::Result<_> = clones(lanes.iter().map(AsFd::as_fd).collect());
        Ok(Self { queues: queues?, lanes: lanes? })
    }
}

fn work(number: usize, worker: Worker, failed: &watch::Sender<Option<String>>) {
    let why = match catch_unwind(AssertUnwindSafe(|| worker.run())) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => format!("data worker {number}: {error}"),
        Err(_) => format!("data worker {number}: panicked; its message is in the log"),
    };
    tracing::error!(worker = number, why, "a data worker ended");
    failed.send_replace(Some(why));
}

/// Queues of each worker. A flow that floods one of them harms the others' no more than its share of time.
const QUEUES: usize = 8;
/// Source ports of each worker: with them, network cards, equal paths and the receiver's cores tell flows apart.
const PORTS: usize = 4;
