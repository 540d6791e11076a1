//! One peer's sessions and when something is due about them.
//!
//! ```text
//!   we call      attempt ── response ──▶ current ─ a newer one ─▶ previous ── 180 s old ──▶ gone
//!   it calls     next ─ its first packet ──▶ ┘
//! ```
//!
//! Made before broken: packets under `previous` and `next` are taken as well. The caller switches when it has the
//! response, for then both have the key; the called one when the caller has shown, by a packet, that it has.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    gate::{COOKIE_LIFE, Cookie, Door},
    message::{INITIATION_LEN, RESPONSE_LEN},
    noise::{Initiator, Keys, Stamp},
};
use crate::{
    datapath::{
        seal::REKEY_AFTER,
        sessions::{Receiving, Sending, SessionIndex},
    },
    types::{DataKey, Incarnation},
};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) struct State {
    pub key: DataKey,
    pub door: Door,
    /// The latest that we know of.
    pub incarnation: Incarnation,
    /// Where its record says that it is.
    pub published: Option<SocketAddr>,
    /// Where it is: the record's, until a handshake or a packet that was opened came from elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// Of its latest initiation that was taken.
    pub stamp: Stamp,
    cookie: Option<(Cookie, Instant)>,
    pub attempt: Option<Attempt>,
    /// Since when it has been called in vain.
    pub unanswered: Option<Instant>,
    pub previous: Option<Session>,
    pub current: Option<Session>,
    pub next: Option<Next>,
    /// When we last called it though no packet waited.
    unasked: Option<Instant>,
}

/// A session with both directions' keys.
pub(super) struct Session {
    /// For whom takes over.
    pub keys: Keys,
    pub sending: Arc<Sending>,
    pub receiving: Arc<Receiving>,
    pub born: Instant,
    pub called: Called,
    /// The peer's.
    pub incarnation: Incarnation,
    /// When the peer was last shown where we listen, and how many packets had been carried by then.
    pub shown: (Instant, u64),
}

/// Who began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Called {
    ByUs,
    ByPeer,
}

/// Our initiation that is not answered yet.
pub(super) struct Attempt {
    pub index: SessionIndex,
    pub initiator: Initiator,
    pub initiation: [u8; INITIATION_LEN],
    pub begun: Instant,
    pub retry: Retry,
}

/// A session that the peer has begun and has not used yet.
pub(super) struct Next {
    pub session: Session,
    pub response: [u8; RESPONSE_LEN],
    pub to: SocketAddr,
    pub retry: Retry,
}

/// Says a thing again, less and less often.
pub(super) struct Retry {
    due: Instant,
    pause: Duration,
}

impl State {
    pub fn new(key: DataKey) -> Self {
        Self {
            key,
            door: Door::of(&key),
            incarnation: Incarnation::default(),
            published: None,
            endpoint: None,
            stamp: Stamp::default(),
            cookie: None,
            attempt: None,
            unanswered: None,
            previous: None,
            current: None,
            next: None,
            unasked: None,
        }
    }

    /// Takes over what its record says now; whether it has to be called, since it has forgotten our session.
    pub fn update(&mut self, incarnation: Incarnation, endpoint: Option<SocketAddr>) -> bool {
        if self.published != endpoint {
            (self.published, self.endpoint) = (endpoint, endpoint);
        }
        self.restarted(incarnation)
    }

    /// Lets go of what an earlier incarnation knew; whether there was a session in use.
    pub fn restarted(&mut self, incarnation: Incarnation) -> bool {
        self.incarnation = self.incarnation.max(incarnation);
        let stale = |session: &Session| session.incarnation < incarnation;
        self.previous.take_if(|session| stale(session));
        self.next.take_if(|next| stale(&next.session));
        self.current.take_if(|session| stale(session)).is_some()
    }

    /// Whether packets for it that have no key are a reason to call it now.
    pub fn is_to_be_called(&self, now: Instant) -> bool {
        let usable = self.current.as_ref().is_some_and(|session| session.sending.taken() < REKEY_AFTER);
        !usable && !self.is_busy(now)
    }

    /// Whether a packet from it under no key of ours is, or one from a new address: it may know of a session that we do
    /// not, or the other way round, but anybody may have sent it.
    pub fn is_to_be_called_unasked(&mut self, now: Instant) -> bool {
        let rested = self.unasked.is_none_or(|last| now.duration_since(last) >= PATIENCE);
        let call = !self.is_busy(now) && (self.current.is_none() || rested);
        if call {
            self.unasked = Some(now);
        }
        call
    }

    /// Whether the session in use is due for new keys. The caller has its turn first; both call only when they have
    /// sent something, so that idle peers let their session end.
    pub fn is_to_be_rekeyed(&self, now: Instant) -> bool {
        let Some(session) = &self.current else { return false };
        let age = match session.called {
            Called::ByUs => REKEY,
            Called::ByPeer => REKEY + TURN,
        };
        let old = session.is_older(age, now) && session.sending.carried() > 0;
        (old || session.sending.taken() >= REKEY_AFTER) && !self.is_busy(now)
    }

