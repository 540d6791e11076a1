//! The keys in force: a snapshot that the workers read once per batch and the handshakes replace.
//!
//! ```text
//!   out   peer ───────▶ Way        where it is ─▶ Sending: the receiver's index, a key, one counter per lane
//!   in    index ──────▶ Receiving  the peer, a key, one replay window per lane ─▶ the inner packet, in place
//! ```
//!
//! Each peer has one key to send with and up to three to receive with: the one before, the current and the next.
//! What is shared between snapshots is the session itself, so that its counters and windows go on.
//!
//! A peer may change its address: each of its lanes is where the latest packet came from that was opened.

use super::{
    replay::{Stale, Window},
    seal::{Counter, Exhausted, Forged, Numbers, OpenKey, SEALED_HEADER_LEN, SealKey},
};
pub use crate::types::SessionIndex;

use crate::types::PeerName;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

/// All sessions of this agent.
#[derive(Default)]
pub struct Sessions {
    /// Open addressing with linear probing, at most half full; the indices are random as they are.
    receiving: Box<[Option<Arc<Receiving>>]>,
    ways: BTreeMap<PeerName, Way>,
    unanswered: BTreeMap<PeerName, Instant>,
}

/// How packets get to a peer.
#[derive(Clone)]
pub struct Way {
    pub sending: Arc<Sending>,
    /// Where it listens, as its packets show; none where that is not known better than from its record.
    pub to: Option<SocketAddr>,
}

impl Sessions {
    pub fn new(ways: BTreeMap<PeerName, Way>, receiving: impl IntoIterator<Item = Arc<Receiving>>) -> Self {
        let receiving: Vec<_> = receiving.into_iter().collect();
        let mut slots = vec![None; (receiving.len() * 2).next_power_of_two()].into_boxed_slice();
        for session in receiving {
            let mut at = session.index.0 as usize & (slots.len() - 1);
            while slots[at].is_some() {
                at = (at + 1) & (slots.len() - 1);
            }
            slots[at] = Some(session);
        }
        Self { receiving: slots, ways, unanswered: BTreeMap::new() }
    }

    pub fn with_unanswered(self, unanswered: BTreeMap<PeerName, Instant>) -> Self {
        Self { unanswered, ..self }
    }

    /// The peers that do not answer our handshakes, and since when: to show.
    pub fn unanswered(&self) -> &BTreeMap<PeerName, Instant> {
        &self.unanswered
    }

    /// The session that a sealed packet names.
    pub fn receiving(&self, index: SessionIndex) -> Option<&Arc<Receiving>> {
        let mut at = index.0 as usize;
        loop {
            let session = self.receiving.get(at & self.receiving.len().wrapping_sub(1))?.as_ref()?;
            if session.index == index {
                return Some(session);
            }
            at += 1;
        }
    }

    /// How many sessions packets are taken under.
    pub fn receiving_count(&self) -> usize {
        self.receiving.iter().flatten().count()
    }

    /// How packets get to the peer; none before the first handshake. Searches by name: a worker does it once for each
    /// peer of its table when the table or the snapshot has changed, not for each packet.
    pub fn way(&self, peer: &PeerName) -> Option<&Way> {
        self.ways.get(peer)
    }

    /// What packets to the peer are sealed with.
    pub fn sending(&self, peer: &PeerName) -> Option<&Arc<Sending>> {
        self.way(peer).map(|way| &way.sending)
    }
}

/// Our direction of a session.
pub struct Sending {
    index: SessionIndex,
    key: SealKey,
    lanes: Box<[Numbers]>,
}

impl Sending {
    /// `index` is what the receiver calls the session; `lanes` counts those who send, at most 256, the last of which
    /// is the handshake's own.
    pub fn new(index: SessionIndex, key: SealKey, lanes: usize) -> Self {
        assert!(lanes <= LANES, "a counter has room for 256 lanes");
        Self { index, key, lanes: (0..lanes).map(|_| Numbers::default()).collect() }
    }

    /// Goes on where another ended, by what it had taken of each lane. Numbers are left out, so that none is used twice
    /// even if it had taken some more.
    pub fn resumed(index: SessionIndex, key: SealKey, taken: &[u64]) -> Self {
        let session = Self::new(index, key, taken.len());
        for (numbers, taken) in session.lanes.iter().zip(taken) {
            // If there are so few left, the lane is exhausted.
            let _ = numbers.take(taken.saturating_add(LEFT_OUT));
        }
        session
    }

