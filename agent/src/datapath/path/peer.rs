//! One peer: the ways to it, and which of them is taken.
//!
//! ```text
//!   direct, the best endpoint ──down──▶ by a relay, if somebody reaches it ──down or nobody──▶ down
//!        ▲──────────────── up again ───────────┴──────────────────────────────────────────────┘
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Peer, View, Way,
    leg::{Leg, State, Watch},
    mtu::{Search, Sizes},
    probe::Key,
};
use crate::{
    datapath::relay::PREFIX_LEN,
    types::{DataSecret, PeerName},
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

pub(super) struct Path {
    pub peer: Peer,
    /// None where packets go in clear.
    pub key: Option<Key>,
    /// When it is to be woken, as it stands in the list of all.
    pub due: Option<Instant>,
    direct: Vec<Direct>,
    /// The endpoint that is taken, by its place in `direct`.
    chosen: usize,
    relay: Option<(PeerName, Leg)>,
    /// The greatest number of its probes.
    latest: u64,
    traffic: Traffic,
    busy_until: Option<Instant>,
    heard: bool,
}

/// Packets to and from a peer so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub sent: u64,
    pub received: u64,
}

struct Direct {
    to: SocketAddr,
    /// Not from its record: a probe came from there.
    seen: bool,
    leg: Leg,
}

/// Where a probe goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Direct(SocketAddr),
    Relay(PeerName),
}

impl Path {
    pub fn new(peer: Peer, secret: Option<&DataSecret>) -> Self {
        let key = secret.zip(peer.key.as_ref()).and_then(|(secret, key)| Key::agree(secret, key));
        let mut path = Self {
            peer: Peer { endpoints: Vec::new(), relay: None, ..peer.clone() },
            key,
            due: None,
            direct: Vec::new(),
            chosen: 0,
            relay: None,
            latest: 0,
            traffic: Traffic::default(),
            busy_until: None,
            heard: false,
        };
        path.update(peer);
        path
    }

    /// Takes over what is known of the peer now; its key is the one from before.
    pub fn update(&mut self, peer: Peer) {
        let before = std::mem::replace(&mut self.peer, peer);
        let Peer { data_id, mtu, endpoints, relay, .. } = &self.peer;
        if (before.data_id, before.mtu) != (*data_id, *mtu) {
            // It has been started anew, perhaps elsewhere, perhaps with another MTU.
            self.direct.clear();
            (self.relay, self.latest) = (None, 0);
        }
        if before.endpoints != *endpoints || self.direct.is_empty() {
            let chosen = self.direct.get(self.chosen).map(|direct| direct.to);
            // Mostly it is one: as it grows by itself, a vector has room for four at least.
            let mut known = std::mem::replace(&mut self.direct, Vec::with_capacity(endpoints.len()));
            for to in endpoints {
                let found = known.iter().position(|direct| direct.to == *to).map(|at| known.remove(at));
                let fresh = || Direct { to: *to, seen: false, leg: Leg::new(search(&self.peer, 0)) };
                self.direct.push(Direct { seen: false, ..found.unwrap_or_else(fresh) });
            }
            self.direct.extend(known.into_iter().filter(|direct| direct.seen));
            self.chosen = self.direct.iter().position(|direct| Some(direct.to) == chosen).unwrap_or(0);
        }
        if self.relay.as_ref().map(|(name, _)| name) != relay.as_ref() {
            let leg = |name: &PeerName| (name.clone(), Leg::new(search(&self.peer, PREFIX_LEN as u16)));
            self.relay = relay.as_ref().map(leg);
        }
    }

