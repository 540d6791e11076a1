//! The mesh as one machine: links, gossip, unicasts and the own name, without sockets or clock.
//!
//! ```text
//!             Joining ──synced, or nobody there──▶ Joined ──Leave──▶ Leaving ──told──▶ Ended
//!                ├──none but refusals──▶ Ended (fatal)
//!                └──our name is known elsewhere──▶ Checking ──nobody answers──▶ Joined
//!                                                     └──an elder answers──▶ Ended (fatal)
//! ```
//! Feed it with [`Mesh::handle`], then do what [`Mesh::poll_output`] says until it says nothing, deliver what
//! [`Mesh::next_news`] gives as fast as its readers take it, and come back at [`Mesh::next_wake`] with [`Input::Wake`].
//! Links are in `links.rs`, gossip in `exchange.rs`, the own record and name in `own.rs`.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    buffer::SendBuffer,
    dial::{Dialer, Target, Trouble},
    gossip::{Gossiper, Item},
    greeting::Greeting,
    link::{Link, LinkId},
    own::Naming,
    peers::{PeerGossip, PeerRecord, PeerSet},
    pool::{Alone, Pool},
    refusals::Refusals,
    replica::Replica,
    routes::Routes,
};
use crate::{
    identity::{Checker, Sealer, task::Current},
    types::{Incarnation, PeerAddress, PeerName, Universe},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};
use weft_proto::mesh::{Digest, Frame, frame::Body, refusal::Code};

pub struct Config {
    /// The own record as it is at the start.
    pub record: PeerRecord,
    pub universe: Universe,
    /// With what records are sealed and checked; `None`: they are not.
    pub identity: Option<Current>,
    /// Who shares the universe at the start, sorted; empty where it is not known yet.
    pub seeds: Vec<PeerName>,
    pub bootstrap: Vec<PeerAddress>,
    /// Control links at a time.
    pub max_links: usize,
    /// What was known before the restart.
    pub items: Vec<Item>,
    /// The subjects whose channels are known.
    pub gossipers: Vec<Box<dyn Gossiper>>,
    /// Of the random numbers.
    pub seed: u64,
}

pub enum Input {
    /// Time has passed.
    Wake,
    /// A link is there; `dialled` tells which [`Output::Dial`] it answers.
    Opened {
        link: LinkId,
        dialled: Option<Target>,
        remote: String,
        /// Whom the other end's certificate names; `None`: the link is in clear.
        certified: Option<Vec<PeerName>>,
    },
    /// A caller could not prove who it is.
    TurnedAway {
        who: String,
        reason: String,
    },
    /// This node's keys are others: what was sealed before is sealed anew.
    Rekeyed,
    /// The other end's certificate is not believed any more.
    Denied {
        link: LinkId,
        reason: String,
    },
    /// No link came of an [`Output::Dial`].
    DialFailed {
        target: Target,
        reason: String,
    },
    Frame {
        link: LinkId,
        frame: Frame,
    },
    /// So many frames of this link have left for the network.
    Sent {
        link: LinkId,
        frames: usize,
    },
    Closed {
        link: LinkId,
        reason: String,
    },
    /// A subject's items are newer than what it published before.
    Publish(Vec<Item>),
    Unicast {
        to: PeerName,
        channel: String,
        body: Vec<u8>,
    },
    /// Changes the own record; its name, rank, neighbours' names and `left` stay as they are.
    Update(Box<dyn FnOnce(&mut PeerRecord) + Send>),
    /// Other news of a peer than gossip, such as a probe's answer: it may be called at once.
    Heard(PeerName),
    /// These are the addresses to look for peers at, instead of those before.
    Bootstrap(Vec<PeerAddress>),
    /// Who shares the universe at the start is known now.
    Seeds(Vec<PeerName>),
    /// A peer is dead up to that incarnation.
    Forget {
        name: PeerName,
        incarnation: Incarnation,
    },
    Leave,
}

