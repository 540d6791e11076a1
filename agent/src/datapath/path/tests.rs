//! Agents' paths over a network that loses what the test says, in virtual time.
#![allow(clippy::disallowed_methods)]

use super::*;
use crate::identity::data_key;
use std::cell::Cell;

struct Net {
    agents: Vec<Paths>,
    /// When it arrives, from whom, to whom, and what.
    wire: Vec<(Instant, usize, usize, Vec<u8>)>,
    now: Instant,
    sent: usize,
}

const DELAY: Duration = Duration::from_millis(1);

fn address(agent: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, agent as u8], 6783))
}

/// Where its probes leave from.
fn source(agent: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, agent as u8], 40_000))
}

fn name(agent: usize) -> PeerName {
    format!("n{agent}").parse().unwrap()
}

fn secret(agent: usize) -> DataSecret {
    DataSecret::new([agent as u8 + 1; 32])
}

fn inputs(me: usize, count: usize, sealed: bool) -> Inputs {
    let peer = |agent: usize| Peer {
        name: name(agent),
        data_id: DataId(agent as u32 + 100),
        key: sealed.then(|| data_key(&secret(agent))),
        endpoints: vec![address(agent)],
        relay: None,
        neighbour: true,
        mtu: 1440,
        least_mtu: 576,
    };
    let peers = (0..count).filter(|agent| *agent != me).map(peer).collect();
    Inputs { me: DataId(me as u32 + 100), peers }
}

impl Net {
    fn new(count: usize, sealed: bool) -> Self {
        let agent = |me: usize| {
            let state = Cell::new(me as u8);
            let random: Random = Box::new(move |bytes: &mut [u8]| {
                state.set(state.get().wrapping_add(1));
                bytes.fill(state.get());
            });
            let mut paths = Paths::new(sealed.then(|| secret(me)), random, 1);
            paths.set(inputs(me, count, sealed));
            paths
        };
        Self { agents: (0..count).map(agent).collect(), wire: Vec::new(), now: Instant::now(), sent: 0 }
    }

    /// Goes on until `until` holds; what `passes` does not let from one to the other is lost.
    fn run(&mut self, passes: impl Fn(usize, usize) -> bool, until: impl Fn(&Self) -> bool) -> Duration {
        let start = self.now;
        while !until(self) {
            assert!(self.now - start < Duration::from_secs(100), "{:#?}", self.agents[0].view(&name(1)));
            let wakes = self.agents.iter().filter_map(|agent| agent.next_wake(self.now));
            let arrivals = self.wire.iter().map(|(at, ..)| *at);
            self.now = wakes.chain(arrivals).min().unwrap().max(self.now);
            let (now, mut arrived) = (self.now, Vec::new());
            self.wire.retain(|message| {
                let due = message.0 <= now;
                if due {
                    arrived.push(message.clone());
                }
                !due
            });
            for (_, from, to, bytes) in arrived {
                let _ = self.agents[to].datagram(source(from), false, &bytes, now);
            }
            for from in 0..self.agents.len() {
                let agent = &mut self.agents[from];
                if agent.wants_traffic(now) {
                    agent.carried(|_| Traffic::default(), now);
                }
                agent.wake(now);
                while let Some(Datagram { to, bytes }) = agent.poll_datagram() {
                    self.sent += 1;
                    let to = (0..2).find(|agent| address(*agent) == to);
                    if let Some(to) = to.filter(|to| passes(from, *to)) {
                        self.wire.push((now + DELAY, from, to, bytes));
                    }
                }
            }
        }
        self.now - start
    }

    fn way(&self, from: usize, to: usize) -> Way {
        self.agents[from].view(&name(to)).unwrap().way
    }

    fn both(&self, down: bool) -> bool {
        let is_down = |from, to| matches!(self.way(from, to), Way::Down(_));
        is_down(0, 1) == down && is_down(1, 0) == down
    }

    fn meet(&mut self) {
        let measured =
            |net: &Self, from: usize, to: usize| net.agents[from].view(&name(to)).unwrap().direct.is_some();
        self.run(|_, _| true, |net| measured(net, 0, 1) && measured(net, 1, 0));
    }
}

#[test]
fn a_cut_is_noticed_by_both_and_so_is_its_end() {
    for sealed in [true, false] {
        let mut net = Net::new(2, sealed);
        net.meet();
        let took = net.run(|_, _| false, |net| net.both(true));
        assert!(took <= Duration::from_millis(1200), "{took:?}");
        let end = net.now + Duration::from_secs(60);
        net.run(|_, _| false, |net| net.now >= end);
        let took = net.run(|_, _| true, |net| net.both(false));
        assert!(took <= Duration::from_millis(400), "{took:?}");
    }
}

#[test]
fn a_cut_in_one_direction_is_one_for_both() {
    for lost in [(0, 1), (1, 0)] {
        let mut net = Net::new(2, true);
        net.meet();
        let end = net.now + Duration::from_secs(3);
        net.run(|_, _| true, |net| net.now >= end);
        let took = net.run(|from, to| (from, to) != lost, |net| net.both(true));
        assert!(took <= Duration::from_millis(1800), "{lost:?}: {took:?}");
    }
}