    /// How many counters of each lane have been taken.
    pub fn by_lane(&self) -> impl Iterator<Item = u64> {
        self.lanes.iter().map(Numbers::taken)
    }

    pub fn index(&self) -> SessionIndex {
        self.index
    }

    pub fn key(&self) -> &SealKey {
        &self.key
    }

    /// Takes so many counters of a lane in a row; gives the first. One thread per lane.
    pub fn take(&self, lane: u8, count: u64) -> Result<Counter, Exhausted> {
        let number = self.lanes[usize::from(lane)].take(count)?;
        Ok(Counter { lane, number })
    }

    /// How many packets the workers have sent.
    pub fn carried(&self) -> u64 {
        self.lanes.iter().rev().skip(1).map(Numbers::taken).sum()
    }

    /// How many counters of the busiest lane have been taken.
    pub fn taken(&self) -> u64 {
        self.lanes.iter().map(Numbers::taken).max().unwrap_or(0)
    }
}

/// A peer's direction of a session.
pub struct Receiving {
    index: SessionIndex,
    peer: PeerName,
    key: OpenKey,
    /// Each is made when its first packet has been opened: an idle session has none.
    lanes: [OnceLock<Box<Shelf>>; SHELVES],
    confirmed: AtomicBool,
}

impl Receiving {
    /// `index` is what we call the session.
    pub fn new(index: SessionIndex, peer: PeerName, key: OpenKey) -> Self {
        Self { index, peer, key, lanes: Default::default(), confirmed: AtomicBool::new(false) }
    }

    /// Goes on where another ended, by what it says that came in each lane.
    pub fn resumed(index: SessionIndex, peer: PeerName, key: OpenKey, next: &[u64]) -> Self {
        let session = Self::new(index, peer, key);
        for (lane, next) in (0..=u8::MAX).zip(next).filter(|(_, next)| **next > 0) {
            lock(session.new_lane(lane)).window = Window::resumed(*next);
        }
        session.confirm();
        session
    }

    /// One more than the highest counter that came in each lane, up to the last in which one did.
    pub fn by_lane(&self) -> Vec<u64> {
        let next = |lane| self.lane(lane).map_or(0, |lane| lock(lane).window.next());
        let mut lanes: Vec<_> = (0..=u8::MAX).map(next).collect();
        lanes.truncate(lanes.iter().rposition(|next| *next > 0).map_or(0, |last| last + 1));
        lanes
    }

    pub fn index(&self) -> SessionIndex {
        self.index
    }

    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// Opens packets of this session. Keep it for as long as packets of one lane come in a row, such as one receive
    /// call gives: the lane's window is locked meanwhile.
    pub fn opener(&self) -> Opener<'_> {
        Opener { session: self, lane: None, latest: false }
    }

    /// To be called when a packet has been opened: whether it is the first, by which the peer shows that it has the
    /// key too.
    pub fn confirm(&self) -> bool {
        !self.is_confirmed() && !self.confirmed.swap(true, Relaxed)
    }

    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Relaxed)
    }

    fn lane(&self, lane: u8) -> Option<&Mutex<Lane>> {
        self.lanes[usize::from(lane) / SHELF].get()?[usize::from(lane) % SHELF].get().map(Box::as_ref)
    }

    fn new_lane(&self, lane: u8) -> &Mutex<Lane> {
        let shelf = self.lanes[usize::from(lane) / SHELF].get_or_init(Default::default);
        shelf[usize::from(lane) % SHELF].get_or_init(Default::default)
    }
}

/// One of the peer's sending queues.
#[derive(Default)]
struct Lane {
    window: Window,
    /// Where its latest packet came from.
    source: Option<SocketAddr>,
}

/// Opens packets of one session, with the lane that it is at.
pub struct Opener<'a> {
    session: &'a Receiving,
    lane: Option<(u8, MutexGuard<'a, Lane>)>,
    /// The packet that was opened last is its lane's latest.
    latest: bool,
}

/// Why a sealed packet is not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Forged(#[from] Forged),
    #[error("the packet came before")]
    Replayed,
    #[error("the packet is too far behind others of its lane")]
    TooOld,
}

