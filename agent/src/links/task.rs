//! Keeps the kernel as it should be: on request, and whenever somebody else changes it.
//!
//! ```text
//!   Handle ──commands──▶ ┌────────┐  round: look ▸ plan ▸ apply   ┌────────┐
//!                        │ Worker │ ────────────────────────────▶ │ kernel │
//!          ◀──answers─── └────────┘ ◀──events, debounced───────── └────────┘
//! ```
//!
//! Commands that wait together share one round. Nothing polls: without events there are no rounds, but for the retries
//! of a change that failed. Our own changes come back as events too; the round after them finds nothing to do.

use super::{
    desired::{Desired, PodPort},
    observed::{Observed, Veth},
    plan::{Change, host_prefix},
    reconcile::{Kernel, Round},
    trouble::troubles,
};
use crate::{
    linux::netlink::{Conntrack, Event, LinkKind, Monitor},
    types::POLICY_TABLE,
};
use anyhow::Context;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tracing::{debug, info, warn};

/// Speaks to the task. It ends with the last handle; what it made stays.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// What could not be set up; it is tried again.
    pub error: Option<String>,
    /// What others did that keeps packets from passing, each as a sentence that names it.
    pub troubles: Vec<String>,
    /// How often something had to be put right that somebody else changed.
    pub repairs: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinksError {
    #[error("there is no veth {0}")]
    NoVeth(String),
    #[error("{0}")]
    Failed(String),
    #[error("the task that sets up links has stopped")]
    Stopped,
}

/// Sets everything up once in the calling thread's network namespace, then keeps it so. What could not be set up is in
/// the [`Status`], and is tried again.
///
/// # Errors
/// There is no `nft`, no permission, or `state_dir` is not readable.
pub async fn spawn(state_dir: PathBuf, desired: Desired) -> anyhow::Result<Handle> {
    let kernel = Kernel::open(&state_dir)?;
    // Before the first look, so that no change is missed.
    let monitor = Monitor::open()?;
    let conntrack = Conntrack::open().context("open the connection table")?;
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let (sender, status) = watch::channel(Status::default());
    let mut worker = Worker {
        kernel,
        monitor,
        conntrack: Arc::new(Mutex::new(conntrack)),
        desired,
        commands: receiver,
        status: sender,
        indices: BTreeSet::new(),
        dirty: None,
        retry: None,
        backoff: RETRY_MIN,
    };
    worker.round(&[]).await;
    tokio::spawn(worker.run());
    Ok(Handle { commands, status })
}

impl Handle {
    /// Changes what is desired, and returns once it is in force.
    pub async fn update(&self, change: impl FnOnce(&mut Desired) + Send + 'static) -> Result<(), LinksError> {
        self.ask(|answer| Command::Update(Box::new(change), answer)).await?
    }

    /// Lets a pod speak through its veth, and returns once it can. The same pod may be attached again.
    ///
    /// # Errors
    /// The veth is missing or something of the pod's could not be set up; then the pod is as it was before.
    pub async fn attach(&self, pod: PodPort) -> Result<(), LinksError> {
        self.ask(|answer| Command::Attach(pod, answer)).await?
    }

    /// Takes a pod's route, firewall elements and veth away. It is fine if there are none.
    pub async fn detach(&self, host_interface: &str) -> Result<(), LinksError> {
        self.ask(|answer| Command::Detach(host_interface.into(), answer)).await?
    }

    /// The veths that carry our alias, attached or not.
    pub async fn veths(&self) -> Result<Vec<Veth>, LinksError> {
        self.ask(Command::Veths).await?
    }

    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, LinksError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| LinksError::Stopped)?;
        answered.await.map_err(|_| LinksError::Stopped)
    }
}

type Answer<T> = oneshot::Sender<Result<T, LinksError>>;

enum Command {
    Update(Box<dyn FnOnce(&mut Desired) + Send>, Answer<()>),
    Attach(PodPort, Answer<()>),
    Detach(String, Answer<()>),
    Veths(Answer<Vec<Veth>>),
}

