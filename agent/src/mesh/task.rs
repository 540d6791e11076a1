//! The task of the mesh: owns the machine, the streams and the timer.
//!
//! ```text
//!   Handle ──commands──▶ ┌──────┐ ──Outgoing──▶ streams
//!                        │ Task │ ◀──events──── readers, server, calls
//!   subjects ◀─Incoming─ └──────┘ ──watch─────▶ PeerSet
//! ```
//! All channels are bounded: a full command or event queue makes its sender wait, a link that is slow is told merged news
//! (see [`super::buffer`]), and so is a subject that is slow to take what came in.

use super::{
    gossip::Item,
    link::LinkId,
    links::STRANGERS,
    machine::{Config, Counters, Input, LinkInfo, Mesh, Output},
    peers::{PeerRecord, PeerSet},
    transport::{self, Credential, Event, Opened, Pulse, Wires},
    wire::Frame,
};
use crate::{
    identity,
    mesh::dial::Trouble,
    types::{Incarnation, PeerAddress, PeerName},
};
use anyhow::Context;
use rustls::pki_types::UnixTime;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{sleep_until, timeout},
};

/// What the mesh has for the subjects.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// Items of one channel that were new; only each one's newest state.
    Items {
        channel: String,
        items: Vec<Item>,
    },
    Unicast {
        from: PeerName,
        channel: String,
        body: Vec<u8>,
    },
    /// Who shares the universe at the start, as a peer has told; it comes before the first items.
    Seeds(Vec<PeerName>),
    /// The first exchange is done, or there is nobody to have one with.
    Joined,
    /// A peer has told all that it knows, for the first time; it came before. After [`Incoming::Joined`].
    Contact,
    /// This agent must not run.
    Fatal(String),
}

/// How to talk to the task; cheap to clone. When all are dropped, the task stops.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    peers: watch::Receiver<Arc<PeerSet>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mesh has stopped")]
pub struct Stopped;

/// How things are, for display and metrics.
#[derive(Clone, Debug)]
pub struct Status {
    pub joined: bool,
    pub links: Vec<LinkInfo>,
    /// Those that we want to reach and don't, and why.
    pub troubles: Vec<Trouble>,
    /// Who was turned away of late, or sent what it may not.
    pub refusals: Vec<(String, String)>,
    pub counters: Counters,
}

enum Command {
    Input(Input),
    Heard(PeerName),
    Moved(BTreeSet<IpAddr>),
    Status(oneshot::Sender<Status>),
    Items(oneshot::Sender<Vec<Item>>),
    Stop,
}

/// Starts the mesh on listeners that are bound already. Without an identity in the configuration its links are in clear.
///
/// # Errors
/// A listener cannot be used.
pub fn spawn(
    config: Config,
    listeners: Vec<TcpListener>,
) -> anyhow::Result<(Handle, mpsc::Receiver<Incoming>)> {
    let now = Instant::now();
    let (commands, command_queue) = mpsc::channel(COMMANDS);
    let (incoming_tx, incoming) = mpsc::channel(INCOMING);
    let (events_tx, events) = mpsc::channel(EVENTS);
    let progress = Arc::new(Notify::new());
    let wires = Wires {
        identity: config.identity.clone(),
        events: events_tx,
        progress: progress.clone(),
        next_link: Arc::default(),
    };
    let limit = Arc::new(Semaphore::new(config.max_links + 4 * STRANGERS));
    let mut servers = Servers::default();
    for listener in listeners {
        let address = listener.local_addr().context("control listener")?;
        servers.start(listener, &wires, &limit).with_context(|| format!("control listener {address}"))?;
    }
    let mesh = Mesh::new(config, now);
    let (peers_tx, peers) = watch::channel(Arc::new(mesh.peers().clone()));
    let links = BTreeMap::new();
    let task = Task {
        mesh,
        wires,
        links,
        dials: JoinSet::new(),
        pending: VecDeque::new(),
        peers: peers_tx,
        ended: false,
    };
    tokio::spawn(task.run(command_queue, events, incoming_tx, servers));
    Ok((Handle { commands, peers }, incoming))
}

impl Handle {
    /// Publishes items that are newer than what was published before; waits while the queue is full.
    pub async fn publish(&self, items: Vec<Item>) -> Result<(), Stopped> {
        self.input(Input::Publish(items)).await
    }

