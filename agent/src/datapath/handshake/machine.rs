//! All peers' handshakes: what comes in, what goes out, and the sessions that follow.
//!
//! Two that call each other at once would agree twice: then the one with the smaller public key goes on and the other
//! gives up its own call and answers.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Config, Datagram, Peer, Refusal, draw,
    gate::{Gate, Verdict, mac1},
    message::{
        COOKIE_LEN, INITIATION, INITIATION_LEN, INITIATION_NOISE, Message, PREFIX_LEN, RESPONSE,
        RESPONSE_LEN, RESPONSE_NOISE, SEALED, prefix,
    },
    noise::{Answer, Callee, Hello, Initiator, Keys, NameTag, Responder, Stamp},
    peer::{Attempt, Called, Next, Retry, Session, State},
};
use crate::{
    datapath::{
        icmp::Bucket,
        seal::{Algorithm, SEALED_HEADER_LEN, TAG_LEN},
        sessions::{Receiving, Sending, SessionIndex, Sessions, Way},
    },
    types::{Incarnation, PeerName},
};
use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

pub struct Machine {
    config: Config,
    gate: Gate,
    started: Instant,
    /// Of the last initiation that was said.
    pub(super) moment: u64,
    pub(super) peers: BTreeMap<PeerName, State>,
    tag: NameTag,
    names: BTreeMap<NameTag, PeerName>,
    /// Who uses an index; what nobody uses any more leaves with the next sweep.
    indices: BTreeMap<SessionIndex, PeerName>,
    confirms: Bucket,
    swept: Instant,
    changed: bool,
    datagrams: VecDeque<Datagram>,
}

impl Machine {
    pub fn new(mut config: Config, now: Instant) -> Self {
        Self {
            tag: NameTag::of(&config.name),
            gate: Gate::new(&config.key, &mut config.random, now),
            config,
            started: now,
            moment: 0,
            peers: BTreeMap::new(),
            names: BTreeMap::new(),
            indices: BTreeMap::new(),
            confirms: Bucket::new(CONFIRM, CONFIRM_BURST),
            swept: now,
            changed: false,
            datagrams: VecDeque::new(),
        }
    }

    /// Lanes of each session: all workers', and the last for the packet that shows that we have the key.
    pub(super) fn lanes(&self) -> usize {
        usize::from(self.config.lanes) + 1
    }

    /// A state that another machine had; those indices are taken.
    pub(super) fn take_in(&mut self, name: PeerName, state: State, indices: Vec<SessionIndex>) {
        self.names.insert(NameTag::of(&name), name.clone());
        self.indices.extend(indices.into_iter().map(|index| (index, name.clone())));
        self.peers.insert(name, state);
        self.changed = true;
    }

    /// Takes over what the records say: all peers that there are. A peer that has restarted while we had a session is
    /// called at once.
    pub fn set_peers(&mut self, peers: Vec<Peer>, now: Instant) {
        let sessions = |peers: &BTreeMap<_, State>| peers.values().flat_map(State::sessions).count();
        let mut before = std::mem::take(&mut self.peers);
        let had = sessions(&before);
        self.names.clear();
        for peer in peers {
            let known = before.remove(&peer.name).filter(|state| state.key == peer.key);
            let mut state = known.unwrap_or_else(|| State::new(peer.key));
            let before = state.endpoint;
            let forgotten = state.update(peer.incarnation, peer.endpoint);
            self.changed |= state.endpoint != before;
            self.names.insert(NameTag::of(&peer.name), peer.name.clone());
            self.peers.insert(peer.name.clone(), state);
            if forgotten {
                self.wanted(&peer.name, now);
            }
        }
        self.changed |= sessions(&self.peers) < had;
    }

    /// A packet waits for a key, or the key's numbers come to their end.
    pub fn wanted(&mut self, peer: &PeerName, now: Instant) {
        if self.peers.get(peer).is_some_and(|state| state.is_to_be_called(now)) {
            self.call(peer, now);
        }
    }