#[derive(Debug, PartialEq)]
pub enum Output {
    /// Open a link to the first of these addresses that answers; names are to be resolved each time.
    Dial {
        target: Target,
        addresses: Vec<PeerAddress>,
    },
    Send {
        link: LinkId,
        frame: Frame,
    },
    /// End the link once what was sent has left.
    Close {
        link: LinkId,
    },
    /// A unicast for this agent.
    Unicast {
        from: PeerName,
        channel: String,
        body: Vec<u8>,
    },
    /// [`Mesh::peers`] is another.
    PeersChanged,
    /// Who shares the universe at the start, as a peer has told.
    Seeds(Vec<PeerName>),
    /// The first exchange is done, or there is nobody to have one with; the own record is published.
    Joined,
    /// A peer has told all that it knows, for the first time. Comes after [`Output::Joined`], long after it where nobody
    /// was there to join.
    Contact,
    /// All peers that could be told know that this agent has left.
    Left,
    /// This agent must not run.
    Fatal(String),
}

pub struct Mesh {
    pub(super) greeting: Greeting,
    pub(super) own: PeerRecord,
    pub(super) naming: Naming,
    /// Why somebody whom we called to join through will have nothing to do with us.
    pub(super) objection: Option<String>,
    pub(super) phase: Phase,
    pub(super) started: Instant,
    pub(super) pool: Box<dyn Pool>,
    pub(super) replica: Replica,
    pub(super) sealer: Option<Sealer>,
    pub(super) checker: Option<Checker>,
    pub(super) peers: PeerSet,
    /// Those who are dead, each up to an incarnation.
    pub(super) forgotten: BTreeMap<PeerName, Incarnation>,
    pub(super) links: BTreeMap<LinkId, Link>,
    pub(super) dialer: Dialer,
    pub(super) routes: Option<Routes>,
    pub(super) news: BTreeMap<String, SendBuffer>,
    pub(super) counters: Counters,
    pub(super) refusals: Refusals,
    pub(super) rng: ChaCha8Rng,
    pub(super) compare_at: Instant,
    pub(super) fresh_until: Instant,
    pub(super) neighbours_at: Option<Instant>,
    pub(super) neighbours_told: Option<Instant>,
    contact: bool,
    outputs: VecDeque<Output>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Joining { patience: Instant },
    Checking,
    Joined,
    Leaving { by: Instant },
    Ended,
}

/// Sums since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub frames_in: u64,
    pub frames_out: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub items_in: u64,
    /// Items that were new.
    pub items_merged: u64,
    pub items_rejected: BTreeMap<&'static str, u64>,
    pub links_opened: u64,
    pub links_garbage: u64,
    pub links_refused: BTreeMap<&'static str, u64>,
    pub unicasts_delivered: u64,
    pub unicasts_relayed: u64,
    pub unicasts_dropped: BTreeMap<&'static str, u64>,
    /// Frames that a link had no room for, or that came too often.
    pub frames_dropped: BTreeMap<&'static str, u64>,
}

/// One link, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    pub id: LinkId,
    /// `None`: it has not said hello.
    pub peer: Option<(PeerName, Incarnation)>,
    /// We called it.
    pub dialled: bool,
    pub remote: String,
    pub since: Instant,
    /// Keys that it has yet to be told.
    pub waiting: usize,
}

impl Mesh {
    pub fn new(config: Config, now: Instant) -> Self {
        Self::with_pool(config, Box::new(Alone), now)
    }

    pub fn with_pool(config: Config, pool: Box<dyn Pool>, now: Instant) -> Self {
        let Config { record, universe, identity, seeds, bootstrap, max_links, items, mut gossipers, seed } =
            config;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        gossipers.push(Box::new(PeerGossip(identity.clone().map(Checker::new))));
        let mut replica = Replica::new(gossipers);
        if !seeds.is_empty() {
            replica.seeds(&seeds);
        }
        let (name, incarnation, software) =
            (record.name.clone(), record.incarnation, record.software.clone());
        let mut mesh = Self {
            naming: Naming::new(incarnation),
            objection: None,
            dialer: Dialer::new(name.clone(), bootstrap, max_links),
            greeting: Greeting { name, incarnation, software, universe, seeds },
            peers: PeerSet::new(record.clone()),
            own: record,
            phase: Phase::Joining { patience: now + PATIENCE },
            pool,
            replica,
            sealer: identity.clone().map(Sealer::new),
            checker: identity.map(Checker::new),
            started: now,
            forgotten: BTreeMap::new(),
            links: BTreeMap::new(),
            routes: None,
            news: BTreeMap::new(),
            counters: Counters::default(),
            refusals: Refusals::default(),
            compare_at: now + FRESH_COMPARE.mul_f64(rng.random_range(0.5..1.5)),
            fresh_until: now + FRESH,
            neighbours_at: None,
            neighbours_told: None,
            contact: false,
            outputs: VecDeque::new(),
            rng,
        };
        for item in items {
            if !mesh.is_own(&item) {
                mesh.merge(item, None, now);
            }
        }
        mesh.news.clear();
        mesh.output(Output::PeersChanged);
        mesh
    }