    /// A handshake is under way already.
    fn is_busy(&self, now: Instant) -> bool {
        self.attempt.is_some() || self.next.as_ref().is_some_and(|next| !next.session.is_older(PATIENCE, now))
    }

    /// Takes a session that we began into use.
    pub fn answered(&mut self, session: Session) {
        (self.attempt, self.unanswered) = (None, None);
        self.previous = self.current.replace(session);
    }

    /// Takes the session that the peer began into use, if the peer has used it.
    pub fn confirmed(&mut self) -> bool {
        let Some(next) = self.next.take_if(|next| next.session.receiving.is_confirmed()) else {
            return false;
        };
        self.unanswered = None;
        self.previous = self.current.replace(next.session);
        true
    }

    pub fn learn_cookie(&mut self, cookie: Cookie, now: Instant) {
        self.cookie = Some((cookie, now));
    }

    /// Writes the authenticators of the initiation that is under way.
    pub fn sign(&mut self, now: Instant) {
        self.cookie.take_if(|(_, since)| now.duration_since(*since) >= COOKIE_LIFE);
        if let Some(attempt) = &mut self.attempt {
            self.door.write_macs(&mut attempt.initiation, self.cookie.as_ref().map(|(cookie, _)| cookie));
        }
    }

    /// Lets go of what has come to its end; whether others are to know.
    pub fn expire(&mut self, now: Instant) -> bool {
        let in_vain = self.attempt.take_if(|attempt| now.duration_since(attempt.begun) >= PATIENCE);
        let silent = in_vain.is_some() && self.unanswered.is_none();
        self.unanswered = self.unanswered.or(in_vain.map(|attempt| attempt.begun));
        let over = |session: &mut Session| session.is_older(LIFETIME, now);
        let previous = self.previous.take_if(over).is_some();
        let current = self.current.take_if(over).is_some();
        let next = self.next.take_if(|next| over(&mut next.session)).is_some();
        silent || previous || current || next
    }

    /// All that packets are taken under.
    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        let next = self.next.as_ref().map(|next| &next.session);
        self.previous.iter().chain(&self.current).chain(next)
    }

    pub fn uses(&self, index: SessionIndex) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| attempt.index == index)
            || self.sessions().any(|session| session.receiving.index() == index)
    }

    /// When something is to be said again or given up.
    pub fn next_wake(&self) -> Option<Instant> {
        let attempt = self.attempt.as_ref().map(|attempt| attempt.retry.due.min(attempt.begun + PATIENCE));
        let next = self.next.as_ref().map(|next| (next.session.born, &next.retry));
        let next = next.filter(|(born, retry)| retry.due < *born + PATIENCE).map(|(_, retry)| retry.due);
        attempt.into_iter().chain(next).min()
    }
}

impl Session {
    pub fn is_older(&self, age: Duration, now: Instant) -> bool {
        now.duration_since(self.born) >= age
    }

    /// Whether it is time to show the peer again where we listen: most packets come from other ports, and what
    /// translates addresses forgets those that nothing uses.
    pub fn is_to_be_shown(&mut self, now: Instant) -> bool {
        let ((last, carried), carries) = (self.shown, self.sending.carried());
        let due = now.duration_since(last) >= SHOW && carries > carried;
        if due {
            self.shown = (now, carries);
        }
        due
    }
}

impl Next {
    /// Whether the response is to be said again now.
    pub fn is_due(&mut self, now: Instant) -> bool {
        !self.session.is_older(PATIENCE, now) && self.retry.is_due(now)
    }
}

impl Retry {
    pub fn new(now: Instant) -> Self {
        Self { due: now + FIRST_PAUSE, pause: FIRST_PAUSE }
    }

    /// Whether it is time; then the next time is later.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.due;
        if due {
            self.pause += self.pause / 2;
            self.due = now + self.pause;
        }
        due
    }

    /// Time, out of turn, unless the last time was just now.
    pub fn hurry(&mut self, now: Instant) -> bool {
        let rested = now + self.pause >= self.due + HASTE;
        if rested {
            self.due = now + self.pause;
        }
        rested
    }
}

/// A handshake message is said again after this, then after half as long again each time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Out of turn, at most so often.
const HASTE: Duration = Duration::from_millis(50);
/// How long a handshake is tried before it waits for another reason.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How often a peer that we send to is shown where we listen: a third of the time after which Linux forgets a
/// translated address.
pub(super) const SHOW: Duration = Duration::from_secs(10);
/// Keys in use are replaced at that age.
pub(super) const REKEY: Duration = Duration::from_secs(120);
/// How much longer the called one waits for the caller to do so.
pub(super) const TURN: Duration = Duration::from_secs(15);
/// Nothing is taken or sealed under older keys.
pub(super) const LIFETIME: Duration = Duration::from_secs(180);