    /// Sends a message to one peer, as well as it goes: who asks, asks again.
    pub async fn unicast(&self, to: PeerName, channel: &str, body: Vec<u8>) -> Result<(), Stopped> {
        self.input(Input::Unicast { to, channel: channel.into(), body }).await
    }

    /// Changes the own record; its name, rank, neighbours' names and `left` stay as they are. Its version is raised if
    /// something did change.
    pub async fn update_record(
        &self,
        change: impl FnOnce(&mut PeerRecord) + Send + 'static,
    ) -> Result<(), Stopped> {
        self.input(Input::Update(Box::new(change))).await
    }

    /// A peer gave another sign of life than gossip: it may be called at once, and is where its link is still.
    pub async fn heard(&self, peer: PeerName) -> Result<(), Stopped> {
        self.commands.send(Command::Heard(peer)).await.map_err(|_| Stopped)
    }

    /// This host has not those addresses any more: links that run from them end, and are made anew.
    pub async fn moved(&self, gone: BTreeSet<IpAddr>) -> Result<(), Stopped> {
        self.commands.send(Command::Moved(gone)).await.map_err(|_| Stopped)
    }

    /// These are the addresses to look for peers at, instead of those before.
    pub async fn bootstrap(&self, addresses: Vec<PeerAddress>) -> Result<(), Stopped> {
        self.input(Input::Bootstrap(addresses)).await
    }

    /// Who shares the universe at the start is known now.
    pub async fn seeds(&self, seeds: Vec<PeerName>) -> Result<(), Stopped> {
        self.input(Input::Seeds(seeds)).await
    }

    /// A peer is dead up to that incarnation: it is called no more, and shown no more unless it comes back.
    pub async fn forget(&self, name: PeerName, incarnation: Incarnation) -> Result<(), Stopped> {
        self.input(Input::Forget { name, incarnation }).await
    }

    /// Tells the peers that this agent leaves for good, and stops.
    pub async fn leave(&self) {
        let _ = self.input(Input::Leave).await;
        self.commands.closed().await;
    }

    /// Stops without leaving; the listeners' ports are free afterwards.
    pub async fn stop(&self) {
        let _ = self.commands.send(Command::Stop).await;
        self.commands.closed().await;
    }

    pub fn peers(&self) -> watch::Receiver<Arc<PeerSet>> {
        self.peers.clone()
    }

    pub async fn status(&self) -> Result<Status, Stopped> {
        let (tx, rx) = oneshot::channel();
        self.commands.send(Command::Status(tx)).await.map_err(|_| Stopped)?;
        rx.await.map_err(|_| Stopped)
    }

    /// Everything that is known, to be kept for [`Config::items`] of the next start.
    pub async fn items(&self) -> Result<Vec<Item>, Stopped> {
        let (tx, rx) = oneshot::channel();
        self.commands.send(Command::Items(tx)).await.map_err(|_| Stopped)?;
        rx.await.map_err(|_| Stopped)
    }

    async fn input(&self, input: Input) -> Result<(), Stopped> {
        self.commands.send(Command::Input(input)).await.map_err(|_| Stopped)
    }
}

struct Task {
    mesh: Mesh,
    wires: Wires,
    links: BTreeMap<LinkId, Wire>,
    dials: JoinSet<()>,
    /// What is to be told beside news of items.
    pending: VecDeque<Incoming>,
    peers: watch::Sender<Arc<PeerSet>>,
    ended: bool,
}

struct Wire {
    local: IpAddr,
    pulse: Pulse,
    credential: Option<Arc<Credential>>,
    outgoing: mpsc::Sender<Frame>,
    left: Arc<AtomicUsize>,
    reader: JoinHandle<()>,
}