    /// A sealed packet of no session of ours came from there: after a restart, the peer does not know of that yet. It
    /// sends from ports that we have never heard of, too.
    pub fn surprised(&mut self, from: SocketAddr, now: Instant) {
        let there = |state: &State| state.endpoint.is_some_and(|endpoint| endpoint.ip() == from.ip());
        let perhaps = self.peers.iter_mut().filter(|(_, state)| there(state));
        let due = perhaps.filter_map(|(name, state)| state.is_to_be_called_unasked(now).then_some(name));
        let due: Vec<_> = due.take(NEIGHBOURS).cloned().collect();
        due.iter().for_each(|name| self.call(name, now));
    }

    /// The latest empty packet of that session came from there, where its sender listens.
    pub fn shown(&mut self, index: SessionIndex, from: SocketAddr) {
        let Some(name) = self.indices.get(&index) else { return };
        let Some(state) = self.peers.get_mut(name) else { return };
        self.changed |= state.endpoint != Some(from);
        state.endpoint = Some(from);
    }

    /// A lane of the peer, under that session, was there before and is here now.
    pub fn moved(&mut self, index: SessionIndex, before: SocketAddr, from: SocketAddr, now: Instant) {
        let Some(name) = self.indices.get(&index) else { return };
        let Some(state) = self.peers.get_mut(name) else { return };
        let listens = state.endpoint == Some(before);
        if !listens && state.endpoint.is_some_and(|endpoint| endpoint.ip() == from.ip()) {
            return;
        }
        state.endpoint = Some(from);
        self.changed = true;
        // Of another lane only the address is known until a handshake shows the port.
        if !listens && state.is_to_be_called_unasked(now) {
            let name = name.clone();
            self.call(&name, now);
        }
    }

    /// The first packet of a session came: [`Receiving::confirm`] said so.
    pub fn confirmed(&mut self, index: SessionIndex) {
        let Some(name) = self.indices.get(&index) else { return };
        self.changed |= self.peers.get_mut(name).is_some_and(State::confirmed);
    }

    /// The peer can be reached again: what was said in vain is said again now.
    pub fn revived(&mut self, peer: &PeerName, now: Instant) {
        let Some(state) = self.peers.get_mut(peer) else { return };
        if state.attempt.as_mut().is_some_and(|attempt| attempt.retry.hurry(now)) {
            send_initiation(state, &mut self.datagrams);
        }
    }

    /// A datagram of the handshake's kinds came.
    pub fn datagram(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Result<(), Refusal> {
        match Message::decode(bytes).ok_or(Refusal::Malformed)? {
            Message::Initiation { sender, bytes } => self.initiation(from, sender, bytes, now),
            Message::Response { receiver, bytes } => self.response(from, receiver, bytes, now),
            Message::Cookie { receiver, bytes } => self.cookie(receiver, bytes, now),
        }
    }

    /// Does what is due.
    pub fn wake(&mut self, now: Instant) {
        if now.duration_since(self.swept) >= SWEEP {
            self.sweep(now);
        }
        for state in self.peers.values_mut() {
            if state.next_wake().is_none_or(|due| now < due) {
                continue;
            }
            self.changed |= state.expire(now);
            if state.attempt.as_mut().is_some_and(|attempt| attempt.retry.is_due(now)) {
                state.sign(now);
                send_initiation(state, &mut self.datagrams);
                // It may be where its record says again.
                if state.published != state.endpoint {
                    send_initiation_to(state.published, state, &mut self.datagrams);
                }
            }
            if let Some(next) = &mut state.next
                && next.is_due(now)
            {
                self.datagrams.push_back(Datagram { to: next.to, bytes: next.response.to_vec() });
            }
        }
    }

    /// When to call [`Machine::wake`], if nothing else happens.
    pub fn next_wake(&self) -> Option<Instant> {
        let sweep = (!self.indices.is_empty()).then_some(self.swept + SWEEP);
        self.peers.values().filter_map(State::next_wake).chain(sweep).min()
    }

    /// What is to be sent, one by one. To be asked after every other call.
    pub fn poll_datagram(&mut self) -> Option<Datagram> {
        self.datagrams.pop_front()
    }

    /// The sessions for the workers, if they changed since the last time.
    pub fn poll_sessions(&mut self) -> Option<Sessions> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let way = |(name, state): (&PeerName, &State)| {
            let sending = state.current.as_ref()?.sending.clone();
            Some((name.clone(), Way { sending, to: state.endpoint }))
        };
        let receiving =
            self.peers.values().flat_map(State::sessions).map(|session| session.receiving.clone());
        let sessions = Sessions::new(self.peers.iter().filter_map(way).collect(), receiving);
        let silent = |(name, state): (&PeerName, &State)| Some((name.clone(), state.unanswered?));
        Some(sessions.with_unanswered(self.peers.iter().filter_map(silent).collect()))
    }

