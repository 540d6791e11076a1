//! Owns the allocator and the state file.
//!
//! ```text
//!   Handle ──commands──▶ │ take all that wait │ one transaction │ answers, view │ outbox ──▶ mesh
//! ```
//!
//! Commands that arrive while the disk is busy share the next transaction. Nothing is answered, shown or sent before
//! the transaction that holds it is on disk. If the disk refuses, the changes are kept and tried again with the next
//! commands, which fail as long as it goes on refusing.

use super::{
    Allocation, Allocator, Assigned, Config, Effects, Found, IpamError, KnownPeer, Now, Request, View,
    death::Death, deed::Takeover, record, seed::SeedPlan, span::Layout,
};
use crate::{
    linux::store::{Store, Write},
    mesh::gossip::Item,
    types::{AttachmentKey, PeerName},
};
use anyhow::{Context, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};

/// What the mesh is to send: items of channels "ring", "deaths" and "votes", messages on channel "ring".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// Who shares the universe at the start; it comes before what follows from it.
    Seeds(SeedPlan),
    Publish(Vec<Item>),
    Unicast {
        to: PeerName,
        body: Vec<u8>,
    },
}

/// To the allocator's task, which ends when all handles are gone.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<Arc<View>>,
}

/// Loads what was stored, takes in what is found on the node, and starts the task. The view is complete on return.
/// `believe` is told whose takeovers follow from the deaths that are known; none where somebody else decides about them.
///
/// # Errors
/// The state file cannot be read or written, or there are more seeds than blocks.
pub async fn start(
    config: Config,
    store: Store,
    found: Found,
    outgoing: mpsc::Sender<Outgoing>,
    believe: Option<watch::Sender<Arc<BTreeSet<Takeover>>>>,
) -> anyhow::Result<(Handle, JoinHandle<()>)> {
    let layout = Layout::new(config.universe);
    let loading = store.clone();
    let stored = spawn_blocking(move || record::load(&loading, &layout)).await?;
    let stored = stored.context("read address space and allocations")?;
    if config.sealer.is_some() && stored.tokens.values().any(|token| token.lacks_deed()) {
        bail!(
            "{} was written by an agent that ran with --insecure, and holds ranges of which nobody could show the owner; \
             `weft reset` all nodes, and begin anew with keys",
            store.path().display()
        );
    }
    let allocator = Allocator::new(config, stored, found, now())?;
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let (view, watched) = watch::channel(Arc::default());
    let outbox = Outbox::default();
    let mut task = Task { allocator, layout, store, unwritten: Vec::new(), view, believe, outbox };
    task.settle(Vec::new()).await.context("write address space and allocations")?;
    Ok((Handle { commands, view: watched }, tokio::spawn(task.run(receiver, outgoing))))
}

impl Handle {
    /// Reserves an address; it is on disk when this returns. The same attachment gets the same address again.
    pub async fn reserve(&self, request: Request) -> Result<Arc<Allocation>, IpamError> {
        self.ask(|reply| Command::Reserve(request, reply)).await?
    }

    /// The attachment stands, so that its reservation does not time out; false where there is no reservation.
    pub async fn activated(&self, key: AttachmentKey) -> Result<bool, IpamError> {
        self.ask(|reply| Command::Activated(key, reply)).await?
    }

    /// Frees an attachment's address and returns what it was.
    pub async fn release(&self, key: AttachmentKey) -> Result<Option<Arc<Allocation>>, IpamError> {
        self.ask(|reply| Command::Release(key, reply)).await?
    }

    /// Hands all addresses over to a reachable peer, whose name is returned; nothing changes where there is none.
    /// The new tokens have been handed to the mesh when this returns.
    ///
    /// # Errors
    /// [`IpamError::PodsLeft`] where `force` is not set.
    pub async fn leave(&self, force: bool) -> Result<Option<PeerName>, IpamError> {
        self.ask(|reply| Command::Leave { force, reply }).await?
    }