impl<'a> Opener<'a> {
    /// Whose packets they are.
    pub fn session(&self) -> &'a Receiving {
        self.session
    }

    /// Opens in place what lies behind the header, once; gives the inner packet's length.
    pub fn open(&mut self, header: &[u8; SEALED_HEADER_LEN], sealed: &mut [u8]) -> Result<usize, OpenError> {
        let Counter { lane, number } = Counter::of(header);
        self.latest = false;
        if self.lane.as_ref().is_none_or(|(at, _)| *at != lane) {
            // Given back first: two openers that each wait for the other's lane would wait forever.
            self.lane = None;
            self.lane = self.session.lane(lane).map(|known| (lane, lock(known)));
        }
        if let Some((_, known)) = &self.lane {
            known.window.check(number)?;
        }
        let len = self.session.key.open(header, sealed)?;
        // Only an authentic packet makes a lane. Another worker may have made it meanwhile: commit checks again.
        let (_, known) = self.lane.get_or_insert_with(|| (lane, lock(self.session.new_lane(lane))));
        known.window.commit(number)?;
        self.latest = known.window.is_highest(number);
        Ok(len)
    }

    /// Whether the packet that was opened last is its lane's latest: an older one, long on its way, does not show where
    /// its sender is.
    pub fn is_latest(&self) -> bool {
        self.latest
    }

    /// Where the lane was before, if the packet that was opened last shows that it has moved to `from`. It is told again
    /// until [`Opener::settle`] is called.
    pub fn moved(&mut self, from: SocketAddr) -> Option<SocketAddr> {
        let (_, lane) = self.lane.as_mut().filter(|_| self.latest)?;
        Some(*lane.source.get_or_insert(from)).filter(|source| *source != from)
    }

    /// Notes that the lane has moved.
    pub fn settle(&mut self, from: SocketAddr) {
        if let Some((_, lane)) = &mut self.lane {
            lane.source = Some(from);
        }
    }
}

impl From<Stale> for OpenError {
    fn from(stale: Stale) -> Self {
        match stale {
            Stale::Replayed => Self::Replayed,
            Stale::TooOld => Self::TooOld,
        }
    }
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    // A lane is whole at every step: who panicked with it in hand has not harmed it.
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

type Shelf = [OnceLock<Box<Mutex<Lane>>>; SHELF];

/// Numbers of each lane that whoever takes over does not use.
const LEFT_OUT: u64 = 1 << 20;
/// The counter's top byte names the lane.
pub const LANES: usize = 256;
/// Lanes' places are made so many at once: few peers have more queues.
const SHELF: usize = 16;
const SHELVES: usize = LANES / SHELF;
const _: () = assert!(size_of::<Receiving>() <= 512, "a thousand idle sessions take half a megabyte");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::{
        replay::WIDTH,
        seal::{Algorithm, TAG_LEN},
    };

    const KEY: [u8; 32] = [9; 32];
    const INDEX: SessionIndex = SessionIndex(0x0102_0304);

    fn pair() -> (Sending, Receiving) {
        let algorithm = Algorithm::Aes256Gcm;
        let sending = Sending::new(INDEX, SealKey::new(algorithm, &KEY), LANES);
        (sending, Receiving::new(INDEX, "a".parse().unwrap(), OpenKey::new(algorithm, &KEY)))
    }

    struct Packet([u8; SEALED_HEADER_LEN], Vec<u8>);

    fn packet(sending: &Sending, lane: u8) -> Packet {
        let counter = sending.take(lane, 1).unwrap();
        let mut header = [0x12; SEALED_HEADER_LEN];
        header[4..8].copy_from_slice(&sending.index().0.to_be_bytes());
        header[8..].copy_from_slice(&counter.encode());
        let (mut body, mut tag) = (vec![lane; 20], [0; TAG_LEN]);
        sending.key().seal(&header, &mut body, &mut tag);
        body.extend(tag);
        Packet(header, body)
    }

    fn open(opener: &mut Opener<'_>, packet: &Packet) -> Result<Vec<u8>, OpenError> {
        let mut sealed = packet.1.clone();
        let len = opener.open(&packet.0, &mut sealed)?;
        Ok(sealed[..len].to_vec())
    }

    fn receiving(index: u32) -> Arc<Receiving> {
        let key = OpenKey::new(Algorithm::Aes256Gcm, &KEY);
        Arc::new(Receiving::new(SessionIndex(index), "a".parse().unwrap(), key))
    }

