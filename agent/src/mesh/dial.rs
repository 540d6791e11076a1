//! Whom to call, and when to call again.
//!
//! ```text
//!   all names in the order of their hashes, a ring             . . c a f◀[me]▶d b e g h . .
//!   … of those whose hash ends with the same bit as mine       . . c◀─────[me]───▶b e . .
//!   … with the same two bits, three, four …                    ◀──────────[me]──────▶e . .
//!   linked: everyone, up to 16 nodes; then the next on either side of each ring, on that of all the next two
//! ```
//! To whom I am next has me next, so both ends want the same links without talking about it; the ring of all keeps the
//! graph in one piece and the others keep it shallow: a skip graph (Aspnes & Shah, 2003, §3). Who comes or goes changes
//! the links of its own neighbours only, however large the network is. Peers that do not answer are stepped over, so the
//! living close the rings among themselves, and are called again less and less often.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::gossip;
use crate::types::{PeerAddress, PeerName};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

/// Somebody to call.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// An address from the command line, whose peer we have not met.
    Bootstrap(PeerAddress),
    Peer(PeerName),
    /// Another agent that may run under our own name.
    Twin,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bootstrap(address) => write!(f, "at {address}"),
            Self::Peer(name) => name.fmt(f),
            Self::Twin => f.write_str("of our own name"),
        }
    }
}

/// How it goes with a target that we want to reach and do not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    pub target: Target,
    pub failures: u32,
    pub reason: String,
    pub next_attempt: Instant,
}

pub struct Dialer {
    own: PeerName,
    max_links: usize,
    /// Everyone who has not left, this agent too, by the hash of the name.
    ring: BTreeSet<Place>,
    bootstrap: BTreeMap<PeerAddress, Bootstrap>,
    attempts: BTreeMap<Target, Attempts>,
    linked: BTreeSet<PeerName>,
    wanted: BTreeSet<PeerName>,
    /// Whom to call, of those wanted.
    targets: Vec<Target>,
    /// Somebody on the ring does not answer.
    stepped_over: bool,
    stale: bool,
    /// When a target is to be called next; until something changes it need not be looked for.
    next: Option<Next>,
}

type Place = (u64, PeerName);

#[derive(Clone, Copy)]
enum Next {
    At(Instant),
    /// Nobody, or not before a call has ended.
    Never,
}

#[derive(Default)]
struct Bootstrap {
    tried: bool,
    /// Who answered there last.
    met: Option<PeerName>,
}

struct Attempts {
    /// Calls in a row of which no lasting link came.
    failures: u32,
    /// Calls in a row that nobody answered.
    unanswered: u32,
    dialling: bool,
    last: Option<Instant>,
    next: Instant,
    /// It has links enough, and is left alone until then, whatever it says.
    unneeded: Option<Instant>,
    reason: String,
}

impl Dialer {
    pub fn new(own: PeerName, bootstrap: Vec<PeerAddress>, max_links: usize) -> Self {
        Self {
            ring: BTreeSet::from([place(&own)]),
            own,
            max_links: max_links.max(MIN_LINKS),
            bootstrap: bootstrap.into_iter().map(|address| (address, Bootstrap::default())).collect(),
            attempts: BTreeMap::new(),
            linked: BTreeSet::new(),
            wanted: BTreeSet::new(),
            targets: Vec::new(),
            stepped_over: false,
            stale: true,
            next: None,
        }
    }

    /// Calls at these addresses instead of those before; what is known of those that stay is kept.
    pub fn set_bootstrap(&mut self, addresses: Vec<PeerAddress>) {
        let mut before = std::mem::take(&mut self.bootstrap);
        let known = |address: PeerAddress| {
            let known = before.remove(&address).unwrap_or_default();
            (address, known)
        };
        self.bootstrap = addresses.into_iter().map(known).collect();
        for address in before.into_keys() {
            self.attempts.remove(&Target::Bootstrap(address));
        }
        self.stale = true;
    }