    /// Items of channels "ring", "deaths" and "votes" that are new to the mesh.
    pub async fn items(&self, items: Vec<Item>) -> Result<(), IpamError> {
        self.tell(Command::Items(items)).await
    }

    /// A message for this node on channel "ring".
    pub async fn unicast(&self, from: PeerName, body: Vec<u8>) -> Result<(), IpamError> {
        self.tell(Command::Unicast { from, body }).await
    }

    /// All peers whose records are known.
    pub async fn peers(&self, peers: Vec<KnownPeer>) -> Result<(), IpamError> {
        self.tell(Command::Peers(peers)).await
    }

    /// The first exchange with any peer is complete, and its items have been passed on with [`items`](Self::items).
    pub async fn contact(&self) -> Result<(), IpamError> {
        self.tell(Command::Contact).await
    }

    /// Who shared the universe at the start, as a peer has told.
    pub async fn seeds(&self, seeds: SeedPlan) -> Result<(), IpamError> {
        self.tell(Command::Seeds(seeds)).await
    }

    /// Takes over what a peer had that is gone, as has been agreed on; doing it again changes nothing.
    pub async fn take_over(&self, from: PeerName, epoch: u64) -> Result<(), IpamError> {
        self.tell(Command::TakeOver { from, epoch }).await
    }

    /// Declares peers dead; it is on disk when this returns, and the mesh is told.
    pub async fn forget(&self, deaths: Vec<Item>) -> Result<(), IpamError> {
        self.ask(|reply| Command::Forget(deaths, reply)).await?
    }

    /// The takeovers that the ring refers to, by epoch.
    pub async fn epochs(&self) -> Result<BTreeSet<u64>, IpamError> {
        self.ask(Command::Epochs).await
    }

    /// Somebody else has said anew who owns what.
    pub async fn assigned(&self, assigned: Assigned) -> Result<(), IpamError> {
        self.tell(Command::Assigned(assigned)).await
    }

    /// This node's keys are others.
    pub async fn keys(&self) -> Result<(), IpamError> {
        self.tell(Command::Keys).await
    }

    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, IpamError> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply)).await?;
        answer.await.map_err(|_| IpamError::Stopped)
    }

    /// Waits where the channel is full: the mesh and the runtime can wait, but nothing may be lost.
    async fn tell(&self, command: Command) -> Result<(), IpamError> {
        self.commands.send(command).await.map_err(|_| IpamError::Stopped)
    }
}

type Reply<T> = oneshot::Sender<Result<T, IpamError>>;

#[derive(Debug)]
enum Command {
    Reserve(Request, Reply<Arc<Allocation>>),
    Activated(AttachmentKey, Reply<bool>),
    Release(AttachmentKey, Reply<Option<Arc<Allocation>>>),
    Leave { force: bool, reply: Reply<Option<PeerName>> },
    Items(Vec<Item>),
    Unicast { from: PeerName, body: Vec<u8> },
    Peers(Vec<KnownPeer>),
    Seeds(SeedPlan),
    Assigned(Assigned),
    TakeOver { from: PeerName, epoch: u64 },
    Forget(Vec<Item>, Reply<()>),
    Epochs(oneshot::Sender<BTreeSet<u64>>),
    Keys,
    Contact,
}

/// Sent once the transaction has succeeded or failed.
type Answer = Box<dyn FnOnce(Result<(), IpamError>) + Send>;

