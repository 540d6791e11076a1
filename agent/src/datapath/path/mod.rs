//! The ways to all peers: which of their endpoints answers, how fast, what size it takes; and by whom, where none does.
//!
//! ```text
//!   records, neighbours, relays ─▶ ┌───────┐ ─▶ probes, answers
//!   counters of packets ─────────▶ │ Paths │
//!   probes, answers ─────────────▶ └───────┘ ─▶ View of each peer ─▶ forwarding table, routes, gossip, status
//! ```
//! Peers with traffic and neighbours are probed every 300 ms unless they have shown by a probe of their own that both
//! directions are good; the others once a minute. Packets alone prove one direction only, so they do not replace probes,
//! but they buy patience. Probes go where data goes, to the same port and by the same relays.
//!
//! All of it is pure; [`super::path_task`] has the sockets and the clock.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod leg;
mod mtu;
mod peer;
mod probe;
#[cfg(test)]
mod tests;

pub use peer::Traffic;
pub use probe::{ANSWER, PROBE, PROBE_LEN};

use super::{counters::Drop, handshake::Random, relay};
use crate::types::{DataId, DataKey, DataSecret, PeerName};
use peer::{Path, Target};
use probe::{Kind, Probe};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// What is known from elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    pub me: DataId,
    pub peers: Vec<Peer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: PeerName,
    pub data_id: DataId,
    /// None where it speaks in clear only.
    pub key: Option<DataKey>,
    /// Where it may be, best first.
    pub endpoints: Vec<SocketAddr>,
    /// The next node on the way to it, for when none of these answers.
    pub relay: Option<PeerName>,
    /// One whose end is to be noticed, also without traffic.
    pub neighbour: bool,
    /// Largest inner packet that we would like to send, and the least that every way takes; in bytes.
    pub mtu: u16,
    pub least_mtu: u16,
}

/// How it goes with one peer.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub way: Way,
    /// Where it is, or was.
    pub endpoint: Option<SocketAddr>,
    /// Round trip to that endpoint; none where it does not answer.
    pub direct: Option<Duration>,
    /// Of the way that is taken.
    pub rtt: Option<Duration>,
    /// Part of the probes of late that were lost, 0 to 1.
    pub loss: f32,
    /// Largest inner packet that the way takes, in bytes.
    pub mtu: Option<u16>,
    /// Since when it does not answer directly.
    pub since: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    Direct,
    /// By that peer first.
    Relayed(PeerName),
    /// And why.
    Down(&'static str),
}

pub type Views = BTreeMap<PeerName, View>;

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

pub struct Paths {
    me: DataId,
    /// None where packets go in clear.
    secret: Option<DataSecret>,
    random: Random,
    paths: BTreeMap<PeerName, Path>,
    ids: BTreeMap<DataId, PeerName>,
    /// When each path is to be woken, the next one first; none: at once.
    due: BTreeSet<(Option<Instant>, PeerName)>,
    /// Of which it matters right now what has come from them.
    doubted: BTreeSet<PeerName>,
    /// Whose view may be another since it was asked for.
    changed: BTreeSet<PeerName>,
    /// Of the latest probe.
    count: u64,
    sampled: Option<Instant>,
    datagrams: VecDeque<Datagram>,
}

impl Paths {
    /// `first` is the number of the first probe: more than all of an earlier run.
    pub fn new(secret: Option<DataSecret>, random: Random, first: u64) -> Self {
        Self {
            me: DataId::default(),
            secret,
            random,
            paths: BTreeMap::new(),
            ids: BTreeMap::new(),
            due: BTreeSet::new(),
            doubted: BTreeSet::new(),
            changed: BTreeSet::new(),
            count: first,
            sampled: None,
            datagrams: VecDeque::new(),
        }
    }

    /// Takes over what is known now: all peers that there are. Those that encrypt where we do not, or the other way round,
    /// have no way.
    pub fn set(&mut self, inputs: Inputs) {
        self.me = inputs.me;
        let mut before = std::mem::take(&mut self.paths);
        self.ids.clear();
        for peer in inputs.peers {
            if peer.key.is_some() != self.secret.is_some() {
                continue;
            }
            self.ids.insert(peer.data_id, peer.name.clone());
            let name = peer.name.clone();
            let known = before.remove(&name);
            let same = known.as_ref().is_some_and(|path| path.peer == peer);
            let due = known.as_ref().and_then(|path| path.due);
            let mut path = match known.filter(|path| path.peer.key == peer.key) {
                Some(mut path) => {
                    path.update(peer);
                    path
                }
                None => Path::new(peer, self.secret.as_ref()),
            };
            if !same {
                self.due.remove(&(due, name.clone()));
                path.due = None;
                self.due.insert((None, name.clone()));
                self.changed.insert(name.clone());
            }
            self.paths.insert(name, path);
        }
        for (name, path) in before {
            self.due.remove(&(path.due, name.clone()));
            self.doubted.remove(&name);
            self.changed.insert(name);
        }
    }

    /// Whether to call [`Paths::carried`] before [`Paths::wake`].
    pub fn wants_traffic(&self, now: Instant) -> bool {
        self.sampled.is_none_or(|last| now >= last + SAMPLE) || !self.doubted.is_empty()
    }

    /// Takes a reading of the packets to and from each peer.
    pub fn carried(&mut self, traffic: impl Fn(&PeerName) -> Traffic, now: Instant) {
        self.sampled = Some(now);
        let mut busy = Vec::new();
        for (name, path) in &mut self.paths {
            if path.carried(traffic(name), now) {
                busy.push(name.clone());
            }
        }
        busy.iter().for_each(|name| self.note(name, now));
    }