impl Task {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut events: mpsc::Receiver<Event>,
        incoming: mpsc::Sender<Incoming>,
        servers: Servers,
    ) {
        let (progress, mut keys) = (self.wires.progress.clone(), self.wires.identity.clone());
        self.handle(Input::Wake);
        loop {
            let told_all = self.pending.is_empty() && (self.ended || !self.mesh.has_news());
            if self.ended && (told_all || incoming.is_closed()) {
                break;
            }
            let wake = self.mesh.next_wake().unwrap_or_else(|| Instant::now() + LONG);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Input(input)) => self.handle(input),
                    Some(Command::Heard(peer)) => self.heard(peer),
                    Some(Command::Moved(gone)) => {
                        self.hang_up("its address here is gone", |_, wire| gone.contains(&wire.local));
                    }
                    Some(Command::Status(reply)) => drop(reply.send(self.status())),
                    Some(Command::Items(reply)) => drop(reply.send(self.mesh.items().cloned().collect())),
                    Some(Command::Stop) | None => break,
                },
                Some(event) = events.recv() => {
                    self.event(event);
                    for _ in 0..EVENTS {
                        let Ok(event) = events.try_recv() else { break };
                        self.event(event);
                    }
                }
                () = progress.notified() => self.progress(),
                () = identity::task::changed(&mut keys) => self.judge_links(),
                Ok(permit) = incoming.reserve(), if !told_all => {
                    if let Some(news) = self.next_incoming() {
                        permit.send(news);
                    }
                }
                () = sleep_until(wake.into()) => self.handle(Input::Wake),
            }
            while self.dials.try_join_next().is_some() {}
        }
        self.dials.shutdown().await;
        // Without their wires the links end once what is queued has left, on our side and then on the other.
        let mut readers: Vec<_> =
            std::mem::take(&mut self.links).into_values().map(|wire| wire.reader).collect();
        servers.stop().await;
        let ended = async {
            for reader in &mut readers {
                let _ = reader.await;
            }
        };
        let _ = timeout(LINGER, ended).await;
        readers.iter().for_each(JoinHandle::abort);
    }

    fn handle(&mut self, input: Input) {
        self.mesh.handle(input, Instant::now());
        let mut peers_changed = false;
        while let Some(output) = self.mesh.poll_output() {
            match output {
                Output::Dial { target, addresses } => {
                    let own: Vec<SocketAddr> =
                        self.mesh.peers().own().endpoints.iter().map(|e| e.0).collect();
                    let wires = self.wires.clone();
                    self.dials.spawn(async move {
                        let event = match transport::call(target.clone(), &addresses, &own, &wires).await {
                            Ok(opened) => Event::Opened(Box::new(opened)),
                            Err(error) => Event::DialFailed { target, reason: format!("{error:#}") },
                        };
                        let _ = wires.events.send(event).await;
                    });
                }
                Output::Send { link, frame } => {
                    let sent =
                        self.links.get(&link).is_some_and(|wire| wire.outgoing.try_send(frame).is_ok());
                    if !sent && self.links.contains_key(&link) {
                        tracing::debug!(%link, "a frame is lost: the link is ending");
                    }
                }
                Output::Close { link } => self.close(link),
                Output::Unicast { from, channel, body } => {
                    if self.pending.len() < UNICASTS {
                        self.pending.push_back(Incoming::Unicast { from, channel, body });
                    }
                }
                Output::PeersChanged => peers_changed = true,
                Output::Seeds(seeds) => self.pending.push_back(Incoming::Seeds(seeds)),
                Output::Joined => self.pending.push_back(Incoming::Joined),
                Output::Contact => self.pending.push_back(Incoming::Contact),
                Output::Left => {
                    self.pending.clear();
                    self.ended = true;
                }
                Output::Fatal(reason) => {
                    self.pending.push_back(Incoming::Fatal(reason));
                    self.ended = true;
                }
            }
        }
        if peers_changed {
            self.peers.send_replace(Arc::new(self.mesh.peers().clone()));
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Opened(opened) => {
                let Opened {
                    link,
                    dialled,
                    remote,
                    local,
                    pulse,
                    credential,
                    frames,
                    outgoing,
                    left,
                    channel,
                } = *opened;
                let certified = credential.as_ref().map(|credential| credential.names.clone());
                let reader = tokio::spawn(transport::read(link, frames, channel, self.wires.events.clone()));
                self.links.insert(link, Wire { local, pulse, credential, outgoing, left, reader });
                self.handle(Input::Opened { link, dialled, remote: remote.to_string(), certified });
            }
            Event::DialFailed { target, reason } => self.handle(Input::DialFailed { target, reason }),
            Event::TurnedAway { remote, reason } => {
                self.handle(Input::TurnedAway { who: remote.ip().to_string(), reason });
            }
            Event::Frame { link, frame } => self.handle(Input::Frame { link, frame }),
            Event::Closed { link, reason } => {
                self.links.remove(&link);
                self.handle(Input::Closed { link, reason });
            }
        }
    }

    /// Keys have changed: what we sealed is sealed anew; links stay up, but those whose certificate is not believed any more.
    fn judge_links(&mut self) {
        let Some(current) = &self.wires.identity else { return };
        let (trust, now) = (current.borrow().identity.trust().clone(), UnixTime::now());
        let denied = |(link, wire): (&LinkId, &Wire)| {
            let error = trust.verify(&wire.credential.as_ref()?.chain, now).err()?;
            Some((*link, identity::explain(&error)))
        };
        for (link, reason) in self.links.iter().filter_map(denied).collect::<Vec<_>>() {
            self.handle(Input::Denied { link, reason });
        }
        self.handle(Input::Rekeyed);
    }

    /// A link that has been still for a while is most likely dead, as its peer is not: another is made.
    fn heard(&mut self, peer: PeerName) {
        let with = |link: &LinkInfo| link.peer.as_ref().is_some_and(|(name, _)| *name == peer);
        let links: BTreeSet<_> = self.mesh.links().iter().filter(|link| with(link)).map(|l| l.id).collect();
        let still = |link: &LinkId, wire: &Wire| links.contains(link) && wire.pulse.is_still();
        self.hang_up("it was still for too long, while the peer answers probes", still);
        self.handle(Input::Heard(peer));
    }

    fn hang_up(&mut self, reason: &str, which: impl Fn(&LinkId, &Wire) -> bool) {
        let links: Vec<_> =
            self.links.iter().filter(|(link, wire)| which(link, wire)).map(|(link, _)| *link).collect();
        for link in links {
            self.close(link);
            self.handle(Input::Closed { link, reason: reason.into() });
        }
    }

    /// Ends our half after what is queued, and gives the other end a moment to end its own.
    fn close(&mut self, link: LinkId) {
        if let Some(Wire { mut reader, .. }) = self.links.remove(&link) {
            tokio::spawn(async move {
                if timeout(LINGER, &mut reader).await.is_err() {
                    reader.abort();
                }
            });
        }
    }

    fn progress(&mut self) {
        let left = |(link, wire): (&LinkId, &Wire)| (*link, wire.left.swap(0, Ordering::Relaxed));
        let moved: Vec<_> = self.links.iter().map(left).filter(|(_, frames)| *frames > 0).collect();
        for (link, frames) in moved {
            self.handle(Input::Sent { link, frames });
        }
    }

    /// News of items first: who hears of [`Incoming::Contact`] has heard all that the first exchange brought.
    fn next_incoming(&mut self) -> Option<Incoming> {
        match self.mesh.next_news() {
            Some((channel, items)) if !self.ended => Some(Incoming::Items { channel, items }),
            _ => self.pending.pop_front(),
        }
    }

    fn status(&self) -> Status {
        Status {
            joined: self.mesh.joined(),
            links: self.mesh.links(),
            troubles: self.mesh.troubles(),
            refusals: self.mesh.refusals(Instant::now()),
            counters: self.mesh.counters().clone(),
        }
    }
}