    #[test]
    fn each_packet_is_opened_once() {
        let (sending, receiving) = pair();
        let packets: Vec<_> = (0..10).map(|_| packet(&sending, 0)).collect();
        for at in [3, 0, 9, 5] {
            assert_eq!(open(&mut receiving.opener(), &packets[at]), Ok(vec![0; 20]));
        }
        for (at, packet) in packets.iter().enumerate() {
            let came = [3, 0, 9, 5].contains(&at);
            let expected = if came { Err(OpenError::Replayed) } else { Ok(vec![0; 20]) };
            assert_eq!(open(&mut receiving.opener(), packet), expected, "packet {at}");
        }
    }

    #[test]
    fn a_stalled_lane_does_not_fall_behind_the_others() {
        let (sending, receiving) = pair();
        let stalled = packet(&sending, 1);
        let old = packet(&sending, 2);
        sending.take(2, WIDTH).unwrap();
        let mut opener = receiving.opener();
        assert!(open(&mut opener, &packet(&sending, 2)).is_ok());
        assert_eq!(open(&mut opener, &old), Err(OpenError::TooOld));
        assert_eq!(open(&mut opener, &stalled), Ok(vec![1; 20]));
        assert_eq!(open(&mut opener, &stalled), Err(OpenError::Replayed));
    }

    #[test]
    fn a_forged_packet_makes_no_lane_and_moves_none() {
        let (sending, receiving) = pair();
        let mut forged = packet(&sending, 200);
        forged.0[15] = 99;
        assert_eq!(open(&mut receiving.opener(), &forged), Err(OpenError::Forged(Forged)));
        assert!(receiving.lanes.iter().all(|shelf| shelf.get().is_none()));
        assert!(open(&mut receiving.opener(), &packet(&sending, 200)).is_ok());
        forged.0[9] = 0x7f;
        assert_eq!(open(&mut receiving.opener(), &forged), Err(OpenError::Forged(Forged)));
        assert!(open(&mut receiving.opener(), &packet(&sending, 200)).is_ok());
        assert_eq!(receiving.lanes.iter().filter(|shelf| shelf.get().is_some()).count(), 1);
    }

    #[test]
    fn a_lane_is_where_its_latest_packet_came_from() {
        let (sending, receiving) = pair();
        let [here, there] = [1, 2].map(|port| SocketAddr::from(([192, 0, 2, 1], port)));
        let [first, late, second, third] = [(); 4].map(|()| packet(&sending, 0));
        let mut opener = receiving.opener();
        assert_eq!(opener.moved(here), None, "nothing was opened");
        assert!(open(&mut opener, &first).is_ok());
        assert_eq!(opener.moved(here), None, "it is the first");
        assert!(open(&mut opener, &packet(&sending, 1)).is_ok());
        assert_eq!(opener.moved(there), None, "the first of another lane");
        assert!(open(&mut opener, &second).is_ok());
        assert_eq!(
            [opener.moved(here), opener.moved(there), opener.moved(there)],
            [None, Some(here), Some(here)]
        );
        opener.settle(there);
        assert_eq!(opener.moved(there), None);
        for (stale, why) in [(&first, "replayed"), (&late, "older than another")] {
            let _ = open(&mut opener, stale);
            assert_eq!(opener.moved(here), None, "{why}");
        }
        let mut forged = packet(&sending, 0);
        forged.1[0] ^= 1;
        assert!(open(&mut opener, &forged).is_err());
        assert_eq!(opener.moved(here), None, "forged");
        assert!(open(&mut opener, &third).is_ok());
        assert_eq!(opener.moved(here), Some(there));
    }

    #[test]
    fn only_the_first_packet_confirms() {
        let (_, receiving) = pair();
        assert_eq!([receiving.confirm(), receiving.confirm(), receiving.confirm()], [true, false, false]);
    }

    #[test]
    fn every_session_is_found_by_its_index_and_no_other() {
        assert!(Sessions::default().receiving(INDEX).is_none());
        // Most want the same place, at the end of the table: they go on at its front.
        let indices: Vec<u32> = (0..40).map(|at| at << 16 | 0xffff).chain(0..9).collect();
        let sessions = Sessions::new(BTreeMap::new(), indices.iter().map(|index| receiving(*index)));
        for index in 0..=u32::from(u16::MAX) + 40 {
            let found = sessions.receiving(SessionIndex(index)).map(|session| session.index().0);
            assert_eq!(found, indices.contains(&index).then_some(index));
        }
    }
}