    /// A peer said something new: it may be called at once.
    pub fn heard(&mut self, name: &PeerName, now: Instant, rng: &mut ChaCha8Rng) {
        self.stale |= self.ring.insert(place(name));
        if let Some(attempts) = self.attempts.get_mut(&Target::Peer(name.clone()))
            && attempts.failures > 0
        {
            let earliest = attempts.last.map_or(now, |last| last + FIRST_DELAY);
            let earliest = attempts.unneeded.map_or(earliest, |until| earliest.max(until));
            self.next = None;
            // Nobody calls whom it has stepped over once and wants no more: else it would be stepped over for ever.
            if attempts.unanswered >= UNREACHABLE && !self.wanted.contains(name) {
                (attempts.unanswered, self.stale) = (0, true);
            }
            attempts.failures = 1;
            attempts.next =
                attempts.next.min(earliest.max(now) + FIRST_DELAY.mul_f64(rng.random::<f64>() / 4.0));
        }
    }

    /// A peer left, or was forgotten.
    pub fn gone(&mut self, name: &PeerName) {
        self.stale |= self.ring.remove(&place(name));
        self.attempts.remove(&Target::Peer(name.clone()));
        self.next = None;
    }

    /// The targets to call now. Each is answered with [`Dialer::failed`] or [`Dialer::met`].
    pub fn due(&mut self, now: Instant, rng: &mut ChaCha8Rng) -> Vec<Target> {
        self.choose();
        match self.next {
            Some(Next::At(next)) if now < next => return Vec::new(),
            Some(Next::Never) => return Vec::new(),
            _ => {}
        }
        let mut room = MAX_DIALS.saturating_sub(self.attempts.values().filter(|a| a.dialling).count());
        let mut due = Vec::new();
        for target in &self.targets {
            if room == 0 {
                break;
            }
            if !self.attempts.contains_key(target) {
                self.attempts.insert(target.clone(), Attempts::first(&self.own, target, now, rng));
            }
            let Some(attempts) = self.attempts.get_mut(target) else { continue };
            if !attempts.dialling && attempts.next <= now {
                attempts.dialling = true;
                attempts.last = Some(now);
                room -= 1;
                due.push(target.clone());
            }
        }
        self.next = Some(self.find_next());
        due
    }

    pub fn failed(&mut self, target: &Target, reason: &str, now: Instant, rng: &mut ChaCha8Rng) {
        self.next = None;
        if let Target::Bootstrap(address) = target
            && let Some(bootstrap) = self.bootstrap.get_mut(address)
        {
            bootstrap.tried = true;
        }
        if let Some(attempts) = self.attempts.get_mut(target) {
            attempts.dialling = false;
            attempts.failures += 1;
            attempts.unanswered += 1;
            attempts.reason = reason.chars().take(MAX_REASON).collect();
            self.stale |= matches!(target, Target::Peer(_)) && attempts.unanswered == UNREACHABLE;
            self.back_off(target, now, rng);
        }
    }

    /// A target answered as `name`. Its failures are forgiven only once its link has lasted.
    pub fn met(&mut self, target: &Target, name: &PeerName) {
        self.next = None;
        if let Some(attempts) = self.attempts.get_mut(target) {
            attempts.dialling = false;
            attempts.reason.clear();
        }
        if let Target::Bootstrap(address) = target
            && let Some(bootstrap) = self.bootstrap.get_mut(address)
        {
            bootstrap.tried = true;
            bootstrap.met = Some(name.clone());
            self.stale = true;
        }
    }

    /// The first link with a peer is up.
    pub fn up(&mut self, name: &PeerName) {
        self.linked.insert(name.clone());
        self.stale = true;
    }

    /// The last link with a peer is down, after `lived`.
    pub fn down(&mut self, name: &PeerName, lived: Duration, now: Instant, rng: &mut ChaCha8Rng) {
        self.linked.remove(name);
        let target = Target::Peer(name.clone());
        let fresh = || Attempts::first(&self.own, &target, now, rng);
        let attempts = self.attempts.entry(target.clone()).or_insert_with(fresh);
        attempts.dialling = false;
        attempts.unanswered = 0;
        if lived >= LASTING {
            *attempts = Attempts::first(&self.own, &target, now, rng);
        } else {
            attempts.failures += 1;
            self.back_off(&target, now, rng);
        }
        self.stale = true;
    }