struct Task {
    allocator: Allocator,
    layout: Layout,
    store: Store,
    /// Changes that the disk has refused so far.
    unwritten: Vec<Write>,
    view: watch::Sender<Arc<View>>,
    believe: Option<watch::Sender<Arc<BTreeSet<Takeover>>>>,
    outbox: Outbox,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, outgoing: mpsc::Sender<Outgoing>) {
        let mut batch = Vec::new();
        loop {
            let retry = (!self.unwritten.is_empty()).then(|| Instant::now() + RETRY_WRITING);
            let wake = self.allocator.next_wake().map(Instant::from_std);
            let wake = [wake, retry].into_iter().flatten().min();
            tokio::select! {
                count = commands.recv_many(&mut batch, BATCH) => if count == 0 { return },
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
                permit = outgoing.reserve(), if !self.outbox.is_empty() => {
                    match permit {
                        Ok(permit) => self.outbox.next().map_or((), |message| permit.send(message)),
                        Err(_) => self.outbox = Outbox::default(),
                    }
                    continue;
                }
            }
            let leaves = batch.iter().any(|command| matches!(command, Command::Leave { .. }));
            let now = now();
            let mut answers: Vec<Answer> =
                batch.drain(..).filter_map(|command| self.handle(command, now)).collect();
            self.allocator.tick(now);
            if leaves && self.allocator.has_left() {
                // The agent may stop as soon as it has the answer: the mesh must have the tokens by then.
                let held_back = std::mem::take(&mut answers);
                let written =
                    self.settle(Vec::new()).await.map_err(|error| IpamError::Store(error.to_string()));
                while let Some(message) = self.outbox.next() {
                    if outgoing.send(message).await.is_err() {
                        break;
                    }
                }
                held_back.into_iter().for_each(|answer| answer(written.clone()));
            } else if let Err(error) = self.settle(answers).await {
                tracing::error!(file = %self.store.path().display(), %error, "cannot write the state file: no address can be handed out or freed");
            }
        }
    }

    fn handle(&mut self, command: Command, now: Now) -> Option<Answer> {
        match command {
            Command::Reserve(request, reply) => Some(answer(self.allocator.reserve(request, now), reply)),
            Command::Activated(key, reply) => Some(answer(Ok(self.allocator.activated(&key)), reply)),
            Command::Release(key, reply) => Some(answer(Ok(self.allocator.release(&key, now)), reply)),
            Command::Leave { force, reply } => {
                // Asked here, between two reservations: whoever looked before may have missed the last.
                let pods = self.allocator.pods();
                if pods > 0 && !force {
                    return Some(answer(Err(IpamError::PodsLeft(pods)), reply));
                }
                let heir = self.allocator.heir();
                if let Some(heir) = &heir {
                    self.allocator.leave(heir, now);
                }
                Some(answer(Ok(heir), reply))
            }
            Command::Items(items) => {
                self.allocator.on_items(&items, now);
                None
            }
            Command::Unicast { from, body } => {
                self.allocator.on_unicast(&from, &body, now);
                None
            }
            Command::Peers(peers) => {
                self.allocator.on_peers(&peers, now);
                None
            }
            Command::Seeds(seeds) => {
                self.allocator.on_seeds(seeds);
                None
            }
            Command::TakeOver { from, epoch } => {
                self.allocator.take_over(&from, epoch, now);
                None
            }
            Command::Forget(deaths, reply) => {
                self.allocator.forget(&deaths, now);
                Some(answer(Ok(()), reply))
            }
            Command::Epochs(reply) => {
                let _ = reply.send(self.allocator.epochs());
                None
            }
            Command::Assigned(assigned) => {
                self.allocator.on_assigned(&assigned, now);
                None
            }
            Command::Keys => {
                self.allocator.on_keys(now);
                None
            }
            Command::Contact => {
                self.allocator.on_contact(now);
                None
            }
        }
    }

    /// Writes what has changed; then answers, shows and queues what is to be sent.
    async fn settle(&mut self, answers: Vec<Answer>) -> anyhow::Result<()> {
        let Effects { seeds, changes, publish, unicasts } = self.allocator.effects();
        self.outbox.held_seeds = seeds.or(self.outbox.held_seeds.take());
        self.unwritten.extend(changes.iter().map(|change| record::write(change, &self.layout)));
        self.outbox
            .held
            .extend(publish.into_iter().map(|item| ((item.channel.clone(), item.key.clone()), item)));
        self.outbox.held_unicasts.extend(unicasts);
        let written = self.write().await;
        if written.is_ok() {
            self.outbox.release();
            let view = Arc::new(self.allocator.view());
            // Before others can see that this node knows.
            if let Some(believe) = self.believe.as_ref().filter(|_| view.deaths != self.view.borrow().deaths)
            {
                believe.send_replace(Arc::new(view.deaths.iter().map(Death::takeover).collect()));
            }
            self.view.send_if_modified(|shown| {
                let changed = *shown != view;
                *shown = view;
                changed
            });
        }
        let outcome = written.as_ref().map_err(|error| IpamError::Store(error.to_string()));
        for answer in answers {
            answer(outcome.clone().map(|_| ()));
        }
        written
    }

    async fn write(&mut self) -> anyhow::Result<()> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
        let (store, writes) = (self.store.clone(), std::mem::take(&mut self.unwritten));
        // A panic of the database loses the writes with the closure, so a copy stays here until they are on disk.
        let writes = Arc::new(writes);
        let copy = writes.clone();
        let outcome = spawn_blocking(move || store.commit(&copy)).await;
        let outcome = outcome.map_err(anyhow::Error::from).and_then(|result| Ok(result?));
        if outcome.is_err() {
            // Of each entry only the last change, or what waits for a full disk would grow for ever.
            let entry = |write: Write| ((write.table, write.key), write.value);
            let last: BTreeMap<_, _> = Arc::unwrap_or_clone(writes).into_iter().map(entry).collect();
            let write = |((table, key), value)| Write { table, key, value };
            self.unwritten = last.into_iter().map(write).collect();
        }
        outcome
    }
}

