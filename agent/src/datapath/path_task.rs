//! The task of the paths: owns the machine, the timer and two sockets.
//!
//! ```text
//!   UDP 6783, probes only ──▶ ┌──────┐ ──▶ UDP, a port of its own
//!   Inputs ──watch──────────▶ │ task │ ──watch──▶ Views
//!   counters ───────────────▶ └──────┘ ──▶ who answers again
//! ```
//! Probes come to the port that data comes to, and firewalls treat them alike; but a socket of their own takes them, so
//! they wait for no worker and fall to no flood. They leave from a port that no data leaves from: or the receiving
//! kernel would join the two, as it joins probes that are equally long.

use super::{
    counters::{Drop, Traffic as Carried, WorkerCounters},
    path::{ANSWER, Datagram, Inputs, PROBE, Paths, Traffic, View, Views, Way},
    relay::{self, PREFIX_LEN, Prefix, RELAYED, Verdict},
    session_task::{Requests, canonical, random},
    table::Table,
    task::Reader,
};
use crate::{
    linux::udp::{Incoming, Message, Socket, Steer, UdpError},
    types::{DataSecret, PeerName},
};
use anyhow::Context;
use arc_swap::ArcSwap;
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    ops::Range,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::Interest,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep_until,
};

/// The sockets for [`spawn`].
pub struct Sockets {
    incoming: Socket,
    outgoing: Socket,
}

/// What the task works with.
pub struct Config {
    /// None where packets go in clear.
    pub secret: Option<DataSecret>,
    pub sockets: Sockets,
    /// For probes that others have for each other.
    pub tables: Arc<ArcSwap<Table>>,
    pub traffic: Reader,
    /// Whom to tell that a peer answers again; none where packets go in clear.
    pub handshakes: Option<Requests>,
    /// The wall clock's time at the start.
    pub since: Duration,
}

/// The running task. It ends when it is dropped.
pub struct Health {
    drops: Arc<WorkerCounters>,
    task: JoinHandle<()>,
}

/// Reads what was dropped and what was relayed, to be added to what the data path's own reader says.
#[derive(Clone)]
pub struct Passed(Arc<WorkerCounters>);

/// Opens the sockets beside those that the workers have.
pub fn bind(workers: &[Vec<Socket>]) -> Result<Sockets, UdpError> {
    let steer = Steer {
        at: super::header::FLOW_AT as u8,
        apart: [PROBE, ANSWER],
        prefix: (RELAYED, PREFIX_LEN as u8),
    };
    let first = &workers[0][0];
    Ok(Sockets { incoming: first.bind_beside(workers.len(), steer)?, outgoing: first.bind_probing()? })
}

/// Starts the task. `views` are told when a way, an endpoint or an MTU changes, and what else there is, is kept up to date
/// in them. Peers that answer again are told by `revived`; what finds it full is not said twice.
///
/// # Errors
/// A socket cannot be used.
pub fn spawn(
    config: Config,
    inputs: watch::Receiver<Inputs>,
    views: watch::Sender<Arc<Views>>,
    revived: mpsc::Sender<PeerName>,
) -> anyhow::Result<Health> {
    let Config { secret, sockets, tables, traffic, handshakes, since } = config;
    let Sockets { incoming, outgoing } = sockets;
    let std = |socket: &Socket| socket.as_fd().try_clone_to_owned().map(UdpSocket::from);
    let readable = std(&incoming).context("share a data socket with the probes")?;
    let readable = tokio::net::UdpSocket::from_std(readable).context("wait for probes")?;
    let outgoing = std(&outgoing).context("share a socket with the probes")?;
    let drops = Arc::new(WorkerCounters::default());
    let task = Task {
        paths: Paths::new(secret, random(), since.as_millis() as u64),
        incoming,
        readable,
        arrived: Incoming::new(),
        outgoing,
        tables,
        traffic,
        handshakes,
        views,
        revived,
        drops: drops.clone(),
    };
    Ok(Health { drops, task: tokio::spawn(task.run(inputs)) })
}

impl Health {
    pub fn passed(&self) -> Passed {
        Passed(self.drops.clone())
    }
}

impl std::ops::Drop for Health {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Passed {
    /// Every reason, also where nothing was dropped.
    pub fn drops(&self) -> BTreeMap<Drop, u64> {
        self.0.drops()
    }

    pub fn relayed(&self) -> Carried {
        self.0.passed_on()
    }
}

struct Task {
    paths: Paths,
    incoming: Socket,
    /// The same socket.
    readable: tokio::net::UdpSocket,
    arrived: Incoming,
    outgoing: UdpSocket,
    tables: Arc<ArcSwap<Table>>,
    traffic: Reader,
    handshakes: Option<Requests>,
    views: watch::Sender<Arc<Views>>,
    revived: mpsc::Sender<PeerName>,
    drops: Arc<WorkerCounters>,
}

impl Task {
    async fn run(mut self, mut inputs: watch::Receiver<Inputs>) {
        inputs.mark_changed();
        loop {
            let now = Instant::now();
            let wake = self.paths.next_wake(now).unwrap_or(now + IDLE);
            tokio::select! {
                // Late, perhaps, where others have the processors: what has come meanwhile is no less in time.
                () = sleep_until(wake.into()) => self.catch_up(),
                changed = inputs.changed() => match changed {
                    Ok(()) => self.paths.set(inputs.borrow_and_update().clone()),
                    Err(_) => return,
                },
                readable = self.readable.readable() => match readable {
                    Ok(()) => self.receive(),
                    Err(_) => return,
                },
            }
            let now = Instant::now();
            if self.paths.wants_traffic(now) {
                let carried = self.traffic.read().peers;
                let traffic = |name: &PeerName| {
                    carried.get(name).map_or(Traffic::default(), |traffic| Traffic {
                        sent: traffic.sent.packets,
                        received: traffic.received.packets,
                    })
                };
                self.paths.carried(traffic, now);
            }
            self.paths.wake(now);
            while let Some(datagram) = self.paths.poll_datagram() {
                self.send(&datagram);
            }
            self.tell();
        }
    }