    fn call(&mut self, name: &PeerName, now: Instant) {
        if self.peers.get(name).is_none_or(|state| state.endpoint.is_none()) {
            return;
        }
        let (index, stamp) = (self.draw_index(name), self.stamp(now));
        let Self { config, peers, datagrams, tag, .. } = self;
        let Some(state) = peers.get_mut(name) else { return };
        let hello = Hello { from: *tag, stamp, algorithm: config.algorithm };
        let prefix = prefix(INITIATION, index);
        let ephemeral = draw(&mut config.random);
        let to = Callee { prefix: &prefix, name: NameTag::of(name) };
        // A public key of a record that is no point to agree with: nobody has its secret.
        let Ok((initiator, noise)) = Initiator::new(&config.secret, &state.key, ephemeral, to, hello) else {
            return;
        };
        let mut initiation = [0; INITIATION_LEN];
        initiation[..PREFIX_LEN].copy_from_slice(&prefix);
        initiation[PREFIX_LEN..PREFIX_LEN + INITIATION_NOISE].copy_from_slice(&noise);
        state.attempt = Some(Attempt { index, initiator, initiation, begun: now, retry: Retry::new(now) });
        state.sign(now);
        send_initiation(state, datagrams);
    }

    fn initiation(
        &mut self,
        from: SocketAddr,
        sender: SessionIndex,
        bytes: &[u8; INITIATION_LEN],
        now: Instant,
    ) -> Result<(), Refusal> {
        match self.gate.admit(bytes, sender, from, &mut self.config.random, now) {
            Verdict::Open => {}
            Verdict::WrongMac => return Err(Refusal::WrongMac),
            Verdict::Busy => return Err(Refusal::Busy),
            Verdict::Ask(cookie) => {
                self.datagrams.push_back(Datagram { to: from, bytes: cookie.to_vec() });
                return Err(Refusal::Busy);
            }
        }
        let (prefix, noise) = parts::<INITIATION_NOISE>(bytes);
        let ephemeral = draw(&mut self.config.random);
        let us = Callee { prefix, name: self.tag };
        let responder =
            Responder::new(&self.config.secret, ephemeral, us, noise).map_err(|_| Refusal::Unopened)?;
        let Hello { from: caller, stamp, algorithm } = responder.hello;
        let name = self.names.get(&caller).ok_or(Refusal::UnknownPeer)?.clone();
        let state = self.peers.get_mut(&name).ok_or(Refusal::UnknownPeer)?;
        if state.key != responder.key {
            return Err(Refusal::UnknownPeer);
        }
        if stamp <= state.stamp || stamp.incarnation < state.incarnation {
            return Err(Refusal::Replayed);
        }
        state.stamp = stamp;
        self.changed |= state.endpoint != Some(from);
        state.endpoint = Some(from);
        if self.config.key < state.key
            && let Some(attempt) = &mut state.attempt
        {
            // It will answer ours.
            if attempt.retry.hurry(now) {
                send_initiation(state, &mut self.datagrams);
            }
            return Ok(());
        }
        let index = self.draw_index(&name);
        let Self { config, peers, datagrams, .. } = self;
        let state = peers.get_mut(&name).ok_or(Refusal::UnknownPeer)?;
        let both_fast = [algorithm, config.algorithm] == [Algorithm::Aes256Gcm; 2];
        let algorithm = if both_fast { Algorithm::Aes256Gcm } else { Algorithm::ChaCha20Poly1305 };
        let answer = Answer { index, incarnation: config.incarnation, algorithm };
        let (noise, keys) = responder.answer(answer).map_err(|_| Refusal::Unopened)?;
        let mut response = [0; RESPONSE_LEN];
        response[..PREFIX_LEN].copy_from_slice(&self::prefix(RESPONSE, sender));
        response[PREFIX_LEN..PREFIX_LEN + RESPONSE_NOISE].copy_from_slice(&noise);
        state.door.write_mac(&mut response);
        datagrams.push_back(Datagram { to: from, bytes: response.to_vec() });
        state.restarted(stamp.incarnation);
        state.attempt = None;
        let agreed = Agreed {
            ours: index,
            theirs: sender,
            keys,
            called: Called::ByPeer,
            incarnation: stamp.incarnation,
        };
        let session = agreed.session(&name, config.lanes, now);
        state.next = Some(Next { session, response, to: from, retry: Retry::new(now) });
        self.changed = true;
        Ok(())
    }

