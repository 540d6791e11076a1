//! Agents' handshakes over a simulated network: a virtual clock, losses, copies, delays.

use super::{message::*, noise::tests::public, *};
use crate::{
    datapath::{
        seal::{Algorithm, SEALED_HEADER_LEN, TAG_LEN},
        sessions::{SessionIndex, Sessions, Way},
    },
    types::{DataSecret, Incarnation, PeerName},
};
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

pub(super) fn random(seed: u64) -> Random {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Box::new(move |bytes| rng.fill_bytes(bytes))
}

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(super) struct Node {
    pub machine: Machine,
    pub sessions: Sessions,
    pub address: SocketAddr,
    pub incarnation: u64,
    pub refusals: BTreeMap<Refusal, usize>,
    /// Numbers of the data packets that came, in order.
    pub got: Vec<u32>,
    /// Those that wait for a key.
    pub waiting: Vec<(usize, u32)>,
}

pub(super) struct Net {
    pub start: Instant,
    pub now: Instant,
    pub seed: u64,
    pub rng: ChaCha8Rng,
    pub nodes: Vec<Node>,
    pub wire: BTreeMap<(Instant, u64), (SocketAddr, Datagram)>,
    pub sent: u64,
    /// In percent.
    pub loss: u32,
    pub copies: u32,
    pub delay: (u64, u64),
    /// Workers can't tell of first packets.
    pub deaf: bool,
    /// Every handshake message that was sent.
    pub tape: Vec<(SocketAddr, Datagram)>,
    /// The sealed packet that arrived last.
    pub sealed: Option<(SocketAddr, Datagram)>,
}

pub(super) const WORKERS: u8 = 2;

impl Net {
    pub fn new(nodes: usize, seed: u64) -> Self {
        let start = Instant::now();
        let mut net = Self {
            start,
            now: start,
            seed,
            rng: ChaCha8Rng::seed_from_u64(seed),
            nodes: Vec::new(),
            wire: BTreeMap::new(),
            sent: 0,
            loss: 0,
            copies: 0,
            delay: (1, 1),
            deaf: false,
            tape: Vec::new(),
            sealed: None,
        };
        for number in 0..nodes {
            let node = net.node(number, 1);
            net.nodes.push(node);
        }
        (0..nodes).for_each(|number| net.introduce(number));
        net
    }

