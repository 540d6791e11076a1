//! Keeps the kernel's table as the index says: on request, and whenever somebody else changes it.
//!
//! ```text
//!   Handle ──changes of the index──▶ ┌────────┐ compile ▸ `nft -f -` ▸ read back ▸ end what is forbidden
//!          ◀──once in force───────── │ Worker │ ◀──somebody else's nftables events: the table is made anew
//!                                    └────────┘
//! ```
//! Changes that wait together share one transaction, which holds wholly or not at all. Until what the cluster says has been
//! heard once the kernel keeps what the agent before this one has left there.
//!
//! Where `nft` and kernel can, one `nft` stays for all changes, and the table is its own: no other program's flush takes it
//! away, and when it ends the table stays, for the `nft` of the next agent.

use super::{
    compile::Compiler,
    counts::{self, Count, Counts, Tally},
    explain::{Explanation, explain},
    index::Index,
    model::{Flow, Protocol, Service},
    render::{REVISION, Renderer, gone},
    rules::Change,
};
use crate::{
    linux::{
        netlink::{Connection, Conntrack, Event, Monitor},
        nft::{Nft, NftError, Session},
    },
    types::{POLICY_TABLE, PodRef},
};
use anyhow::{Context, bail};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use serde_json::Value;
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{debug, info, warn};

/// Speaks to the task. It ends with the last handle; the rules stay in force.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Arc<Status>>,
    counts: watch::Receiver<Arc<Counts>>,
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// This node's pods whose policies are in force.
    pub pods: BTreeMap<IpAddr, PodRef>,
    /// What could not be done; it is tried again.
    pub error: Option<String>,
    /// How often the table had to be made anew because somebody else changed it.
    pub repairs: u64,
    /// How many policies isolate pods of this node.
    pub policies: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("policies are not in force: {0}")]
    Failed(String),
    #[error("the task of network policies has stopped")]
    Stopped,
}

/// Works in the calling thread's network namespace, with a file in which scripts may be for `nft`.
///
/// # Errors
/// There is no `nft`, or no permission.
pub async fn spawn(index: Index, log: Option<u16>, script: PathBuf) -> anyhow::Result<Handle> {
    let nft = Nft::find()?;
    let owned = nft.knows_owners().await;
    let monitor = Monitor::open()?;
    let conntrack = Conntrack::open().context("open the connection table")?;
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let (sender, status) = watch::channel(Arc::default());
    let (counted, counts) = watch::channel(Arc::default());
    let worker = Worker {
        nft,
        session: None,
        script,
        owned,
        monitor,
        conntrack: Arc::new(Mutex::new(conntrack)),
        index,
        compiler: Compiler::default(),
        renderer: Renderer::new(log, owned),
        revision: 0,
        table: Table::Unknown,
        processes: VecDeque::new(),
        commands: receiver,
        status: sender,
        tally: Tally::default(),
        counted,
        retry: None,
    };
    tokio::spawn(worker.run());
    Ok(Handle { commands, status, counts })
}

/// Takes the table away that an agent before this one may have left.
///
/// # Errors
/// No permission.
pub async fn remove() -> anyhow::Result<()> {
    match Nft::find() {
        // Nobody has made one then.
        Err(NftError::Missing) => Ok(()),
        nft => {
            let nft = nft?;
            let gone = gone(nft.knows_owners().await);
            nft.run(&gone, |_| {}).await.context("remove the table of network policies")
        }
    }
}

impl Handle {
    /// Changes what is known, and returns once what follows from it is in force.
    ///
    /// # Errors
    /// It is not in force; it is tried again.
    pub async fn update(&self, change: impl FnOnce(&mut Index) + Send + 'static) -> Result<(), PolicyError> {
        self.ask(|answer| Command::Update(Box::new(change), answer)).await?
    }

    /// What policies say of a flow, as far as is known here.
    pub async fn explain(&self, flow: Flow) -> Result<Explanation, PolicyError> {
        self.ask(|answer| Command::Explain(flow, answer)).await
    }

    /// Asks what is known.
    pub async fn look<T: Send + 'static>(
        &self,
        at: impl FnOnce(&Index) -> T + Send + 'static,
    ) -> Result<T, PolicyError> {
        let (answer, answered) = oneshot::channel();
        let look = move |index: &Index| drop(answer.send(at(index)));
        self.commands.send(Command::Look(Box::new(look))).await.map_err(|_| PolicyError::Stopped)?;
        answered.await.map_err(|_| PolicyError::Stopped)
    }

    /// What policies have let begin and what they have dropped until now.
    pub async fn counts(&self) -> Result<Arc<Counts>, PolicyError> {
        self.ask(Command::Count).await?
    }

    /// The same for scrapes, some seconds old.
    pub fn metrics(&self) -> Metrics {
        Metrics(self.counts.clone())
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, PolicyError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| PolicyError::Stopped)?;
        answered.await.map_err(|_| PolicyError::Stopped)
    }
}

/// Shows the counts as they were read last.
#[derive(Debug)]
pub struct Metrics(watch::Receiver<Arc<Counts>>);

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        counts::encode(&self.0.borrow(), encoder)
    }
}