#[test]
fn idle_peers_send_few_packets() {
    let mut net = Net::new(2, true);
    net.meet();
    let (sent, end) = (net.sent, net.now + Duration::from_secs(30));
    net.run(|_, _| true, |net| net.now >= end);
    let sent = net.sent - sent;
    // A probe and its answer in 300 ms; twice that where both begin at the same moment, as nothing here is ever late.
    assert!((180..=420).contains(&sent), "{sent}");
}

#[test]
fn nobody_else_speaks_for_a_peer() {
    let mut net = Net::new(2, true);
    net.meet();
    let other = probe::Key::agree(&secret(2), &data_key(&secret(1))).unwrap();
    let forged =
        |kind, key| Probe { kind, sender: DataId(100), number: u64::MAX, rtt: None }.encode(key, DataId(101));
    for forged in [forged(Kind::Probe, None), forged(Kind::Probe, Some(&other)), forged(Kind::Answer, None)] {
        assert_eq!(net.agents[1].datagram(source(0), false, &forged, net.now), Err(Drop::Probe));
    }
    let stranger = Probe { kind: Kind::Probe, sender: DataId(9), number: 1, rtt: None };
    let stranger = stranger.encode(Some(&other), DataId(101));
    assert_eq!(net.agents[1].datagram(source(0), false, &stranger, net.now), Err(Drop::Probe));
    assert_eq!(net.agents[1].poll_datagram(), None);
}

#[test]
fn a_probe_said_again_shows_nothing() {
    let mut net = Net::new(2, true);
    net.meet();
    let key = probe::Key::agree(&secret(0), &data_key(&secret(1))).unwrap();
    let said = Probe { kind: Kind::Probe, sender: DataId(100), number: 1 << 50, rtt: Some(DELAY) };
    let said = said.encode(Some(&key), DataId(101));
    let start = net.now;
    while net.now < start + Duration::from_secs(2) {
        // Over and over, by somebody who has heard it once.
        net.agents[1].datagram(source(0), false, &said, net.now).unwrap();
        let end = net.now + Duration::from_millis(100);
        net.run(|_, _| false, |net| net.now >= end);
    }
    assert!(matches!(net.way(1, 0), Way::Down(_)));
}

#[test]
fn a_peer_is_followed_to_the_address_that_its_probes_come_from() {
    let mut net = Net::new(2, true);
    net.meet();
    let mut moved = inputs(1, 2, true);
    moved.peers[0].endpoints = vec!["192.0.2.77:6783".parse().unwrap()];
    net.agents[1].set(moved);
    net.run(
        |_, _| true,
        |net| {
            let view = net.agents[1].view(&name(0)).unwrap();
            view.endpoint == Some(address(0)) && view.direct.is_some()
        },
    );
}

#[test]
fn who_is_not_due_costs_nothing() {
    const PEERS: usize = 1000;
    let random: Random = Box::new(|bytes: &mut [u8]| bytes.fill(7));
    let mut paths = Paths::new(None, random, 1);
    let mut peers = inputs(0, 2, false);
    let peer = peers.peers.remove(0);
    let far = |agent: usize| Peer {
        name: name(agent),
        data_id: DataId(agent as u32),
        endpoints: vec![SocketAddr::from(([192, 0, 2, 1], agent as u16))],
        neighbour: agent == 1,
        ..peer.clone()
    };
    peers.peers = (1..=PEERS).map(far).collect();
    paths.set(peers);
    let mut now = Instant::now();
    let pass = |paths: &mut Paths, now: &mut Instant, time: Duration| {
        let (end, mut told) = (*now + time, 0);
        while let Some(next) = paths.next_wake(*now).filter(|next| *next < end) {
            *now = next.max(*now);
            if paths.wants_traffic(*now) {
                paths.carried(|_| Traffic::default(), *now);
            }
            paths.wake(*now);
            while let Some(Datagram { to, bytes }) = paths.poll_datagram() {
                let number = Probe::decode(&bytes).unwrap().number;
                let (sender, rtt) = (DataId(to.port().into()), None);
                let answer = Probe { kind: Kind::Answer, sender, number, rtt };
                let _ = paths.datagram(to, false, &answer.encode(None, DataId(100)), *now + DELAY);
            }
            told += paths.take_changed().len();
        }
        *now = end;
        told
    };
    assert!(pass(&mut paths, &mut now, Duration::from_secs(5)) >= PEERS);
    let told = pass(&mut paths, &mut now, Duration::from_secs(30));
    assert!((90..300).contains(&told), "{told} views in 30 s, of one neighbour");
    let told = pass(&mut paths, &mut now, Duration::from_secs(60));
    assert!((PEERS..PEERS + 600).contains(&told), "{told} views in a minute");
}
