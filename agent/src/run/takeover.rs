//! Taking over from the agent that runs, and handing over to the next.
//!
//! ```text
//!   next                                        runs
//!    ├──────────────── Request ──────────────▶ │ agrees?
//!    │                                         │ ends: API, mesh, allocator, state file; packets go on
//!    │ ◀── identity, sockets, items ────────── │
//!    │ starts all but the data path            │
//!    ├──────────────── Resume ───────────────▶ │ ends: workers, handshakes
//!    │ ◀── sessions ────────────────────────── │ rests
//!    │ starts the data path                    ▼
//! ```
//! No two ever seal with one key, write one state file or answer one call: what one starts, the other has ended. Meanwhile
//! packets and calls wait in queues of the kernel's, which the descriptors keep open.

use super::Config;
use crate::{
    config::Encryption,
    datapath::{
        self,
        handshake::{self, Estate},
    },
    linux::seqpacket::{Connection, Listener, MAX_DESCRIPTORS},
    mesh::{gossip::Item, peers::PeerRecord},
    types::{DataId, Incarnation},
};
use anyhow::{Context, anyhow, bail, ensure};
use prost::Message;
use std::{
    net::TcpListener,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::Arc,
    time::Duration,
};
use tokio::task::spawn_blocking;
use weft_proto::takeover::{Agent, Done, Part, Request, Resume, Sockets, part, sockets::Kind};
use zeroize::Zeroize;

/// Where the next agent asks for it.
pub struct Door {
    listener: Listener,
    /// What fits.
    ours: Request,
}

/// The next agent, seen by the one that runs.
pub struct Successor(Arc<Connection>);

/// The agent that runs, seen by the next.
pub struct Predecessor(Arc<Connection>);

/// What all but the data path goes on with.
pub struct Inheritance {
    pub incarnation: Incarnation,
    /// Above that of the last record.
    pub version: u64,
    pub data_id: DataId,
    pub items: Vec<Item>,
    pub control: TcpListener,
    pub metrics: TcpListener,
    pub local: UnixListener,
    pub workers: Vec<datapath::task::Descriptors>,
}

/// Listeners that stay open while nobody serves them.
pub struct Listeners {
    pub control: OwnedFd,
    pub metrics: OwnedFd,
    pub local: OwnedFd,
}