type Answer<T> = oneshot::Sender<Result<T, PolicyError>>;

enum Command {
    Update(Box<dyn FnOnce(&mut Index) + Send>, Answer<()>),
    Explain(Flow, oneshot::Sender<Explanation>),
    Look(Box<dyn FnOnce(&Index) + Send>),
    Count(Answer<Arc<Counts>>),
}

struct Worker {
    nft: Nft,
    /// The table is a session's own, which there is as long as there is a table.
    owned: bool,
    session: Option<Session>,
    /// The file for its scripts.
    script: PathBuf,
    monitor: Monitor,
    conntrack: Arc<Mutex<Conntrack>>,
    index: Index,
    compiler: Compiler,
    renderer: Renderer,
    revision: u32,
    table: Table,
    /// The last processes that changed the table for us: their events are no news.
    processes: VecDeque<u32>,
    commands: mpsc::Receiver<Command>,
    status: watch::Sender<Arc<Status>>,
    tally: Tally,
    counted: watch::Sender<Arc<Counts>>,
    retry: Option<Instant>,
}

/// What the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    Unknown,
    /// None, as long as no policy isolates a pod of this node: nobody pays for what nobody uses.
    Absent,
    /// The one that the renderer has written.
    Written,
}

impl Worker {
    async fn run(mut self) {
        let mut count = interval(COUNTED);
        count.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = count.tick() => if let Err(error) = self.count().await {
                    debug!(%error, "the counters of network policies were not read");
                },
                events = self.monitor.next() => match events {
                    Ok(events) => self.on_events(&events).await,
                    Err(error) => {
                        warn!(%error, "the kernel's events cannot be read; watching them anew");
                        match Monitor::open() {
                            Ok(monitor) => self.monitor = monitor,
                            Err(error) => return warn!(%error, "policies are no longer kept up"),
                        }
                        self.on_events(&[Event::Lost]).await;
                    }
                },
                command = self.commands.recv() => {
                    let Some(command) = command else { return };
                    self.on_commands(command).await;
                }
                () = sleep_until(self.retry.unwrap_or_else(Instant::now)), if self.retry.is_some() => {
                    // What still fails has been told.
                    let _ = self.enforce().await;
                }
            }
        }
    }

    async fn on_events(&mut self, events: &[Event]) {
        let foreign = |event: &Event| match event {
            Event::Firewall { table, by, .. } => table == POLICY_TABLE && !self.processes.contains(by),
            Event::Lost => true,
            _ => false,
        };
        if self.index.is_complete() && events.iter().any(foreign) {
            self.table = Table::Unknown;
            if self.enforce().await.is_ok() {
                info!("made the table of network policies anew: somebody else changed it");
                self.tell(|status| status.repairs += 1);
            }
        }
    }

    /// Answers this command and all that wait behind it with one transaction.
    async fn on_commands(&mut self, first: Command) {
        let (mut next, mut answers) = (Some(first), Vec::new());
        while let Some(command) = next.take() {
            match command {
                Command::Update(change, answer) => {
                    change(&mut self.index);
                    answers.push(answer);
                }
                Command::Explain(flow, answer) => drop(answer.send(explain(&self.index, &flow))),
                Command::Look(look) => look(&self.index),
                Command::Count(answer) => drop(answer.send(self.count().await)),
            }
            next = self.commands.try_recv().ok();
        }
        if answers.is_empty() {
            return;
        }
        let done = self.enforce().await;
        answers.into_iter().for_each(|answer| drop(answer.send(done.clone())));
    }

    async fn enforce(&mut self) -> Result<(), PolicyError> {
        self.retry = None;
        if !self.index.is_complete() {
            return Ok(());
        }
        let done = self.follow().await;
        let error = done.as_ref().err().map(|error| format!("{error:#}"));
        if let Some(error) = &error {
            warn!(error, retry = ?RETRY, "network policies are not in force");
            (self.table, self.retry) = (Table::Unknown, Some(Instant::now() + RETRY));
            self.session = None;
        }
        let known = |(address, _): &(&IpAddr, &PodRef)| self.index.knows(**address);
        let pods = self.index.attached().iter().filter(known).map(|(a, pod)| (*a, pod.clone())).collect();
        let policies = self.compiler.rules().chains.len();
        self.tell(|status| {
            if error.is_none() {
                (status.pods, status.policies) = (pods, policies);
            }
            status.error = error.clone();
        });
        error.map_or(Ok(()), |error| Err(PolicyError::Failed(error)))
    }

    async fn follow(&mut self) -> anyhow::Result<()> {
        let changes = self.compiler.follow(&mut self.index);
        let wanted = match self.compiler.rules().targets.is_empty() {
            true => Table::Absent,
            false => Table::Written,
        };
        if wanted == self.table && (changes.is_empty() || wanted == Table::Absent) {
            return Ok(());
        }
        let start = Instant::now();
        self.revision = self.revision.wrapping_add(1);
        let (rules, revision) = (self.compiler.rules(), self.revision);
        let script = match (self.table, wanted) {
            (_, Table::Absent | Table::Unknown) => gone(self.owned),
            (Table::Written, Table::Written) => self.renderer.steps(&changes, revision),
            (_, Table::Written) => self.renderer.table(rules, revision),
        };
        self.write(&script).await?;
        let anew = std::mem::replace(&mut self.table, wanted) != wanted;
        if wanted == Table::Absent {
            self.session = None;
            return Ok(());
        }
        self.read_back().await?;
        debug!(changes = changes.len(), anew, took = ?start.elapsed(), "network policies are in force");
        let deny = self.compiler.rules().deny();
        let narrower = |change: &Change| match change {
            Change::DeleteElement(..) | Change::SetChain(..) | Change::SetTarget(..) => true,
            Change::AddElement(..) => deny,
            _ => false,
        };
        if anew || changes.iter().any(narrower) {
            self.end_forbidden().await;
        }
        Ok(())
    }

    async fn write(&mut self, script: &str) -> Result<(), NftError> {
        let processes = &mut self.processes;
        let remember = |process| {
            processes.truncate(OWN_PROCESSES - 1);
            processes.push_front(process);
        };
        if !self.owned {
            return self.nft.run(script, remember).await;
        }
        let session = match &mut self.session {
            Some(session) => session,
            none => {
                let session = none.insert(self.nft.session(self.script.clone())?);
                session.process().into_iter().for_each(remember);
                session
            }
        };
        session.run(script).await
    }

    async fn read_back(&mut self) -> anyhow::Result<()> {
        let listed = match &mut self.session {
            Some(session) => session.list_set("inet", POLICY_TABLE, REVISION).await?,
            None => self.nft.list_set("inet", POLICY_TABLE, REVISION).await?,
        };
        let listed: Value = serde_json::from_str(&listed).context("read what nft lists")?;
        let items = listed["nftables"].as_array().into_iter().flatten();
        let mut elements = items.filter_map(|item| item["set"]["elem"].as_array()).flatten();
        if !elements.any(|element| element.as_u64() == Some(self.revision.into())) {
            bail!("table inet {POLICY_TABLE} does not hold what was just written to it");
        }
        Ok(())
    }

    /// Ends connections of this node's pods that may not begin any more.
    async fn end_forbidden(&self) {
        let rules = self.compiler.rules();
        let (rules, own) = (rules.clone(), self.index.own().clone());
        let conntrack = self.conntrack.clone();
        let sweep = move || {
            let forbidden = |connection: &Connection| {
                !own.contains(&connection.source)
                    && !own.contains(&connection.destination)
                    && !rules.permit(&flow(connection))
            };
            conntrack.lock().expect("nothing panics with the connection table").end(forbidden)
        };
        match tokio::task::spawn_blocking(sweep).await {
            Ok(Ok(0)) => {}
            Ok(Ok(connections)) => info!(connections, "ended connections that policies forbid now"),
            Ok(Err(error)) => warn!(%error, "connections that policies forbid now could not be ended"),
            Err(error) => warn!(%error, "connections that policies forbid now were not looked at"),
        }
    }

    async fn count(&mut self) -> Result<Arc<Counts>, PolicyError> {
        let failed = |error: String| PolicyError::Failed(error);
        let mut shown = BTreeMap::new();
        if self.table == Table::Written {
            let listed = self.nft.list_counters("inet", POLICY_TABLE).await;
            let listed = listed.map_err(|error| failed(error.to_string()))?;
            let listed: Value = serde_json::from_str(&listed).map_err(|error| failed(error.to_string()))?;
            let mut counters = self.renderer.counters();
            for item in listed["nftables"].as_array().into_iter().flatten() {
                let counter = &item["counter"];
                let number = |key: &str| counter[key].as_u64().unwrap_or_default();
                let name = counter["name"].as_str().unwrap_or_default();
                if let Some(what) = counters.remove(name) {
                    let count = Count { packets: number("packets"), bytes: number("bytes") };
                    shown.insert(name.into(), (what, count));
                }
            }
        }
        self.tally.take_in(shown);
        let index = &self.index;
        self.tally.keep(|policy| match policy.namespace.as_str() {
            "" => index.cluster_policy(&policy.name).is_some(),
            _ => index.policies().contains_key(policy),
        });
        self.counted.send_if_modified(|counts| {
            let differs = **counts != *self.tally.counts();
            if differs {
                *counts = Arc::new(self.tally.counts().clone());
            }
            differs
        });
        Ok(self.counted.borrow().clone())
    }

    fn tell(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_if_modified(|status| {
            let before = status.clone();
            change(Arc::make_mut(status));
            *status != before
        });
    }
}

fn flow(connection: &Connection) -> Flow {
    let Connection { source, destination, protocol, port } = *connection;
    let protocol = Protocol::of_number(protocol);
    Flow { source, destination, to: protocol.map_or(Service::Other, |it| Service::Port(it, port)) }
}

/// A full channel makes callers wait.
const COMMANDS: usize = 256;
/// How often counters are read for scrapes; what a counter has counted since is lost when it goes.
const COUNTED: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(1);
/// Events may come that many processes late.
const OWN_PROCESSES: usize = 16;