struct Worker {
    kernel: Kernel,
    monitor: Monitor,
    conntrack: Arc<Mutex<Conntrack>>,
    desired: Desired,
    commands: mpsc::Receiver<Command>,
    status: watch::Sender<Status>,
    /// Of bridge, TUN and pods, when last seen: events often carry no names.
    indices: BTreeSet<u32>,
    dirty: Option<Dirty>,
    retry: Option<Instant>,
    backoff: Duration,
}

/// When the first and the last event came that no round has answered yet.
#[derive(Clone, Copy)]
struct Dirty {
    first: Instant,
    last: Instant,
}

impl Worker {
    async fn run(mut self) {
        loop {
            let wake = self.next_wake();
            tokio::select! {
                events = self.monitor.next() => match events {
                    Ok(events) => self.on_events(events),
                    Err(error) => {
                        warn!(%error, "the kernel's events cannot be read; watching them anew");
                        match Monitor::open() {
                            Ok(monitor) => self.monitor = monitor,
                            Err(error) => return warn!(%error, "links are no longer kept up"),
                        }
                        self.on_events(vec![Event::Lost]);
                    }
                },
                command = self.commands.recv() => {
                    let Some(command) = command else { return };
                    self.on_commands(command).await;
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    self.repair().await;
                }
            }
        }
    }

    fn next_wake(&self) -> Option<Instant> {
        let settled = self.dirty.map(|dirty| (dirty.last + SETTLE).min(dirty.first + SETTLE_MAX));
        [settled, self.retry].into_iter().flatten().min()
    }

    fn on_events(&mut self, events: Vec<Event>) {
        for event in events {
            if !self.concerns_us(&event) {
                continue;
            }
            if matches!(event, Event::Firewall { .. } | Event::Lost) {
                self.kernel.distrust_firewall();
            }
            self.mark_dirty();
        }
    }

    fn mark_dirty(&mut self) {
        let now = Instant::now();
        self.dirty = Some(Dirty { first: self.dirty.map_or(now, |dirty| dirty.first), last: now });
    }

    /// Keeps a busy host's events from waking us for nothing.
    fn concerns_us(&self, event: &Event) -> bool {
        match event {
            // Pods' veths come up before they are attached.
            Event::Link { name, .. } => !name.starts_with("wf") || self.desired.pods.contains_key(name),
            Event::Neighbour { link } => self.indices.contains(link),
            Event::Fdb { port } => self.indices.contains(port),
            Event::Route(route) => {
                let universe = self.desired.universe.prefix();
                route.protocol == crate::linux::netlink::RTPROT_WEFT
                    || route.is_default()
                    || universe.contains(&route.destination)
                    || route.destination.contains(&universe)
            }
            Event::Firewall { table, base_chain, by } => {
                let matters = *base_chain && table != POLICY_TABLE || table == super::firewall::NAME;
                matters && !self.kernel.is_own_nft(*by)
            }
            Event::Address { .. } | Event::Sysctl | Event::Lost => true,
        }
    }

    async fn repair(&mut self) {
        let drifted = self.dirty.take().is_some();
        let Some(round) = self.round(&[]).await else { return };
        // What still fails is no repair, however often it is tried.
        if drifted && round.changes.len() > round.failures.len() {
            self.status.send_modify(|status| status.repairs += 1);
            let changes: Vec<_> = round.changes.iter().map(Change::to_string).collect();
            info!(?changes, "put right what somebody else changed");
        }
    }

    /// Answers this command and all that wait behind it with one round.
    async fn on_commands(&mut self, first: Command) {
        let mut waiting = Some(first);
        while let Some(command) = waiting.take() {
            let mut batch = Batch::default();
            let mut next = Some(command);
            while let Some(command) = next.take() {
                if batch.touches(&command) {
                    waiting = Some(command);
                } else {
                    batch.take(command, &mut self.desired);
                    next = self.commands.try_recv().ok();
                }
            }
            self.answer(batch).await;
        }
    }