    fn response(
        &mut self,
        from: SocketAddr,
        receiver: SessionIndex,
        bytes: &[u8; RESPONSE_LEN],
        now: Instant,
    ) -> Result<(), Refusal> {
        if !self.gate.door().fits(bytes) {
            return Err(Refusal::WrongMac);
        }
        let name = self.indices.get(&receiver).ok_or(Refusal::Stray)?.clone();
        let Self { config, peers, datagrams, confirms, .. } = self;
        let state = peers.get_mut(&name).ok_or(Refusal::Stray)?;
        let answered =
            |session: &&Session| session.called == Called::ByUs && session.receiving.index() == receiver;
        if let Some(session) = state.current.as_ref().filter(answered) {
            // Said again: it has not heard yet that we have the key.
            if let Some(endpoint) = state.endpoint.filter(|_| confirms.take(now)) {
                confirm(session, endpoint, config.lanes, datagrams);
            }
            return Ok(());
        }
        let attempt =
            state.attempt.as_mut().filter(|attempt| attempt.index == receiver).ok_or(Refusal::Stray)?;
        let (_, noise) = parts::<RESPONSE_NOISE>(bytes);
        let (answer, keys) = attempt.initiator.finish(noise).map_err(|_| Refusal::Unopened)?;
        let agreed = Agreed {
            ours: receiver,
            theirs: answer.index,
            keys,
            called: Called::ByUs,
            incarnation: answer.incarnation,
        };
        let session = agreed.session(&name, config.lanes, now);
        state.endpoint = Some(from);
        state.restarted(answer.incarnation);
        confirm(&session, from, config.lanes, datagrams);
        state.answered(session);
        self.changed = true;
        Ok(())
    }

    fn cookie(
        &mut self,
        receiver: SessionIndex,
        bytes: &[u8; COOKIE_LEN],
        now: Instant,
    ) -> Result<(), Refusal> {
        let name = self.indices.get(&receiver).ok_or(Refusal::Stray)?;
        let state = self.peers.get_mut(name).ok_or(Refusal::Stray)?;
        let attempt =
            state.attempt.as_mut().filter(|attempt| attempt.index == receiver).ok_or(Refusal::Stray)?;
        let cookie = state.door.cookie(bytes, mac1(&attempt.initiation)).ok_or(Refusal::Unopened)?;
        let hurry = attempt.retry.hurry(now);
        state.learn_cookie(cookie, now);
        state.sign(now);
        if hurry {
            send_initiation(state, &mut self.datagrams);
        }
        Ok(())
    }