    /// Has its own copy of everything from now on, and nothing in common with other agents.
    pub fn part(&mut self) {
        self.pool = Box::new(Alone);
        for item in self.replica.entries() {
            *item = Arc::new((**item).clone());
        }
        for record in self.peers.entries() {
            *record = self.pool.record(&Arc::new(record.to_item()));
        }
    }

    pub fn handle(&mut self, input: Input, now: Instant) {
        if self.phase == Phase::Ended {
            if let Input::Opened { link, .. } = input {
                self.output(Output::Close { link });
            }
            return;
        }
        match input {
            Input::Wake => {}
            Input::Opened { link, dialled, remote, certified } => {
                self.opened(link, dialled, remote, certified, now);
            }
            Input::Rekeyed => self.seal_anew(),
            Input::TurnedAway { who, reason } => self.turned_away(&who, &reason, now),
            Input::Denied { link, reason } => self.close(link, Code::Identity, &reason, now),
            Input::DialFailed { target, reason } => self.dial_failed(&target, &reason, now),
            Input::Frame { link, frame } => self.frame(link, frame, now),
            // It comes with every frame, and nothing else can be due by it.
            Input::Sent { link, frames } => return self.sent(link, frames, now),
            Input::Closed { link, reason } => self.closed(link, &reason, now),
            Input::Publish(items) => {
                for item in items {
                    self.merge(item, None, now);
                }
            }
            Input::Unicast { to, channel, body } => self.unicast(to, channel, body),
            Input::Update(change) => self.update(change),
            Input::Heard(name) => self.dialer.heard(&name, now, &mut self.rng),
            Input::Bootstrap(addresses) => self.dialer.set_bootstrap(addresses),
            Input::Seeds(seeds) => self.learn_seeds(seeds),
            Input::Forget { name, incarnation } => self.forget(name, incarnation),
            Input::Leave => self.leave(now),
        }
        self.drive(now);
    }

    /// What is to be done next; `None` until the next input.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Items that are news to the subject of a channel, in their newest state: a slow subject is told less often, not
    /// later.
    pub fn next_news(&mut self) -> Option<(String, Vec<Item>)> {
        let (channel, buffer) = self.news.iter_mut().find(|(_, buffer)| !buffer.is_empty())?;
        Some((channel.clone(), buffer.take(&self.replica, NEWS_BYTES)))
    }

    pub fn has_news(&self) -> bool {
        self.news.values().any(|buffer| !buffer.is_empty())
    }