fn answer<T: Send + 'static>(result: Result<T, IpamError>, reply: Reply<T>) -> Answer {
    // Who asked may have gone: a reservation that nobody activates times out.
    Box::new(move |written| _ = reply.send(written.and(result)))
}

/// What the mesh has not taken yet, merged: at most one item for each token, one request for each peer.
#[derive(Default)]
struct Outbox {
    held_seeds: Option<SeedPlan>,
    seeds: Option<SeedPlan>,
    /// Not on disk yet.
    held: BTreeMap<(String, Vec<u8>), Item>,
    held_unicasts: BTreeMap<PeerName, Vec<u8>>,
    /// By channel and key: deaths go before the tokens that follow from them.
    items: BTreeMap<(String, Vec<u8>), Item>,
    unicasts: BTreeMap<PeerName, Vec<u8>>,
}

impl Outbox {
    fn release(&mut self) {
        self.seeds = self.held_seeds.take().or(self.seeds.take());
        self.items.append(&mut self.held);
        self.unicasts.append(&mut self.held_unicasts);
    }

    fn is_empty(&self) -> bool {
        self.seeds.is_none() && self.items.is_empty() && self.unicasts.is_empty()
    }

    /// Items go before requests, so that a giver knows what the asker's ranges look like.
    fn next(&mut self) -> Option<Outgoing> {
        if let Some(seeds) = self.seeds.take() {
            return Some(Outgoing::Seeds(seeds));
        }
        if !self.items.is_empty() {
            return Some(Outgoing::Publish(std::mem::take(&mut self.items).into_values().collect()));
        }
        self.unicasts.pop_first().map(|(to, body)| Outgoing::Unicast { to, body })
    }
}

fn now() -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { at: Instant::now().into_std(), unix_ms: unix.as_millis() as u64 }
}