    /// What needs no exact time: ends, new keys, indices to use again.
    fn sweep(&mut self, now: Instant) {
        self.swept = now;
        let mut due = Vec::new();
        for (name, state) in &mut self.peers {
            // Those of whom the worker could not tell in time.
            self.changed |= state.confirmed();
            self.changed |= state.expire(now);
            if state.is_to_be_rekeyed(now) {
                due.push(name.clone());
            }
            if let (Some(session), Some(endpoint)) = (&mut state.current, state.endpoint)
                && session.is_to_be_shown(now)
            {
                confirm(session, endpoint, self.config.lanes, &mut self.datagrams);
            }
        }
        due.iter().for_each(|name| self.call(name, now));
        let Self { peers, indices, .. } = self;
        indices.retain(|index, name| peers.get(name).is_some_and(|state| state.uses(*index)));
    }

    /// An index that no session of ours has.
    fn draw_index(&mut self, name: &PeerName) -> SessionIndex {
        loop {
            let index = SessionIndex(u32::from_be_bytes(*draw(&mut self.config.random)));
            if let Entry::Vacant(place) = self.indices.entry(index) {
                place.insert(name.clone());
                return index;
            }
        }
    }

    fn stamp(&mut self, now: Instant) -> Stamp {
        let elapsed = now.duration_since(self.started).as_micros() as u64;
        self.moment = elapsed.max(self.moment + 1);
        Stamp { incarnation: self.config.incarnation, moment: self.moment }
    }
}

/// What a handshake ends with.
struct Agreed {
    ours: SessionIndex,
    theirs: SessionIndex,
    keys: Keys,
    called: Called,
    /// The peer's.
    incarnation: Incarnation,
}

impl Agreed {
    fn session(self, peer: &PeerName, workers: u8, now: Instant) -> Session {
        // The last lane is for the packet that shows that we have the key.
        let lanes = usize::from(workers) + 1;
        Session {
            sending: Arc::new(Sending::new(self.theirs, self.keys.seal_key(), lanes)),
            receiving: Arc::new(Receiving::new(self.ours, peer.clone(), self.keys.open_key())),
            keys: self.keys,
            born: now,
            called: self.called,
            incarnation: self.incarnation,
            shown: (now, 0),
        }
    }
}

/// Shows the peer that we have the key and where we listen, by a packet with nothing in it.
fn confirm(session: &Session, to: SocketAddr, lane: u8, datagrams: &mut VecDeque<Datagram>) {
    let Ok(counter) = session.sending.take(lane, 1) else { return };
    let mut header = [0; SEALED_HEADER_LEN];
    header[..PREFIX_LEN].copy_from_slice(&prefix(SEALED, session.sending.index()));
    header[PREFIX_LEN..].copy_from_slice(&counter.encode());
    let mut tag = [0; TAG_LEN];
    session.sending.key().seal(&header, &mut [], &mut tag);
    datagrams.push_back(Datagram { to, bytes: [header, tag].concat() });
}

fn send_initiation(state: &State, datagrams: &mut VecDeque<Datagram>) {
    send_initiation_to(state.endpoint, state, datagrams);
}

fn send_initiation_to(to: Option<SocketAddr>, state: &State, datagrams: &mut VecDeque<Datagram>) {
    if let (Some(to), Some(attempt)) = (to, &state.attempt) {
        datagrams.push_back(Datagram { to, bytes: attempt.initiation.to_vec() });
    }
}

/// A message's prefix, and what Noise has to say in it.
fn parts<const NOISE: usize>(message: &[u8]) -> (&[u8; PREFIX_LEN], &[u8; NOISE]) {
    let (prefix, rest) = message.split_first_chunk().expect("every message has a prefix");
    (prefix, rest.first_chunk().expect("its length was checked"))
}

/// Peers behind one address that are called for one packet of nobody's.
const NEIGHBOURS: usize = 4;
/// How often sessions are looked at for their age.
const SWEEP: Duration = Duration::from_secs(1);
/// Responses that were taken already are confirmed again so often.
const CONFIRM: Duration = Duration::from_millis(1);
const CONFIRM_BURST: u32 = 100;
