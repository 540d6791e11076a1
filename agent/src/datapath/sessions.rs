//! The keys in force: a snapshot that the workers read once per batch and the handshakes replace.
//!
//! ```text
//!   out   peer ───────▶ Sending    the receiver's index, a key, one counter per lane
//!   in    index ──────▶ Receiving  the peer, a key, one replay window per lane ─▶ the inner packet, in place
//! ```
//!
//! Each peer has one key to send with and up to three to receive with: the one before, the current and the next.
//! What is shared between snapshots is the session itself, so that its counters and windows go on.

use super::{
    replay::{Stale, Window},
    seal::{Counter, Exhausted, Forged, Numbers, OpenKey, SEALED_HEADER_LEN, SealKey},
};
pub use crate::types::SessionIndex;

use crate::types::PeerName;
use std::{
    collections::BTreeMap,
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
    sending: BTreeMap<PeerName, Arc<Sending>>,
    unanswered: BTreeMap<PeerName, Instant>,
}

impl Sessions {
    pub fn new(
        sending: BTreeMap<PeerName, Arc<Sending>>,
        receiving: impl IntoIterator<Item = Arc<Receiving>>,
    ) -> Self {
        let receiving: Vec<_> = receiving.into_iter().collect();
        let mut slots = vec![None; (receiving.len() * 2).next_power_of_two()].into_boxed_slice();
        for session in receiving {
            let mut at = session.index.0 as usize & (slots.len() - 1);
            while slots[at].is_some() {
                at = (at + 1) & (slots.len() - 1);
            }
            slots[at] = Some(session);
        }
        Self { receiving: slots, sending, unanswered: BTreeMap::new() }
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

    /// What packets to the peer are sealed with; none before the first handshake. Searches by name: a worker does it
    /// once for each peer of its table when the table or the snapshot has changed, not for each packet.
    pub fn sending(&self, peer: &PeerName) -> Option<&Arc<Sending>> {
        self.sending.get(peer)
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

    /// Whether a worker has sent anything.
    pub fn has_carried(&self) -> bool {
        self.lanes.iter().rev().skip(1).any(|lane| lane.taken() > 0)
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
    /// Made for a lane when its first packet has been opened: an idle session has none.
    windows: [OnceLock<Box<Shelf>>; SHELVES],
    confirmed: AtomicBool,
}

impl Receiving {
    /// `index` is what we call the session.
    pub fn new(index: SessionIndex, peer: PeerName, key: OpenKey) -> Self {
        Self { index, peer, key, windows: Default::default(), confirmed: AtomicBool::new(false) }
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
        Opener { session: self, window: None }
    }

    /// To be called when a packet has been opened: whether it is the first, by which the peer shows that it has the
    /// key too.
    pub fn confirm(&self) -> bool {
        !self.is_confirmed() && !self.confirmed.swap(true, Relaxed)
    }

    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Relaxed)
    }

    fn window(&self, lane: u8) -> Option<&Mutex<Window>> {
        self.windows[usize::from(lane) / SHELF].get()?[usize::from(lane) % SHELF].get().map(Box::as_ref)
    }

    fn new_window(&self, lane: u8) -> &Mutex<Window> {
        let shelf = self.windows[usize::from(lane) / SHELF].get_or_init(Default::default);
        shelf[usize::from(lane) % SHELF].get_or_init(Default::default)
    }
}

/// Opens packets of one session, with the window of the lane that it is at.
pub struct Opener<'a> {
    session: &'a Receiving,
    window: Option<(u8, MutexGuard<'a, Window>)>,
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
        if self.window.as_ref().is_none_or(|(at, _)| *at != lane) {
            // Given back first: two openers that each wait for the other's lane would wait forever.
            self.window = None;
            self.window = self.session.window(lane).map(|window| (lane, lock(window)));
        }
        if let Some((_, window)) = &self.window {
            window.check(number)?;
        }
        let len = self.session.key.open(header, sealed)?;
        // Only an authentic packet makes a window. Another worker may have made it meanwhile: commit checks again.
        let (_, window) = self.window.get_or_insert_with(|| (lane, lock(self.session.new_window(lane))));
        window.commit(number)?;
        Ok(len)
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

fn lock(window: &Mutex<Window>) -> MutexGuard<'_, Window> {
    // A window is whole at every step: who panicked with it in hand has not harmed it.
    window.lock().unwrap_or_else(PoisonError::into_inner)
}

type Shelf = [OnceLock<Box<Mutex<Window>>>; SHELF];

/// The counter's top byte names the lane.
pub const LANES: usize = 256;
/// Windows' places are made so many at once: few peers have more queues.
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
    fn a_forged_packet_makes_no_window_and_moves_none() {
        let (sending, receiving) = pair();
        let mut forged = packet(&sending, 200);
        forged.0[15] = 99;
        assert_eq!(open(&mut receiving.opener(), &forged), Err(OpenError::Forged(Forged)));
        assert!(receiving.windows.iter().all(|shelf| shelf.get().is_none()));
        assert!(open(&mut receiving.opener(), &packet(&sending, 200)).is_ok());
        forged.0[9] = 0x7f;
        assert_eq!(open(&mut receiving.opener(), &forged), Err(OpenError::Forged(Forged)));
        assert!(open(&mut receiving.opener(), &packet(&sending, 200)).is_ok());
        assert_eq!(receiving.windows.iter().filter(|shelf| shelf.get().is_some()).count(), 1);
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