#[derive(Default)]
struct Servers {
    accepting: JoinSet<()>,
    serving: JoinSet<()>,
    stop: Arc<Notify>,
}

impl Servers {
    fn start(&mut self, listener: TcpListener, wires: &Wires, limit: &Arc<Semaphore>) -> anyhow::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (accept, connections) = transport::accept(listener, limit.clone(), wires.clone());
        self.accepting.spawn(accept);
        let (wires, stopped) = (wires.clone(), self.stop.clone().notified_owned());
        self.serving.spawn(async move {
            if let Err(error) = transport::serve(wires, connections, stopped).await {
                tracing::error!(%error, "the control server has ended");
            }
        });
        Ok(())
    }

    /// Frees the ports, then gives the connections a moment to end.
    async fn stop(mut self) {
        self.accepting.shutdown().await;
        self.stop.notify_waiters();
        let ended = async { while self.serving.join_next().await.is_some() {} };
        let _ = timeout(LINGER, ended).await;
    }
}

/// Inputs from the subjects that may wait.
const COMMANDS: usize = 256;
/// Frames and other events that may wait; readers wait beyond, and with them the peers.
const EVENTS: usize = 256;
/// Batches that the subjects have not taken; beyond, news merge and unicasts wait in a queue of their own.
const INCOMING: usize = 16;
/// Unicasts that wait for the subjects; beyond they are dropped, as on any other part of their way.
const UNICASTS: usize = 1024;
/// How long a link that we end may take to end on the other side.
const LINGER: Duration = Duration::from_secs(1);
/// When the machine wants nothing.
const LONG: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests;