impl Door {
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        let path = config.run_dir.join(SOCKET);
        let listener =
            Listener::bind(&path).with_context(|| format!("--run-dir: listen on {}", path.display()))?;
        Ok(Self { listener, ours: request(config) })
    }

    /// Waits for the next agent that fits; others are told why not.
    pub async fn knock(&self) -> Successor {
        loop {
            let asked = async {
                let connection = Arc::new(self.listener.accept(PATIENCE).await?);
                let request: Request = receive(&connection).await?.context("it said nothing")?.0;
                anyhow::Ok((Successor(connection), refusal(&request, &self.ours)))
            };
            match asked.await {
                Ok((successor, None)) => return successor,
                Ok((successor, Some(refusal))) => {
                    tracing::warn!(refusal, "the next agent is refused");
                    if let Err(error) = successor.send(part::Part::Refused(refusal), &[]).await {
                        tracing::debug!(%error, "it is gone");
                    }
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "somebody asked to take over, but");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

impl Successor {
    /// Hands over all but what packets need.
    pub async fn hand_over(
        &self,
        agent: Agent,
        listeners: &Listeners,
        workers: &[datapath::task::Descriptors],
        items: Vec<Item>,
    ) -> anyhow::Result<()> {
        self.send(part::Part::Agent(agent), &[]).await?;
        let Listeners { control, metrics, local } = listeners;
        for (kind, listener) in [(Kind::Control, control), (Kind::Metrics, metrics), (Kind::Local, local)] {
            self.sockets(kind, std::slice::from_ref(listener)).await?;
        }
        for worker in workers {
            self.sockets(Kind::Queues, &worker.queues).await?;
            self.sockets(Kind::Lanes, &worker.lanes).await?;
        }
        for item in items {
            let item = weft_proto::mesh::Item::from(item);
            self.send(part::Part::Item(item.encode_to_vec()), &[]).await?;
        }
        self.send(part::Part::Done(Done::default()), &[]).await
    }

    /// Waits until it is ready to carry packets.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let resume: Option<(Resume, _)> = receive(&self.0).await?;
        resume.map(drop).context("the next agent has ended before it had taken over; its log says why")
    }

    /// Hands over the sessions; nobody here may use them any more.
    pub async fn hand_over_sessions(&self, mut estate: Estate) -> anyhow::Result<()> {
        while let Some(peer) = estate.peers.pop() {
            let mut part = Part { part: Some(part::Part::Peer(peer)) };
            let sent = send(&self.0, &part, &[]).await;
            if let Some(part::Part::Peer(peer)) = &mut part.part {
                handshake::forget(peer);
            }
            sent?;
        }
        self.send(part::Part::Done(Done { moment: estate.moment }), &[]).await
    }

    async fn sockets(&self, kind: Kind, descriptors: &[OwnedFd]) -> anyhow::Result<()> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.send(part::Part::Sockets(Sockets { kind: kind.into() }), &descriptors).await
    }

    async fn send(&self, part: part::Part, descriptors: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        send(&self.0, &Part { part: Some(part) }, descriptors).await
    }
}

impl Predecessor {
    /// Asks the agent that runs, if one does, for all but what packets need.
    ///
    /// # Errors
    /// Why it refuses; it goes on then.
    pub async fn find(config: &Config) -> anyhow::Result<Option<(Self, Inheritance)>> {
        let path = config.run_dir.join(SOCKET);
        let connected = Connection::connect(&path, PATIENCE)
            .with_context(|| format!("--takeover: ask the agent on {}", path.display()))?;
        let Some(connection) = connected else { return Ok(None) };
        let predecessor = Self(Arc::new(connection));
        let taken = predecessor.take(config).await;
        let inheritance = taken.context("--takeover: the agent that runs does not hand over")?;
        Ok(Some((predecessor, inheritance)))
    }

    async fn take(&self, config: &Config) -> anyhow::Result<Inheritance> {
        send(&self.0, &request(config), &[]).await?;
        let (part::Part::Agent(agent), _) = self.part().await? else { bail!("it does not say who it is") };
        let mut inheritance = Gathered::default();
        loop {
            match self.part().await? {
                (part::Part::Sockets(sockets), descriptors) => {
                    inheritance.sockets(sockets.kind(), descriptors)
                }
                (part::Part::Item(item), _) => {
                    let item = weft_proto::mesh::Item::decode(item.as_slice()).context("an item")?;
                    inheritance.items.push(item.into());
                }
                (part::Part::Done(_), _) => return inheritance.whole(agent),
                (part, _) => bail!("it sends what was not asked for: {part:?}"),
            }
        }
    }

    /// Ends its data path and takes the sessions.
    pub async fn sessions(self) -> anyhow::Result<Estate> {
        send(&self.0, &Resume { ready: true }, &[]).await?;
        let mut estate = Estate::default();
        loop {
            match self.part().await.context("take over the sessions")?.0 {
                part::Part::Peer(peer) => estate.peers.push(peer),
                part::Part::Done(done) => {
                    estate.moment = done.moment;
                    return Ok(estate);
                }
                part => {
                    bail!("take over the sessions: the agent before sends what was not asked for: {part:?}")
                }
            }
        }
    }

    async fn part(&self) -> anyhow::Result<(part::Part, Vec<OwnedFd>)> {
        let received: Option<(Part, _)> = receive(&self.0).await?;
        let (Part { part }, descriptors) = received.context("it has ended; its log says why")?;
        match part.context("it says what this version does not know")? {
            part::Part::Refused(why) => bail!(why),
            part => Ok((part, descriptors)),
        }
    }
}

/// An inheritance that comes bit by bit.
#[derive(Default)]
struct Gathered {
    listeners: [Option<OwnedFd>; 3],
    workers: Vec<datapath::task::Descriptors>,
    items: Vec<Item>,
}

impl Gathered {
    fn sockets(&mut self, kind: Kind, mut descriptors: Vec<OwnedFd>) {
        match kind {
            Kind::Control => self.listeners[0] = descriptors.pop(),
            Kind::Metrics => self.listeners[1] = descriptors.pop(),
            Kind::Local => self.listeners[2] = descriptors.pop(),
            Kind::Queues => {
                self.workers.push(datapath::task::Descriptors { queues: descriptors, lanes: Vec::new() });
            }
            Kind::Lanes => self.workers.iter_mut().next_back().into_iter().for_each(|worker| {
                worker.lanes = std::mem::take(&mut descriptors);
            }),
            Kind::Unspecified => {}
        }
    }

    fn whole(self, agent: Agent) -> anyhow::Result<Inheritance> {
        let Self { listeners: [Some(control), Some(metrics), Some(local)], workers, items } = self else {
            bail!("a listener is missing")
        };
        let whole = workers.iter().all(|worker| !worker.queues.is_empty() && !worker.lanes.is_empty());
        ensure!(
            whole && !workers.is_empty() && workers.len() == agent.workers as usize,
            "a worker is missing"
        );
        Ok(Inheritance {
            incarnation: Incarnation(agent.incarnation),
            version: agent.version.saturating_add(AHEAD),
            data_id: DataId(agent.data_id),
            items,
            control: control.into(),
            metrics: metrics.into(),
            local: local.into(),
            workers,
        })
    }
}

/// What the next agent is to be taken for.
pub fn agent(own: &PeerRecord, workers: usize) -> Agent {
    Agent {
        incarnation: own.incarnation.0,
        version: own.version,
        data_id: own.data_id.0,
        workers: u32::try_from(workers).unwrap_or(u32::MAX),
    }
}

/// What must be the same.
fn request(config: &Config) -> Request {
    Request {
        protocol: PROTOCOL,
        name: config.name.to_string(),
        universe: config.universe.to_string(),
        listen: config.listen.to_string(),
        metrics: config.metrics.to_string(),
        sealed: config.encryption == Encryption::Required,
    }
}

fn refusal(theirs: &Request, ours: &Request) -> Option<String> {
    let encryption = |sealed: bool| if sealed { "required" } else { "off" }.to_owned();
    let protocol = |request: &Request| request.protocol.to_string();
    let differs = [
        ("the takeover protocol", protocol(theirs), protocol(ours)),
        ("--name", theirs.name.clone(), ours.name.clone()),
        ("--universe", theirs.universe.clone(), ours.universe.clone()),
        ("--listen", theirs.listen.clone(), ours.listen.clone()),
        ("--metrics-addr", theirs.metrics.clone(), ours.metrics.clone()),
        ("--encryption", encryption(theirs.sealed), encryption(ours.sealed)),
    ];
    let (what, theirs, ours) = differs.into_iter().find(|(_, theirs, ours)| theirs != ours)?;
    Some(format!(
        "{what} is {theirs} with the next agent and {ours} with the one that runs: that cannot change in a takeover; \
         stop the one that runs first"
    ))
}

async fn send(
    connection: &Arc<Connection>,
    message: &impl Message,
    descriptors: &[BorrowedFd<'_>],
) -> anyhow::Result<()> {
    ensure!(descriptors.len() <= MAX_DESCRIPTORS, "too many descriptors for one message");
    let mut bytes = message.encode_to_vec();
    // Small, to a socket whose other end is waiting for it: it does not keep the runtime.
    let sent = connection.send(&bytes, descriptors);
    bytes.zeroize();
    sent.map_err(|error| anyhow!("send it to the other agent: {error}"))
}

/// None when the other end is gone.
async fn receive<M: Message + Default>(
    connection: &Arc<Connection>,
) -> anyhow::Result<Option<(M, Vec<OwnedFd>)>> {
    let connection = connection.clone();
    let received = spawn_blocking(move || connection.receive()).await?;
    let (mut bytes, descriptors) = received.context("hear the other agent")?;
    let message = M::decode(bytes.as_slice()).context("the other agent's words");
    let gone = bytes.is_empty() && descriptors.is_empty();
    bytes.zeroize();
    Ok(if gone { None } else { Some((message?, descriptors)) })
}

/// In the run directory.
pub const SOCKET: &str = "takeover.sock";
const PROTOCOL: u32 = 1;
/// How long each waits for the other's next word; the one that ends first answers calls under way.
const PATIENCE: Duration = Duration::from_secs(20);
/// After somebody asked who was none of us.
const PAUSE: Duration = Duration::from_millis(100);
/// So much higher is the first record's version: the one before may have said more meanwhile.
const AHEAD: u64 = 1000;