/// Commands that may wait; callers wait when it is full.
const COMMANDS: usize = 1024;
/// Commands that share a transaction at most.
const BATCH: usize = 256;
const RETRY_WRITING: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ipam::{Owner, seed::seeds},
        types::{Incarnation, PodRef},
    };
    use std::path::Path;

    fn key(n: usize) -> AttachmentKey {
        AttachmentKey::new(&format!("c{n}"), "eth0").unwrap()
    }

    fn request(n: usize) -> Request {
        Request { key: key(n), pod: PodRef::default(), wanted: Vec::new(), ranges: Vec::new(), mac: None }
    }

    async fn agent(dir: &Path, found: Found) -> (Handle, JoinHandle<()>, mpsc::Receiver<Outgoing>) {
        let (name, universe) = ("a".parse().unwrap(), "10.32.0.0/16".parse().unwrap());
        let (store, _) = Store::open(dir, &name, &universe).unwrap();
        let config = Config {
            seeds: seeds("a"),
            sealer: None,
            name,
            universe,
            has_bootstrap: false,
            seeding: crate::ipam::Seeding::Given,
            assigned: None,
        };
        let (outgoing, sent) = mpsc::channel(1);
        let (handle, task) = start(config, store, found, outgoing, None).await.unwrap();
        (handle, task, sent)
    }

    #[tokio::test]
    async fn what_was_answered_survives_a_restart() {
        let temp = tempfile::tempdir().unwrap();
        let (handle, task, _sent) = agent(temp.path(), Found::default()).await;
        assert_eq!(handle.view().borrow().bridge, Some("10.32.0.1".parse().unwrap()));
        let first = handle.reserve(request(1)).await.unwrap();
        let second = handle.reserve(request(2)).await.unwrap();
        assert!(handle.activated(key(1)).await.unwrap());
        handle.release(key(2)).await.unwrap().unwrap();
        assert!(handle.view().borrow().resting.contains(&second.address));
        let before = handle.view().borrow().clone();
        drop(handle);
        task.await.unwrap();

        let (handle, _task, _sent) = agent(temp.path(), Found::default()).await;
        let after = handle.view().borrow().clone();
        assert_eq!((&after.allocations, &after.resting), (&before.allocations, &before.resting));
        assert_eq!(handle.reserve(request(1)).await.unwrap(), first);
        assert_eq!(
            handle.reserve(request(3)).await.unwrap().address,
            "10.32.0.4".parse::<std::net::IpAddr>().unwrap()
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_reservations_at_once_share_no_address() {
        let temp = tempfile::tempdir().unwrap();
        let (handle, _task, _sent) = agent(temp.path(), Found::default()).await;
        let adds: Vec<_> = (0..400)
            .map(|n| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.reserve(request(n)).await.unwrap().address })
            })
            .collect();
        let mut addresses = std::collections::BTreeSet::new();
        for add in adds {
            assert!(addresses.insert(add.await.unwrap()));
        }
        let pods = |view: &View| view.allocations.values().filter(|a| a.owner != Owner::Bridge).count();
        assert_eq!(pods(&handle.view().borrow()), 400);
    }

    #[tokio::test]
    async fn a_slow_mesh_does_not_hold_up_reservations() {
        let temp = tempfile::tempdir().unwrap();
        let (handle, _task, mut sent) = agent(temp.path(), Found::default()).await;
        let peer = KnownPeer {
            name: "b".parse().unwrap(),
            reachable: true,
            held: Vec::new(),
            incarnation: Incarnation(1),
            deaths_digest: 0,
            absent: Vec::new(),
            left: false,
        };
        handle.peers(vec![peer]).await.unwrap();
        for n in 0..50 {
            handle.reserve(request(n)).await.unwrap();
            handle.release(key(n)).await.unwrap();
        }
        // The channel holds one message; what did not fit has been merged.
        handle.reserve(request(50)).await.unwrap();
        assert_eq!(handle.leave(false).await, Err(IpamError::PodsLeft(1)));
        let leaving = tokio::spawn(async move { handle.leave(true).await });
        let mut messages = Vec::new();
        while let Some(message) = sent.recv().await {
            messages.push(message);
        }
        assert_eq!(leaving.await.unwrap(), Ok(Some("b".parse().unwrap())));
        assert!(messages.len() < 4, "{messages:?}");
        let Some(Outgoing::Publish(items)) = messages.last() else { panic!("{messages:?}") };
        let layout = Layout::new("10.32.0.0/16".parse().unwrap());
        let token = crate::ipam::token::Token::from_item(&items[0], &layout).ok().unwrap();
        assert_eq!((token.owner.as_str(), token.end), ("b", 0xffff));
    }
}