    fn receive(&mut self) {
        let Self { incoming, arrived, .. } = self;
        let receive = || Ok(arrived.receive(incoming, BATCH)?);
        match self.readable.try_io(Interest::READABLE, receive) {
            Ok(messages) => self.take(messages),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => tracing::debug!(%error, "probes were not received"),
        }
    }

    /// Receives what waits, whether or not we have been told that something does.
    fn catch_up(&mut self) {
        for _ in 0..BATCHES {
            match self.arrived.receive(&self.incoming, BATCH) {
                Ok(messages) if messages > 0 => self.take(messages),
                _ => return,
            }
        }
    }

    /// Takes the messages that have arrived.
    fn take(&mut self, messages: usize) {
        for at in 0..messages {
            let Some(from) = self.arrived.source(at).map(canonical) else { continue };
            let Message { range, segment } = self.arrived.message(at);
            for start in range.clone().step_by(segment) {
                let place = start..(start + segment).min(range.end);
                if let Err(drop) = self.datagram(from, place) {
                    tracing::trace!(%from, reason = drop.as_str(), "a probe was of no use");
                    self.drops.dropped(drop, 1);
                }
            }
        }
    }

    fn datagram(&mut self, from: SocketAddr, place: Range<usize>) -> Result<(), Drop> {
        let datagram = &mut self.arrived.buffer()[place];
        let now = Instant::now();
        let Some(prefix) = Prefix::decode(datagram) else {
            return self.paths.datagram(from, false, datagram, now);
        };
        match prefix.verdict(&self.tables.load(), Some(from))? {
            Verdict::Here { .. } => self.paths.datagram(from, true, &datagram[PREFIX_LEN..], now),
            Verdict::Onward { to, .. } => {
                relay::count_down(datagram);
                self.outgoing.send_to(datagram, to).map_err(|_| Drop::SendRefused)?;
                self.drops.relayed(1, datagram.len());
                Ok(())
            }
        }
    }

    fn send(&self, datagram: &Datagram) {
        if let Err(error) = self.outgoing.send_to(&datagram.bytes, datagram.to) {
            // As good as lost on its way, which is what probes are there to find out.
            tracing::debug!(to = %datagram.to, bytes = datagram.bytes.len(), %error, "a probe was not sent");
        }
    }

    fn tell(&mut self) {
        let fresh = self.paths.take_changed();
        if fresh.is_empty() {
            return;
        }
        let mut revived = Vec::new();
        self.views.send_if_modified(|told| {
            let mut changed = false;
            // A copy only while somebody is looking.
            let told = Arc::make_mut(told);
            for name in fresh {
                let Some(view) = self.paths.view(&name) else {
                    changed |= told.remove(&name).is_some();
                    continue;
                };
                let before = told.get(&name);
                if before.is_none_or(|before| differ(before, &view)) {
                    changed = true;
                    log(&name, before, &view);
                    if revives(before, &view) {
                        revived.push(name.clone());
                    }
                }
                told.insert(name, view);
            }
            changed
        });
        for name in revived {
            if let Some(handshakes) = &self.handshakes {
                handshakes.revived(&name);
            }
            // Whoever is slow to hear of it finds out by its own timers.
            let _ = self.revived.try_send(name);
        }
    }
}

/// Whether there is something to act upon.
fn differ(a: &View, b: &View) -> bool {
    (&a.way, a.endpoint, a.direct.is_some(), a.mtu) != (&b.way, b.endpoint, b.direct.is_some(), b.mtu)
}

/// It was down, or by a relay, and is better now.
fn revives(before: Option<&View>, now: &View) -> bool {
    match (before.map(|before| &before.way), &now.way) {
        (Some(Way::Down(_)), Way::Direct | Way::Relayed(_)) | (Some(Way::Relayed(_)), Way::Direct) => true,
        (_, Way::Direct) => now.direct.is_some() && before.is_none_or(|before| before.direct.is_none()),
        _ => false,
    }
}

fn log(name: &PeerName, was: Option<&View>, view: &View) {
    if was.is_none_or(|was| was.way != view.way) {
        match &view.way {
            Way::Direct if was.is_some() => {
                tracing::info!(peer = %name, rtt = ?view.rtt, "reached directly again")
            }
            Way::Direct => {}
            Way::Relayed(relay) => tracing::info!(peer = %name, %relay, "reached by a relay"),
            Way::Down(why) => tracing::warn!(peer = %name, why, "cannot be reached"),
        }
    }
    let was = was.filter(|was| was.way == view.way);
    if let (Some(was), Some(mtu)) = (was.and_then(|was| was.mtu), view.mtu)
        && was != mtu
    {
        tracing::info!(peer = %name, was, mtu, "the path takes packets of another size");
    }
}

/// Messages that are read before the timer has its turn.
const BATCH: usize = 8;
/// Batches that are read before what is late is taken for lost.
const BATCHES: usize = 32;
const IDLE: Duration = Duration::from_secs(3600);
