//! What a machine hands to the one that goes on in its place, in another process.
//!
//! Only sessions go over. A handshake that is under way is begun again by who needs it; what the peer has begun and not
//! used yet only opens from then on, and the next keys are agreed on as usual.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Machine,
    noise::{Keys, Stamp, algorithm, code},
    peer::{Called, Session, State},
};
use crate::{
    datapath::{
        seal::KEY_LEN,
        sessions::{LANES, Receiving, Sending, SessionIndex},
    },
    types::{DataKey, Incarnation, PeerName},
};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use weft_proto::takeover::{Peer, Session as Wire, session::Use};
use zeroize::Zeroizing;

/// All that a machine hands over. Keys are in it, and overwritten when it is dropped.
#[derive(Default)]
pub struct Estate {
    /// Of the last initiation that was said.
    pub moment: u64,
    pub peers: Vec<Peer>,
}

impl Drop for Estate {
    fn drop(&mut self) {
        self.peers.iter_mut().for_each(forget);
    }
}

/// Overwrites the keys.
pub fn forget(peer: &mut Peer) {
    use zeroize::Zeroize;
    for session in &mut peer.sessions {
        session.sending_key.zeroize();
        session.receiving_key.zeroize();
    }
}

impl Machine {
    /// Ends; nobody may use its sessions any more.
    pub fn release(self, now: Instant) -> Estate {
        let peers = self.peers.iter().filter(|(_, state)| state.sessions().next().is_some());
        Estate { moment: self.moment, peers: peers.map(|(name, state)| state.to_wire(name, now)).collect() }
    }

    /// Goes on where another ended. To be called first of all; a peer of which there is no sense to be made is left out,
    /// and agrees on new keys.
    pub fn resume(&mut self, estate: &Estate, now: Instant) {
        self.moment = estate.moment;
        for peer in &estate.peers {
            let Some((name, state)) = State::of_wire(peer, self.lanes(), now) else { continue };
            let indices: Vec<_> = state.sessions().map(|session| session.receiving.index()).collect();
            self.take_in(name, state, indices);
        }
    }
}

impl State {
    fn to_wire(&self, name: &PeerName, now: Instant) -> Peer {
        let address =
            |address: Option<SocketAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        let current = self.current.as_ref().map(|session| session.to_wire(Use::Current, now));
        // Of two, the one that the peer is about to send under.
        let next = self.next.as_ref().map(|next| &next.session);
        let receiving = next.or(self.previous.as_ref()).map(|session| session.to_wire(Use::Receiving, now));
        Peer {
            name: name.to_string(),
            key: self.key.0.into(),
            incarnation: self.incarnation.0,
            published: address(self.published),
            endpoint: address(self.endpoint),
            stamp_incarnation: self.stamp.incarnation.0,
            stamp_moment: self.stamp.moment,
            sessions: current.into_iter().chain(receiving).collect(),
        }
    }

    fn of_wire(wire: &Peer, lanes: usize, now: Instant) -> Option<(PeerName, Self)> {
        let name: PeerName = wire.name.parse().ok()?;
        let mut state = Self::new(DataKey::from_bytes(&wire.key)?);
        state.incarnation = Incarnation(wire.incarnation);
        (state.published, state.endpoint) = (wire.published.parse().ok(), wire.endpoint.parse().ok());
        state.stamp = Stamp { incarnation: Incarnation(wire.stamp_incarnation), moment: wire.stamp_moment };
        for session in &wire.sessions {
            let place = match session.r#use() {
                Use::Current => &mut state.current,
                Use::Receiving => &mut state.previous,
                Use::Unspecified => continue,
            };
            *place = Some(Session::of_wire(session, &name, lanes, now)?);
        }
        Some((name, state))
    }
}

impl Session {
    fn to_wire(&self, r#use: Use, now: Instant) -> Wire {
        Wire {
            r#use: r#use.into(),
            ours: self.receiving.index().0,
            theirs: self.sending.index().0,
            algorithm: code(self.keys.algorithm).into(),
            sending_key: self.keys.sending.to_vec(),
            receiving_key: self.keys.receiving.to_vec(),
            incarnation: self.incarnation.0,
            age_us: now.saturating_duration_since(self.born).as_micros().try_into().unwrap_or(u64::MAX),
            called_by_us: self.called == Called::ByUs,
            sent: self.sending.by_lane().collect(),
            received: self.receiving.by_lane(),
        }
    }