    /// When to come back with [`Input::Wake`], if nothing else happens before.
    pub fn next_wake(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Ended => return None,
            Phase::Joining { patience } => Some(patience),
            Phase::Leaving { by } => Some(by),
            Phase::Checking | Phase::Joined => None,
        };
        let own = [
            phase,
            Some(self.compare_at),
            self.neighbours_at,
            self.naming.next_wake(),
            self.dialer.next_wake(),
        ];
        own.into_iter().flatten().chain(self.links.values().filter_map(Link::next_wake)).min()
    }

    pub fn peers(&self) -> &PeerSet {
        &self.peers
    }

    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.replica.items()
    }

    /// Of all items: two agents with one digest know the same.
    pub fn digest(&self) -> Digest {
        self.replica.digest()
    }

    pub fn joined(&self) -> bool {
        self.phase == Phase::Joined
    }

    pub fn links(&self) -> Vec<LinkInfo> {
        let info = |(id, link): (&LinkId, &Link)| LinkInfo {
            id: *id,
            peer: link.peer.clone(),
            dialled: link.dialled.is_some(),
            remote: link.remote.clone(),
            since: link.opened,
            waiting: link.buffer.len(),
        };
        self.links.iter().map(info).collect()
    }

    /// Targets that could not be reached, or refused us, and why.
    pub fn troubles(&self) -> Vec<Trouble> {
        self.dialer.troubles()
    }

    /// Who was turned away of late, or sent what it may not.
    pub fn refusals(&self, now: Instant) -> Vec<(String, String)> {
        self.refusals.list(now)
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Does what time and the last input made due.
    fn drive(&mut self, now: Instant) {
        let some_are_new = self.links.values().any(Link::is_new);
        if some_are_new {
            self.close_silent(now);
            self.close_doubles(now);
        }
        self.try_join(now);
        self.drive_name(now);
        if !self.contact && self.phase == Phase::Joined && self.links.values().any(|link| link.synced) {
            self.contact = true;
            self.output(Output::Contact);
        }
        if self.neighbours_at.is_some_and(|at| at <= now) {
            self.neighbours_at = None;
            self.tell_neighbours(now);
        }
        if some_are_new {
            self.begin_exchanges();
        }
        if self.compare_at <= now {
            let fresh = now < self.fresh_until;
            let pause = if fresh { COMPARE.min(FRESH_COMPARE * self.crowds()) } else { COMPARE };
            self.compare_at = now + pause.mul_f64(self.rng.random_range(0.75..1.25));
            self.compare();
            self.prune(now);
        }
        if !matches!(self.phase, Phase::Leaving { .. } | Phase::Ended) {
            for target in self.dialer.due(now, &mut self.rng) {
                self.dial(target);
            }
        }
        self.flush(now);
        self.try_leave(now);
    }

    fn dial(&mut self, target: Target) {
        let addresses = match &target {
            Target::Bootstrap(address) => vec![address.clone()],
            Target::Peer(name) => self.peers.get(name).map(|record| addresses(record)).unwrap_or_default(),
            Target::Twin => return,
        };
        self.output(Output::Dial { target, addresses });
    }

    /// By how much a network is larger than one in which everybody may hear of everything at once.
    pub(super) fn crowds(&self) -> u32 {
        (self.peers.count() / CROWD).max(1) as u32
    }

    /// Frames of a link have left, and made room.
    fn sent(&mut self, id: LinkId, frames: usize, now: Instant) {
        if let Some(link) = self.links.get_mut(&id) {
            link.left(frames);
            tell(id, link, &self.replica, now, &mut self.counters, &mut self.outputs);
        }
        self.try_leave(now);
    }

    /// Tells every link what it lacks, as far as there is room.
    fn flush(&mut self, now: Instant) {
        for (id, link) in &mut self.links {
            tell(*id, link, &self.replica, now, &mut self.counters, &mut self.outputs);
        }
    }

    pub(super) fn output(&mut self, output: Output) {
        if output == Output::PeersChanged && self.outputs.back() == Some(&output) {
            return;
        }
        self.outputs.push_back(output);
    }
}

impl Counters {
    pub(super) fn frame_out(&mut self, frame: &Frame) {
        self.frames_out += 1;
        self.bytes_out += prost::Message::encoded_len(frame) as u64;
    }

    pub(super) fn frame_in(&mut self, frame: &Frame) {
        self.frames_in += 1;
        self.bytes_in += prost::Message::encoded_len(frame) as u64;
    }
}

fn tell(
    id: LinkId,
    link: &mut Link,
    replica: &Replica,
    now: Instant,
    counters: &mut Counters,
    outputs: &mut VecDeque<Output>,
) {
    while let Some(items) = link.flush(replica, now) {
        link.sent();
        let frame = Frame { body: Some(Body::Items(items)) };
        counters.frame_out(&frame);
        outputs.push_back(Output::Send { link: id, frame });
    }
}

pub(super) fn addresses(record: &PeerRecord) -> Vec<PeerAddress> {
    let address = |e: &crate::types::Endpoint| PeerAddress { host: e.0.ip().to_string(), port: e.0.port() };
    record.endpoints.iter().map(address).collect()
}

/// How long to look for somebody to sync with before going on alone: a few attempts at each address.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often replicas are compared with a random neighbour's.
const COMPARE: Duration = Duration::from_secs(2);
/// The same while things change.
const FRESH_COMPARE: Duration = Duration::from_millis(500);
/// Peers beyond which what they all say is said less often.
const CROWD: usize = 64;
/// How long after the last change things still count as changing.
pub(super) const FRESH: Duration = Duration::from_secs(3);
/// Bytes of items that a subject is told at once.
const NEWS_BYTES: usize = 256 << 10;

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