    pub fn node(&mut self, number: usize, incarnation: u64) -> Node {
        let config = Config {
            name: name(number),
            secret: secret(number),
            key: public(&secret(number)),
            incarnation: Incarnation(incarnation),
            algorithm: if number == 9 { Algorithm::ChaCha20Poly1305 } else { Algorithm::Aes256Gcm },
            lanes: WORKERS,
            random: random(self.seed ^ (number as u64) << 32 ^ incarnation << 40),
        };
        Node {
            machine: Machine::new(config, self.now),
            sessions: Sessions::default(),
            address: address(number),
            incarnation,
            refusals: BTreeMap::new(),
            got: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Tells a node what the others' records say.
    pub fn introduce(&mut self, number: usize) {
        let record = |(other, node): (usize, &Node)| Peer {
            name: name(other),
            key: public(&secret(other)),
            incarnation: Incarnation(node.incarnation),
            endpoint: Some(node.address),
        };
        let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != number);
        let peers = others.map(record).collect();
        self.nodes[number].machine.set_peers(peers, self.now);
        self.collect(number);
    }

    pub fn restart(&mut self, number: usize) {
        self.nodes[number] = self.node(number, self.nodes[number].incarnation + 1);
        self.introduce(number);
    }

    /// A pod's packet; it waits where there is no key.
    pub fn send(&mut self, from: usize, to: usize, number: u32) {
        let node = &mut self.nodes[from];
        match node.sessions.sending(&name(to)) {
            Some(sending) => {
                let lane = (number % u32::from(WORKERS)) as u8;
                let mut header = [0; SEALED_HEADER_LEN];
                header[..8].copy_from_slice(&prefix(SEALED, sending.index()));
                header[8..].copy_from_slice(&sending.take(lane, 1).unwrap().encode());
                let (mut body, mut tag) = (number.to_be_bytes(), [0; TAG_LEN]);
                sending.key().seal(&header, &mut body, &mut tag);
                let bytes = [&header[..], &body, &tag].concat();
                let Way { to: known, .. } = node.sessions.way(&name(to)).unwrap();
                let (from, to) = (port(node.address, lane), known.unwrap_or(self.nodes[to].address));
                self.transmit(from, Datagram { to, bytes });
            }
            None => {
                node.waiting.push((to, number));
                node.machine.wanted(&name(to), self.now);
                self.collect(from);
            }
        }
    }

    /// Carries out what a machine wants.
    pub fn collect(&mut self, number: usize) {
        let address = self.nodes[number].address;
        while let Some(datagram) = self.nodes[number].machine.poll_datagram() {
            if datagram.bytes[0] != SEALED {
                self.tape.push((address, datagram.clone()));
            }
            self.transmit(address, datagram);
        }
        if let Some(sessions) = self.nodes[number].machine.poll_sessions() {
            self.nodes[number].sessions = sessions;
            let waiting = std::mem::take(&mut self.nodes[number].waiting);
            let (go, stay) = waiting
                .into_iter()
                .partition(|(to, _)| self.nodes[number].sessions.sending(&name(*to)).is_some());
            self.nodes[number].waiting = stay;
            let go: Vec<(usize, u32)> = go;
            go.into_iter().for_each(|(to, packet)| self.send(number, to, packet));
        }
    }

    pub fn transmit(&mut self, from: SocketAddr, datagram: Datagram) {
        for copy in 0..2 {
            if copy == 1 && self.rng.random_range(0..100) >= self.copies {
                break;
            }
            if self.rng.random_range(0..100) >= self.loss {
                self.sent += 1;
                let delay = ms(self.rng.random_range(self.delay.0..=self.delay.1));
                self.wire.insert((self.now + delay, self.sent), (from, datagram.clone()));
            }
        }
    }

    pub fn deliver(&mut self, from: SocketAddr, datagram: Datagram) {
        let hears = |node: &Node| (0..WORKERS).any(|lane| port(node.address, lane) == datagram.to);
        let Some(number) = self.nodes.iter().position(hears) else { return };
        let (now, node) = (self.now, &mut self.nodes[number]);
        let mut bytes = datagram.bytes;
        if bytes[0] == SEALED {
            self.sealed = Some((from, Datagram { to: datagram.to, bytes: bytes.clone() }));
            let (header, sealed) = bytes.split_first_chunk_mut().unwrap();
            let index = SessionIndex(u32::from_be_bytes(header[4..8].try_into().unwrap()));
            match node.sessions.receiving(index) {
                Some(session) => {
                    let mut opener = session.opener();
                    let Ok(len) = opener.open(header, sealed) else { return };
                    if session.confirm() && !self.deaf {
                        node.machine.confirmed(index);
                    }
                    if len == 0 && opener.is_latest() {
                        node.machine.shown(index, from);
                    } else if let Some(before) = opener.moved(from) {
                        node.machine.moved(index, before, from, now);
                        opener.settle(from);
                    }
                    if let Ok(packet) = sealed[..len].try_into() {
                        node.got.push(u32::from_be_bytes(packet));
                    }
                }
                None => node.machine.surprised(from, now),
            }
        } else if let Err(refusal) = node.machine.datagram(from, &bytes, now) {
            *node.refusals.entry(refusal).or_default() += 1;
        }
        self.collect(number);
    }

    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let wire = self.wire.keys().next().map(|(at, _)| *at);
            let wakes = self.nodes.iter().filter_map(|node| node.machine.next_wake());
            let Some(next) = wakes.chain(wire).min().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            match self.wire.first_entry().filter(|first| first.key().0 <= self.now) {
                Some(first) => {
                    let (from, datagram) = first.remove();
                    self.deliver(from, datagram);
                }
                None => (0..self.nodes.len()).for_each(|number| {
                    self.nodes[number].machine.wake(self.now);
                    self.collect(number);
                }),
            }
        }
        self.now = end;
    }

    pub fn index(&self, from: usize, to: usize) -> Option<SessionIndex> {
        self.nodes[from].sessions.sending(&name(to)).map(|sending| sending.index())
    }

    /// Where a node believes that another listens.
    pub fn finds(&self, node: usize, other: usize) -> Option<SocketAddr> {
        self.nodes[node].sessions.way(&name(other))?.to
    }

    /// Whether both seal for each other now, in one and the same session.
    pub fn agree(&self, a: usize, b: usize) -> bool {
        let knows = |node: usize, index| self.nodes[node].sessions.receiving(index).is_some();
        let (Some(to_b), Some(to_a)) = (self.index(a, b), self.index(b, a)) else { return false };
        knows(b, to_b) && knows(a, to_a)
    }

    pub fn responses(&self) -> usize {
        self.tape.iter().filter(|(_, datagram)| datagram.bytes[0] == RESPONSE).count()
    }
}

pub(super) fn secret(number: usize) -> DataSecret {
    DataSecret::new([number as u8 + 1; 32])
}

pub(super) fn name(number: usize) -> PeerName {
    format!("n{number}").parse().unwrap()
}

pub(super) fn address(number: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number as u8 + 1], 6783))
}

/// Where a lane sends from; the first is where its node listens.
pub(super) fn port(listens: SocketAddr, lane: u8) -> SocketAddr {
    SocketAddr::new(listens.ip(), listens.port() + u16::from(lane))
}

pub(super) fn refused(net: &Net, node: usize, refusal: Refusal) -> usize {
    net.nodes[node].refusals.get(&refusal).copied().unwrap_or(0)
}
