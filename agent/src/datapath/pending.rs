//! Packets that wait for a key, at the worker that read them: so that the first one to a peer is not lost.
//!
//! The oldest stay: the first packet of a connection is worth more than what follows it. What is too much is not taken,
//! and what has waited for as long as a handshake may last is given up; the worker counts both.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::handshake::PATIENCE;
use crate::types::PeerName;
use std::{collections::BTreeMap, time::Instant};

/// One worker's waiting packets. To it they are bytes: whatever the worker needs to go on with each.
#[derive(Default)]
pub struct Pending {
    peers: BTreeMap<PeerName, Queue>,
    bytes: usize,
}

struct Queue {
    since: Instant,
    packets: Vec<Box<[u8]>>,
    bytes: usize,
}

impl Pending {
    /// Takes a copy of the packet; whether there was room.
    #[must_use]
    pub fn push(&mut self, peer: &PeerName, packet: &[u8], now: Instant) -> bool {
        let full =
            |queue: &Queue| queue.packets.len() >= PEER_PACKETS || queue.bytes + packet.len() > PEER_BYTES;
        if self.bytes + packet.len() > BYTES || self.peers.get(peer).is_some_and(full) {
            return false;
        }
        let fresh = || Queue { since: now, packets: Vec::new(), bytes: 0 };
        let queue = self.peers.entry(peer.clone()).or_insert_with(fresh);
        queue.packets.push(packet.into());
        queue.bytes += packet.len();
        self.bytes += packet.len();
        true
    }

    /// Gives the packets of the peers that `ready` says have a key now, in the order in which they came.
    pub fn take(&mut self, mut ready: impl FnMut(&PeerName) -> bool) -> Vec<(PeerName, Vec<Box<[u8]>>)> {
        let taken: Vec<_> = self.peers.extract_if(.., |peer, _| ready(peer)).collect();
        self.bytes -= taken.iter().map(|(_, queue)| queue.bytes).sum::<usize>();
        taken.into_iter().map(|(peer, queue)| (peer, queue.packets)).collect()
    }

    /// Gives up those who have waited too long; how many packets that were. To be called at [`Pending::next_wake`], or
    /// whenever the worker wakes anyway.
    pub fn expire(&mut self, now: Instant) -> usize {
        let over: Vec<_> =
            self.peers.extract_if(.., |_, queue| now.duration_since(queue.since) >= PATIENCE).collect();
        self.bytes -= over.iter().map(|(_, queue)| queue.bytes).sum::<usize>();
        over.iter().map(|(_, queue)| queue.packets.len()).sum()
    }

    pub fn next_wake(&self) -> Option<Instant> {
        self.peers.values().map(|queue| queue.since + PATIENCE).min()
    }

    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }
}

/// For each peer: the lookups of two hundred clients at once, of both families, on a name server that nobody has asked yet.
const PEER_PACKETS: usize = 512;
/// For each peer: a super-packet of the largest size, and then some.
const PEER_BYTES: usize = 128 << 10;
/// For all peers of one worker.
const BYTES: usize = 4 << 20;
const _: () = assert!(PEER_BYTES >= (64 << 10) + 64, "one super-packet fits");

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn name(number: usize) -> PeerName {
        format!("n{number}").parse().unwrap()
    }

    #[test]
    fn packets_come_out_in_order_when_their_peer_is_ready() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        for (peer, packet) in [(1, b"a"), (2, b"x"), (1, b"b")] {
            assert!(pending.push(&name(peer), packet, now));
        }
        assert!(pending.take(|_| false).is_empty());
        let taken = pending.take(|peer| *peer == name(1));
        assert_eq!(taken, [(name(1), vec![b"a".as_slice().into(), b"b".as_slice().into()])]);
        assert_eq!((pending.is_empty(), pending.bytes), (false, 1));
        assert_eq!(pending.take(|_| true).len(), 1);
        assert_eq!((pending.is_empty(), pending.bytes), (true, 0));
    }

    #[test]
    fn the_first_packets_stay_and_the_rest_is_not_taken() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        for packet in 0..PEER_PACKETS + 5 {
            assert_eq!(pending.push(&name(1), &packet.to_be_bytes(), now), packet < PEER_PACKETS);
        }
        assert_eq!(pending.take(|_| true)[0].1[0][..], 0_usize.to_be_bytes());
        let large = [0; 64 << 10];
        let room = (0..5).filter(|_| pending.push(&name(1), &large, now)).count();
        assert_eq!(room, PEER_BYTES / large.len());
        let room = (2..200).filter(|peer| pending.push(&name(*peer), &large, now)).count();
        assert_eq!(room, BYTES / large.len() - 2, "all peers together are bounded");
    }

    #[test]
    fn what_waits_too_long_is_given_up() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        assert_eq!(pending.next_wake(), None);
        assert!(
            pending.push(&name(1), b"a", now) && pending.push(&name(2), b"b", now + Duration::from_secs(1))
        );
        assert!(pending.push(&name(1), b"c", now + Duration::from_secs(2)));
        assert_eq!(pending.next_wake(), Some(now + PATIENCE));
        assert_eq!(pending.expire(now + PATIENCE), 2);
        assert_eq!((pending.bytes, pending.next_wake()), (1, Some(now + PATIENCE + Duration::from_secs(1))));
    }
}