    /// The peer has closed a link that we called for, since it has enough: its word counts, or the two would go on so.
    pub fn unneeded(&mut self, name: &PeerName, now: Instant, rng: &mut ChaCha8Rng) {
        if let Some(attempts) = self.attempts.get_mut(&Target::Peer(name.clone())) {
            let until = now + MAX_DELAY.mul_f64(rng.random_range(0.5..1.0));
            (attempts.unneeded, attempts.next) = (Some(until), attempts.next.max(until));
            self.next = None;
        }
    }

    /// Nobody is left to try: each known address and peer has failed once at least.
    pub fn hopeless(&mut self) -> bool {
        self.choose();
        let failed =
            |target: &Target| self.attempts.get(target).is_some_and(|a| !a.dialling && a.failures > 0);
        self.linked.is_empty() && self.bootstrap.values().all(|b| b.tried) && self.targets.iter().all(failed)
    }

    /// Whether a link with this peer is one that both ends want.
    pub fn wants(&self, name: &PeerName) -> bool {
        self.wanted.contains(name)
    }

    /// Links beyond this number are surplus, if nobody wants them. Where peers are lost it is twice as many: each agent
    /// steps over those that it has called itself, so the ends do not agree about what they want.
    pub fn keep(&self) -> usize {
        let places = self.ring.len().max(1).ilog2() as usize;
        let links = if self.stepped_over { 4 * places } else { 2 * places + 4 };
        links.max(MESHED - 1).min(self.limit())
    }

    pub fn max_links(&self) -> usize {
        self.max_links
    }

    pub fn linked(&self) -> &BTreeSet<PeerName> {
        &self.linked
    }

    /// When to ask for [`Dialer::due`] again, if nothing else happens.
    pub fn next_wake(&self) -> Option<Instant> {
        match self.next.unwrap_or_else(|| self.find_next()) {
            Next::At(next) => Some(next),
            Next::Never => None,
        }
    }

    fn find_next(&self) -> Next {
        let dialling = || self.attempts.values().filter(|attempts| attempts.dialling).count();
        if self.targets.is_empty() || dialling() >= MAX_DIALS {
            return Next::Never;
        }
        let next = |target: &Target| self.attempts.get(target).filter(|a| !a.dialling).map(|a| a.next);
        self.targets.iter().filter_map(next).min().map_or(Next::Never, Next::At)
    }

    pub fn troubles(&self) -> Vec<Trouble> {
        let trouble = |target: &Target| {
            let attempts = self.attempts.get(target).filter(|attempts| !attempts.reason.is_empty())?;
            let (failures, reason, next_attempt) =
                (attempts.failures, attempts.reason.clone(), attempts.next);
            Some(Trouble { target: target.clone(), failures, reason, next_attempt })
        };
        self.targets.iter().filter_map(trouble).collect()
    }

    /// Chooses whom to link with, by the ring of everyone and by the ring of those who answer; and whom to call for it:
    /// those we have no link with, addresses whose peers we do not know, and all addresses when alone.
    fn choose(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        self.next = None;
        let everyone: Vec<_> = self.ring.iter().collect();
        let mut wanted = neighbours(&everyone, &self.own, self.limit());
        let lost = |(target, attempts): (&'_ Target, &Attempts)| match target {
            Target::Peer(name) if attempts.unanswered >= UNREACHABLE && !self.linked.contains(name) => {
                Some(name.clone())
            }
            _ => None,
        };
        let lost: BTreeSet<PeerName> = self.attempts.iter().filter_map(lost).collect();
        self.stepped_over = !lost.is_empty();
        if self.stepped_over {
            let answering: Vec<_> =
                everyone.iter().copied().filter(|(_, name)| !lost.contains(name)).collect();
            wanted.extend(neighbours(&answering, &self.own, self.limit()));
        }
        self.wanted = wanted.into_iter().cloned().collect();
        let wanted = &self.wanted;
        self.attempts.retain(|target, attempts| match target {
            Target::Peer(name) => attempts.dialling || attempts.failures > 0 || wanted.contains(name),
            Target::Bootstrap(_) | Target::Twin => true,
        });
        let unknown = |(_, bootstrap): &(&PeerAddress, &Bootstrap)| match &bootstrap.met {
            Some(name) if self.linked.contains(name) => false,
            Some(name) => self.linked.is_empty() || !self.ring.contains(&place(name)),
            None => true,
        };
        let addresses =
            self.bootstrap.iter().filter(unknown).map(|(address, _)| Target::Bootstrap(address.clone()));
        let peers = self.wanted.difference(&self.linked).cloned().map(Target::Peer);
        self.targets = addresses.chain(peers).collect();
    }