    async fn answer(&mut self, batch: Batch) {
        let leaving: Vec<String> = batch.detached.keys().cloned().collect();
        // Before a pod can speak: what it begins must not be forgotten with what is left of the address's last one.
        forget_connections(self.conntrack.clone(), self.taken_over(&batch)).await;
        let round = self.round(&leaving).await;
        let failed = || LinksError::Failed(self.status().error.unwrap_or_default());
        let outcome = |concerns: &dyn Fn(&Change) -> bool| match &round {
            None => Err(failed()),
            Some(round) => match round.failures.iter().find(|failure| concerns(&failure.change)) {
                Some(failure) => Err(LinksError::Failed(format!("{:#}", failure.error))),
                None => Ok(()),
            },
        };
        for answer in batch.updates {
            let _ = answer.send(outcome(&|_| true));
        }
        let freed: Vec<IpAddr> =
            batch.detached.values().flat_map(|(addresses, _)| addresses.clone()).collect();
        for (name, (_, answer)) in batch.detached {
            let of_link = |change: &Change| matches!(change, Change::DeleteLink { link } if *link == name);
            let _ = answer.send(outcome(&of_link));
        }
        for answer in batch.veths {
            let veths = round.as_ref().map(|round| round.observed.veths());
            let _ = answer.send(veths.ok_or_else(failed));
        }
        let mut refused = Vec::new();
        for (name, (before, answer)) in batch.attached {
            let pod = &self.desired.pods[&name];
            let missing = |round: &Round| round.observed.link(&name, LinkKind::Veth).is_none();
            let result = match &round {
                Some(round) if missing(round) => Err(LinksError::NoVeth(name.clone())),
                _ => outcome(&|change| change.concerns(pod, &self.desired.bridge.name))
                    .and_then(|()| self.unhindered(pod, round.as_ref())),
            };
            if result.is_err() {
                refused.push((name, before));
            }
            let _ = answer.send(result);
        }
        for (name, before) in refused {
            self.desired.pods.remove(&name);
            self.desired.pods.extend(before.map(|pod| (name, pod)));
            self.mark_dirty();
        }
        // In the background: nobody gets a freed address for some seconds, and the table may be big.
        tokio::spawn(forget_connections(self.conntrack.clone(), freed));
    }

    /// Addresses of pods that were not attached before.
    fn taken_over(&self, batch: &Batch) -> Vec<IpAddr> {
        let new = batch.attached.iter().flat_map(|(name, (before, _))| {
            let had = |address: &IpAddr| before.as_ref().is_some_and(|pod| pod.addresses.contains(address));
            self.desired.pods[name].addresses.iter().copied().filter(move |address| !had(address))
        });
        new.collect()
    }

    /// A pod can be planned wholly only if nobody else's link or route stands in its way.
    fn unhindered(&self, pod: &PodPort, round: Option<&Round>) -> Result<(), LinksError> {
        let Some(round) = round else { return Ok(()) };
        let bridge = &self.desired.bridge.name;
        let is_bridge =
            |name| round.observed.links.get(name).is_none_or(|link| link.kind == LinkKind::Bridge);
        if !is_bridge(bridge) {
            return Err(LinksError::Failed(format!(
                "the link {bridge} is not a bridge; rename or remove it"
            )));
        }
        let wanted = super::plan::routes::wanted(&self.desired, &round.observed);
        let mut routes = pod.addresses.iter().filter_map(|address| wanted.get(&host_prefix(*address)));
        match routes.find_map(|route| super::plan::routes::foreign_twin(route, &round.observed)) {
            Some(foreign) => {
                Err(LinksError::Failed(format!("the route {foreign} stands in the place of the pod's")))
            }
            None => Ok(()),
        }
    }