    fn of_wire(wire: &Wire, peer: &PeerName, lanes: usize, now: Instant) -> Option<Self> {
        let key = |bytes: &[u8]| Some(Zeroizing::new(<[u8; KEY_LEN]>::try_from(bytes).ok()?));
        let keys = Keys {
            algorithm: algorithm(&[u8::try_from(wire.algorithm).ok()?])?,
            sending: key(&wire.sending_key)?,
            receiving: key(&wire.receiving_key)?,
        };
        if wire.sent.len() != lanes || wire.received.len() > LANES {
            return None;
        }
        let (theirs, ours) = (SessionIndex(wire.theirs), SessionIndex(wire.ours));
        Some(Self {
            sending: Arc::new(Sending::resumed(theirs, keys.seal_key(), &wire.sent)),
            receiving: Arc::new(Receiving::resumed(ours, peer.clone(), keys.open_key(), &wire.received)),
            keys,
            // A clock that has not run for so long lets it end late: keys are replaced by then.
            born: now.checked_sub(Duration::from_micros(wire.age_us)).unwrap_or(now),
            called: if wire.called_by_us { Called::ByUs } else { Called::ByPeer },
            incarnation: Incarnation(wire.incarnation),
            shown: (now, 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::handshake::sim::{Net, ms, name};

    impl Net {
        /// Another machine goes on for a node's, after the messages have been changed.
        fn take_over(&mut self, number: usize, change: impl FnOnce(&mut Estate)) {
            let fresh = self.node(number, self.nodes[number].incarnation);
            let before = std::mem::replace(&mut self.nodes[number].machine, fresh.machine);
            let mut estate = before.release(self.now);
            change(&mut estate);
            self.nodes[number].sessions = fresh.sessions;
            self.nodes[number].machine.resume(&estate, self.now);
            self.collect(number);
        }
    }

    #[test]
    fn packets_go_on_both_ways_without_a_handshake() {
        let mut net = Net::new(2, 1);
        net.send(0, 1, 0);
        net.run(ms(10));
        let (handshake, indices) = (net.tape.len(), [net.index(0, 1), net.index(1, 0)]);
        for number in 1..100 {
            // Of both lanes, and those that are on their way meanwhile too.
            (0..4).for_each(|more| net.send(0, 1, 4 * number + more));
            (0..4).for_each(|more| net.send(1, 0, 4 * number + more));
            let who = number as usize % 2;
            net.take_over(who, |_| {});
            // It has not heard the records yet: then they say nothing new.
            if number % 3 == 0 {
                net.introduce(who);
            }
            net.run(ms(10));
        }
        assert_eq!(net.tape.len(), handshake, "no word about keys");
        assert_eq!([net.index(0, 1), net.index(1, 0)], indices);
        assert_eq!(net.nodes[0].got, (4..400).collect::<Vec<_>>());
        assert_eq!(net.nodes[1].got[1..], (4..400).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_taken_twice_and_no_number_is_used_twice() {
        let mut net = Net::new(2, 1);
        net.send(0, 1, 1);
        net.run(ms(10));
        let taken =
            |net: &Net| net.nodes[0].sessions.sending(&name(1)).unwrap().by_lane().collect::<Vec<_>>();
        let before = taken(&net);
        let (from, packet) = net.sealed.clone().unwrap();
        net.take_over(0, |_| {});
        net.take_over(1, |_| {});
        assert!(taken(&net).iter().zip(&before).all(|(after, before)| after > before));
        let got = net.nodes[1].got.clone();
        net.deliver(from, packet);
        assert_eq!(net.nodes[1].got, got, "it came before");
    }

    #[test]
    fn a_takeover_in_the_middle_of_a_handshake_costs_no_more_than_that() {
        for at in 0..40 {
            let mut net = Net::new(2, at);
            net.delay = (10, 10);
            net.send(0, 1, 1);
            net.run(ms(at));
            let who = at as usize % 2;
            net.take_over(who, |_| {});
            net.introduce(who);
            net.run(ms(500));
            for number in 2..5 {
                net.send(0, 1, number);
                net.send(1, 0, number);
                net.run(ms(300));
            }
            for node in &net.nodes {
                assert!(node.got.ends_with(&[4]), "at {at} ms: {:?}", node.got);
            }
            net.run(Duration::from_secs(400));
            net.send(0, 1, 9);
            net.run(ms(100));
            assert!(net.nodes[1].got.ends_with(&[9]), "keys are agreed on as ever, at {at} ms");
        }
    }

    #[test]
    fn a_session_grows_old_as_if_nothing_had_happened() {
        let mut net = Net::new(2, 1);
        net.send(0, 1, 1);
        net.run(Duration::from_secs(100));
        net.take_over(0, |_| {});
        net.introduce(0);
        let index = net.index(0, 1);
        net.run(Duration::from_secs(40));
        assert!(net.agree(0, 1) && net.index(0, 1) != index, "packets were sent: it has new keys");
        net.run(Duration::from_secs(200));
        assert_eq!(net.index(0, 1), None, "nothing was sent under those");
    }

    #[test]
    fn peers_that_make_no_sense_are_left_out() {
        let changes: [fn(&mut Peer); 6] = [
            |peer| peer.name.clear(),
            |peer| peer.key.truncate(31),
            |peer| peer.sessions[0].algorithm = 9,
            |peer| peer.sessions[0].sending_key.clear(),
            |peer| peer.sessions[0].sent.push(0),
            |peer| peer.sessions[0].received = vec![1; LANES + 1],
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut net = Net::new(2, 1);
            net.send(0, 1, 1);
            net.run(ms(10));
            net.take_over(0, |estate| change(&mut estate.peers[0]));
            assert_eq!(net.index(0, 1), None, "change {number}");
            net.introduce(0);
            net.send(0, 1, 2);
            net.run(ms(300));
            assert_eq!(net.nodes[1].got, [1, 2], "change {number}");
        }
    }
}