    /// Where it is, as far as we know.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.direct.get(self.chosen).map(|direct| direct.to)
    }

    /// Where it listens at an address that a probe came from.
    pub fn listens_at(&self, from: SocketAddr) -> SocketAddr {
        let same = self.direct.iter().map(|direct| direct.to).find(|to| to.ip() == from.ip());
        let port = self.endpoint().map_or(from.port(), |endpoint| endpoint.port());
        same.unwrap_or(SocketAddr::new(from.ip(), port))
    }

    /// Notes how much has been carried; whether there was anything.
    pub fn carried(&mut self, traffic: Traffic, now: Instant) -> bool {
        let before = std::mem::replace(&mut self.traffic, traffic);
        self.heard = traffic.received != before.received;
        if traffic != before {
            if self.busy_until.is_none_or(|until| until <= now) {
                self.direct.iter_mut().for_each(|direct| direct.leg.hurry());
            }
            self.busy_until = Some(now + BUSY);
        }
        traffic != before
    }

    /// A probe came, directly from there or by a relay, whose sender is proven. `rtt` is what its latest took, if it was
    /// answered.
    pub fn probed(&mut self, number: u64, rtt: Option<Duration>, from: Option<SocketAddr>, now: Instant) {
        if number <= self.latest {
            return;
        }
        self.latest = number;
        let Some(from) = from.map(|from| self.listens_at(from)) else {
            let watch = self.watch_relay(now);
            if let Some(((_, leg), rtt)) = self.relay.as_mut().zip(rtt) {
                leg.confirmed(rtt, watch, now);
            }
            return;
        };
        let Some(at) = self.direct.iter().position(|direct| direct.to == from) else {
            // Without a key anybody could make it up.
            if self.key.is_some() {
                self.direct.retain(|direct| !direct.seen);
                self.chosen = self.chosen.min(self.direct.len().saturating_sub(1));
                self.direct.push(Direct { to: from, seen: true, leg: Leg::new(search(&self.peer, 0)) });
            }
            return;
        };
        let watch = self.watch(at, now);
        let leg = &mut self.direct[at].leg;
        match rtt {
            Some(rtt) => leg.confirmed(rtt, watch, now),
            // It tries; so should we.
            None if leg.state() != State::Up => leg.hurry(),
            None => {}
        }
    }

    /// An answer came; whether it was one to a probe of ours.
    pub fn answered(&mut self, number: u64, now: Instant) -> bool {
        for at in 0..self.direct.len() {
            let watch = self.watch(at, now);
            if self.direct[at].leg.answer(number, watch, now) {
                self.choose();
                return true;
            }
        }
        let watch = self.watch_relay(now);
        self.relay.as_mut().is_some_and(|(_, leg)| leg.answer(number, watch, now))
    }

    /// The probes that are due, by way.
    pub fn wake(&mut self, now: Instant) -> Vec<(Target, Sizes)> {
        let mut due = Vec::new();
        for at in 0..self.direct.len() {
            let watch = self.watch(at, now);
            let Direct { to, leg, .. } = &mut self.direct[at];
            due.extend(leg.wake(watch, now).map(|sizes| (Target::Direct(*to), sizes)));
        }
        let watch = self.watch_relay(now);
        if let Some((name, leg)) = &mut self.relay {
            due.extend(leg.wake(watch, now).map(|sizes| (Target::Relay(name.clone()), sizes)));
        }
        self.choose();
        due
    }

    /// A probe has been sent there.
    pub fn sent(&mut self, target: &Target, number: u64, size: u16, now: Instant) {
        let leg = match target {
            Target::Direct(to) => self.direct.iter_mut().find(|direct| direct.to == *to).map(|d| &mut d.leg),
            Target::Relay(_) => self.relay.as_mut().map(|(_, leg)| leg),
        };
        if let Some(leg) = leg {
            leg.sent(number, size, now);
        }
    }

    pub fn next_wake(&self, now: Instant) -> Option<Instant> {
        let direct = self.direct.iter().enumerate();
        let direct = direct.map(|(at, direct)| direct.leg.next_wake(self.watch(at, now), now));
        let relay = self.relay.iter().map(|(_, leg)| leg.next_wake(self.watch_relay(now), now));
        direct.chain(relay).min()
    }

    /// Whether it matters right now what has come from it.
    pub fn is_in_doubt(&self) -> bool {
        self.direct.get(self.chosen).is_some_and(|direct| direct.leg.is_in_doubt())
    }

    /// The round trip of a probe to show the peer that its answers come.
    pub fn rtt(&self, target: &Target) -> Option<Duration> {
        match target {
            Target::Direct(to) => self.direct.iter().find(|direct| direct.to == *to)?.leg.sure_rtt(),
            Target::Relay(_) => self.relay.as_ref()?.1.sure_rtt(),
        }
    }

    pub fn view(&self) -> View {
        let direct = self.direct.get(self.chosen);
        let relayed = self.relay.as_ref().filter(|(_, leg)| leg.state() != State::Down);
        let (way, leg) = match (direct, relayed) {
            (Some(direct), _) if direct.leg.state() != State::Down => (Way::Direct, Some(&direct.leg)),
            (_, Some((name, leg))) => (Way::Relayed(name.clone()), Some(leg)),
            (None, None) => (Way::Down("no address known"), None),
            (Some(direct), None) => {
                let why = match &self.relay {
                    None => "no answer, no relay",
                    Some(_) => "no answer, nor by its relay",
                };
                (Way::Down(why), Some(&direct.leg))
            }
        };
        // Packets are still tried by the relay.
        let tried = self.relay.as_ref().map(|(_, leg)| leg).filter(|_| way != Way::Direct);
        View {
            way,
            endpoint: self.endpoint(),
            direct: direct.and_then(|direct| direct.leg.rtt()),
            rtt: leg.and_then(Leg::rtt),
            loss: leg.map_or(1.0, Leg::loss),
            mtu: tried.or(leg).map(Leg::mtu),
            since: direct.and_then(|direct| direct.leg.down_since()),
        }
    }

    /// Stays with what is good, unless another endpoint is far better.
    fn choose(&mut self) {
        let rtt = |direct: &Direct| direct.leg.rtt();
        let up = self.direct.iter().enumerate().filter_map(|(at, direct)| Some((rtt(direct)?, at)));
        let Some((best, at)) = up.min() else { return };
        let better = match self.direct.get(self.chosen) {
            Some(chosen) if chosen.leg.state() == State::Up => {
                rtt(chosen).is_none_or(|rtt| best * 2 + SMALL < rtt)
            }
            // Nobody knows yet whether the first is any good.
            _ => true,
        };
        if better {
            self.chosen = at;
        }
    }

    fn watch(&self, at: usize, now: Instant) -> Watch {
        let busy = self.is_busy(now);
        let chosen_is_up = self.direct.get(self.chosen).is_some_and(|direct| direct.leg.state() == State::Up);
        let close = (self.peer.neighbour || busy) && (at == self.chosen || !chosen_is_up);
        let in_use = at == self.chosen && chosen_is_up;
        Watch { close, full: busy && in_use, heard: self.heard && in_use }
    }

    fn watch_relay(&self, now: Instant) -> Watch {
        let busy = self.is_busy(now);
        Watch { close: self.peer.neighbour || busy, full: busy, heard: false }
    }

    fn is_busy(&self, now: Instant) -> bool {
        self.busy_until.is_some_and(|until| now < until)
    }
}

fn search(peer: &Peer, extra: u16) -> Search {
    Search::new(peer.least_mtu, peer.mtu, peer.mtu.saturating_sub(extra))
}

/// How long a peer counts as busy after a packet.
const BUSY: Duration = Duration::from_secs(10);
/// A difference between round trips that nobody notices.
const SMALL: Duration = Duration::from_millis(1);