    /// Half a second, then twice as long each time. The longest wait is as many seconds as there are targets that fail,
    /// up to half a minute: an agent calls once a second in all, so few that are lost are found again soon after a
    /// partition heals, and many (of whom the first to be found tells news of the rest) cost no more.
    fn back_off(&mut self, target: &Target, now: Instant, rng: &mut ChaCha8Rng) {
        let failing = self.attempts.values().filter(|attempts| attempts.failures > 0).count() as u32;
        let ceiling = Duration::from_secs(failing.into()).clamp(MIN_CEILING, MAX_DELAY);
        if let Some(attempts) = self.attempts.get_mut(target) {
            let doubled = FIRST_DELAY.saturating_mul(1 << (attempts.failures.max(1) - 1).min(16));
            attempts.next = now + doubled.min(ceiling).mul_f64(rng.random_range(0.5..1.0));
        }
    }

    /// Links that both ends may want, less a few places for those who join.
    fn limit(&self) -> usize {
        self.max_links - (self.max_links / 8).max(1)
    }
}

impl Attempts {
    /// Of two that want each other the one with the smaller name calls, and the other only if no call came.
    fn first(own: &PeerName, target: &Target, now: Instant, rng: &mut ChaCha8Rng) -> Self {
        let waits = matches!(target, Target::Peer(name) if own > name);
        let delay = if waits { YIELD.mul_f64(rng.random_range(1.0..1.5)) } else { Duration::ZERO };
        Self {
            failures: 0,
            unanswered: 0,
            dialling: false,
            last: None,
            next: now + delay,
            unneeded: None,
            reason: String::new(),
        }
    }
}

/// The next ones on the rings; everyone on a small one; never more than `limit`.
fn neighbours<'a>(everyone: &[&'a Place], own: &PeerName, limit: usize) -> BTreeSet<&'a PeerName> {
    let n = everyone.len();
    let Some((mine, _)) = everyone.iter().find(|(_, name)| name == own) else { return BTreeSet::new() };
    if n <= MESHED.min(limit + 1) {
        return everyone.iter().map(|(_, name)| name).filter(|name| *name != own).collect();
    }
    let rings = n.ilog2() as usize;
    let usable = rings.min(limit / 2).max(1);
    let (mut ring, mut wanted) = (everyone.to_vec(), BTreeSet::new());
    for k in 0..usable {
        // Spread evenly where not all rings may be used, that of all always among them.
        let bits = k * rings / usable;
        ring.retain(|(hash, _)| (hash ^ mine) & ((1 << bits) - 1) == 0);
        let at = ring.iter().position(|(_, name)| name == own).expect("its bits are its own");
        let near = if k == 0 && limit > 2 * rings + 1 { 2 } else { 1 };
        for places in 1..=near.min(ring.len()) {
            wanted.extend([at + places, at + ring.len() - places].map(|next| &ring[next % ring.len()].1));
        }
    }
    wanted.remove(own);
    wanted
}

fn place(name: &PeerName) -> Place {
    (gossip::hash(name.as_str().as_bytes()), name.clone())
}

/// Nodes up to which everyone is linked with everyone.
const MESHED: usize = 16;
/// With fewer links than these the ring would break where a node fails.
const MIN_LINKS: usize = 4;
/// Calls at a time.
const MAX_DIALS: usize = 16;
/// Unanswered calls after which a peer's place on the ring is stepped over.
const UNREACHABLE: u32 = 2;
const FIRST_DELAY: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(30);
const MIN_CEILING: Duration = Duration::from_secs(1);
/// How long the peer with the greater name waits for the other's call.
const YIELD: Duration = Duration::from_millis(250);
/// A link that lived that long was a good one.
const LASTING: Duration = Duration::from_secs(5);
/// Characters of a reason that are kept.
const MAX_REASON: usize = 300;

#[cfg(test)]
#[path = "dial_tests.rs"]
mod tests;