    /// A datagram came. `relayed` says that it came by a relay, which `from` is then.
    pub fn datagram(
        &mut self,
        from: SocketAddr,
        relayed: bool,
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), Drop> {
        let probe = Probe::decode(bytes).ok_or(Drop::Probe)?;
        let name = self.ids.get(&probe.sender).ok_or(Drop::Probe)?.clone();
        // It has sent from another port than the one it listens on.
        let relay = relayed.then(|| self.listener(from));
        let path = self.paths.get_mut(&name).ok_or(Drop::Probe)?;
        match &path.key {
            Some(key) if !Probe::is_from(bytes, key, self.me) => return Err(Drop::Probe),
            None if self.secret.is_some() => return Err(Drop::Probe),
            _ => {}
        }
        match probe.kind {
            Kind::Probe => {
                let answer = Probe { kind: Kind::Answer, sender: self.me, number: probe.number, rtt: None };
                let answer = answer.encode(path.key.as_ref(), probe.sender);
                let (to, bytes) = match relay {
                    Some(relay) => {
                        let prefix = relay::Prefix::new(self.me, probe.sender).encode();
                        (relay, [&prefix[..], &answer].concat())
                    }
                    None => (path.listens_at(from), answer.to_vec()),
                };
                self.datagrams.push_back(Datagram { to, bytes });
                path.probed(probe.number, probe.rtt, (!relayed).then_some(from), now);
            }
            Kind::Answer => path.answered(probe.number, now).then_some(()).ok_or(Drop::Probe)?,
        }
        self.note(&name, now);
        Ok(())
    }

    /// Where the peer listens that sends from there.
    fn listener(&self, from: SocketAddr) -> SocketAddr {
        let mut endpoints = self.paths.values().filter_map(Path::endpoint);
        endpoints.find(|endpoint| endpoint.ip() == from.ip()).unwrap_or(from)
    }

    /// Sends the probes that are due.
    pub fn wake(&mut self, now: Instant) {
        let mut woken = Vec::new();
        while self.due.first().is_some_and(|(at, _)| *at <= Some(now)) {
            woken.extend(self.due.pop_first().map(|(_, name)| name));
        }
        let mut due = Vec::new();
        for name in &woken {
            let Some(path) = self.paths.get_mut(name) else { continue };
            due.extend(path.wake(now).into_iter().map(|(target, sizes)| (name.clone(), target, sizes)));
        }
        for (name, target, sizes) in due {
            let relay = match &target {
                Target::Direct(to) => Some(*to),
                // One that has no address any more is no relay for long.
                Target::Relay(relay) => self.paths.get(relay).and_then(Path::endpoint),
            };
            let Some(path) = self.paths.get_mut(&name) else { continue };
            let receiver = path.peer.data_id;
            let rtt = path.rtt(&target);
            for size in sizes {
                self.count = self.count.wrapping_add(1);
                let mut low = [0; 4];
                (self.random)(&mut low);
                let number = self.count << GUESS | u64::from(u32::from_be_bytes(low) >> (32 - GUESS));
                path.sent(&target, number, size, now);
                let Some(to) = relay else { continue };
                let probe = Probe { kind: Kind::Probe, sender: self.me, number, rtt };
                let probe = probe.encode(path.key.as_ref(), receiver);
                let mut bytes = Vec::with_capacity(relay::PREFIX_LEN + PROBE_LEN.max(size.into()));
                if matches!(target, Target::Relay(_)) {
                    bytes.extend(relay::Prefix::new(self.me, receiver).encode());
                }
                let around = if path.key.is_some() { SEALED_AROUND } else { CLEAR_AROUND };
                let len = bytes.len() + usize::from(size) + around;
                bytes.extend(probe);
                if size > 0 {
                    bytes.resize(len.max(bytes.len()), 0);
                }
                self.datagrams.push_back(Datagram { to, bytes });
            }
        }
        woken.iter().for_each(|name| self.note(name, now));
    }

    /// Something has happened to that path.
    fn note(&mut self, name: &PeerName, now: Instant) {
        let Some(path) = self.paths.get_mut(name) else { return };
        self.due.remove(&(path.due, name.clone()));
        path.due = path.next_wake(now);
        self.due.extend(path.due.map(|at| (Some(at), name.clone())));
        match path.is_in_doubt() {
            true => self.doubted.insert(name.clone()),
            false => self.doubted.remove(name),
        };
        self.changed.insert(name.clone());
    }

    /// When to call [`Paths::wake`], if nothing else happens.
    pub fn next_wake(&self, now: Instant) -> Option<Instant> {
        let sample = (!self.paths.is_empty()).then(|| self.sampled.map_or(now, |last| last + SAMPLE));
        let due = self.due.first().map(|(at, _)| at.unwrap_or(now));
        due.into_iter().chain(sample).min()
    }

    /// What is to be sent, one by one. To be asked after every other call.
    pub fn poll_datagram(&mut self) -> Option<Datagram> {
        self.datagrams.pop_front()
    }

    /// How it goes with a peer; none where it is none any more.
    pub fn view(&self, name: &PeerName) -> Option<View> {
        self.paths.get(name).map(Path::view)
    }

    /// Whose [`Paths::view`] may be another than when this was called last.
    pub fn take_changed(&mut self) -> BTreeSet<PeerName> {
        std::mem::take(&mut self.changed)
    }
}

/// Bits of a probe's number that nobody can guess; the others count, in milliseconds since 1970 at the start.
const GUESS: u32 = 20;
/// How often traffic is looked at.
const SAMPLE: Duration = Duration::from_secs(1);
/// What the data path puts around an inner packet: header and tag.
const SEALED_AROUND: usize = super::header::SEALED_LEN + super::seal::TAG_LEN;
const CLEAR_AROUND: usize = super::header::CLEAR_LEN;