    /// One look, plan and application; none if the kernel could not be looked at. Veths in `leaving` are deleted.
    async fn round(&mut self, leaving: &[String]) -> Option<Round> {
        let deletions = |observed: &Observed| {
            let standing = leaving.iter().filter(|name| observed.link(name, LinkKind::Veth).is_some());
            standing.map(|name| Change::DeleteLink { link: name.clone() }).collect()
        };
        let result = self.kernel.round(&self.desired, deletions).await;
        let error = match &result {
            Err(error) => Some(format!("{error:#}")),
            Ok(round) => round.failures.first().map(|failure| format!("{:#}", failure.error)),
        };
        match &error {
            Some(error) => {
                warn!(error, retry = ?self.backoff, "links could not be set up");
                self.retry = Some(Instant::now() + self.backoff);
                self.backoff = (self.backoff * 2).min(RETRY_MAX);
            }
            None => {
                self.retry = None;
                self.backoff = RETRY_MIN;
            }
        }
        if let Ok(round) = &result {
            debug!(changes = round.changes.len(), failures = round.failures.len(), "links were looked at");
            let ours = |name: &String| {
                *name == self.desired.bridge.name
                    || *name == self.desired.tun.name
                    || self.desired.pods.contains_key(name)
            };
            self.indices =
                round.observed.links.values().filter(|link| ours(&link.name)).map(|l| l.index).collect();
        }
        let troubles = result.as_ref().map(|round| troubles(&self.desired, &round.observed));
        self.status.send_if_modified(|status| {
            let before = status.clone();
            status.error = error;
            status.troubles = troubles.unwrap_or_else(|_| before.troubles.clone());
            *status != before
        });
        result.ok()
    }

    fn status(&self) -> Status {
        self.status.borrow().clone()
    }
}

async fn forget_connections(conntrack: Arc<Mutex<Conntrack>>, addresses: Vec<IpAddr>) {
    if addresses.is_empty() {
        return;
    }
    let forget = move || {
        let mut conntrack = conntrack.lock().expect("nothing panics with the connection table");
        for address in addresses {
            match conntrack.forget(address) {
                Ok(connections) => debug!(%address, connections, "forgot an address's connections"),
                Err(error) => warn!(%address, %error, "an address's connections could not be forgotten"),
            }
        }
    };
    // It panics only with the kernel's answers, and then the next call says so.
    let _ = tokio::task::spawn_blocking(forget).await;
}

/// Commands that one round answers.
#[derive(Default)]
struct Batch {
    updates: Vec<Answer<()>>,
    /// With what was desired before.
    attached: BTreeMap<String, (Option<PodPort>, Answer<()>)>,
    /// With the addresses that are free now.
    detached: BTreeMap<String, (BTreeSet<IpAddr>, Answer<()>)>,
    veths: Vec<Answer<Vec<Veth>>>,
}

impl Batch {
    /// Two commands about one veth need two rounds.
    fn touches(&self, command: &Command) -> bool {
        match command {
            Command::Attach(PodPort { host_interface: name, .. }, _) | Command::Detach(name, _) => {
                self.attached.contains_key(name) || self.detached.contains_key(name)
            }
            Command::Update(..) => !self.attached.is_empty(),
            Command::Veths(_) => false,
        }
    }

    fn take(&mut self, command: Command, desired: &mut Desired) {
        match command {
            Command::Update(change, answer) => {
                change(desired);
                self.updates.push(answer);
            }
            Command::Attach(pod, answer) => {
                let name = pod.host_interface.clone();
                let before = desired.pods.insert(name.clone(), pod);
                self.attached.insert(name, (before, answer));
            }
            Command::Detach(name, answer) => {
                let freed = desired.pods.remove(&name).map(|pod| pod.addresses).unwrap_or_default();
                self.detached.insert(name, (freed, answer));
            }
            Command::Veths(answer) => self.veths.push(answer),
        }
    }
}

/// A full channel makes callers wait.
const COMMANDS: usize = 256;
/// After the last event of a burst, and at most after its first.
const SETTLE: Duration = Duration::from_millis(30);
const SETTLE_MAX: Duration = Duration::from_millis(300);
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
