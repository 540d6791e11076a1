//! Two agents that probe each other, directly and by a relay, and somebody between them who keeps, replays, changes, cuts and
//! makes up their probes: nothing is answered twice or louder than it was asked, and with keys nothing is believed that the
//! other has not said.

use super::script::{Clock, Script};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    time::Duration,
};
use weft::{
    datapath::{
        handshake::Random,
        path::{ANSWER, Datagram, Inputs, PROBE, PROBE_LEN, Paths, Peer, Traffic, Way},
        relay::{PREFIX_LEN, Prefix},
    },
    identity::data_key,
    types::{DataId, DataSecret, PeerName},
};

struct Scene {
    agents: [Agent; 2],
    sealed: bool,
    /// All that was ever sent, each with its sender.
    tape: Vec<(usize, Datagram)>,
    clock: Clock,
}

struct Agent {
    paths: Paths,
    inputs: Inputs,
    carried: Traffic,
}

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    // Keys are of this script alone: what was said in another would be true in this one.
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let keys = hasher.finish();
    let mut scene = Scene::new((script.byte() & 1 == 0).then_some(keys));
    for _ in 0..STEPS {
        let Some(step) = script.next() else { break };
        scene.step(step, &mut script);
    }
}

impl Scene {
    fn new(keys: Option<u64>) -> Self {
        let agents = [0, 1].map(|me| Agent::new(me, keys));
        Self { agents, sealed: keys.is_some(), tape: Vec::new(), clock: Clock::new() }
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        let who = usize::from(step & 1);
        match step >> 1 & 7 {
            0 => {
                let pause = [0, 1, 75, 200, 300, 1000, 10_000, 60_000];
                self.clock.pass(Duration::from_millis(script.choose(&pause)));
                (0..2).for_each(|n| self.wake(n));
            }
            1 | 2 => self.replay(script, |_, _| {}),
            3 => self.replay(script, |bytes, script| {
                let at = script.below(bytes.len());
                bytes[at] ^= script.byte();
            }),
            4 => self.replay(script, |bytes, script| bytes.resize(script.byte().into(), 0)),
            5 => {
                let bytes = made_up(script);
                self.deliver(who, elsewhere(script.byte()), script.byte() & 1 != 0, &bytes);
            }
            6 => {
                let agent = &mut self.agents[who];
                agent.carried.sent += u64::from(script.byte());
                agent.carried.received += u64::from(script.byte());
            }
            _ => {
                let agent = &mut self.agents[who];
                agent.change(script);
                agent.paths.set(agent.inputs.clone());
            }
        }
    }

    /// Delivers one of the tape, changed or not, from where it was sent or from elsewhere.
    fn replay(&mut self, script: &mut Script<'_>, change: impl FnOnce(&mut Vec<u8>, &mut Script<'_>)) {
        let back = script.below(self.tape.len());
        let Some((sender, datagram)) = self.tape.iter().rev().nth(back).cloned() else { return };
        let relayed = Prefix::decode(&datagram.bytes).is_some();
        let mut bytes = match relayed {
            true => datagram.bytes[PREFIX_LEN..].to_vec(),
            false => datagram.bytes,
        };
        let from = match (script.byte(), relayed) {
            (0..200, false) => SocketAddr::new(address(sender).ip(), 40_000),
            (0..200, true) => SocketAddr::new(address(RELAY).ip(), 40_000),
            (there, _) => elsewhere(there),
        };
        change(&mut bytes, script);
        self.deliver(1 - sender, from, relayed, &bytes);
    }

    fn deliver(&mut self, to: usize, from: SocketAddr, relayed: bool, bytes: &[u8]) {
        let said = |(sender, datagram): &(usize, Datagram)| {
            let said = datagram.bytes.strip_prefix(&prefix(1 - to)[..]).unwrap_or(&datagram.bytes);
            *sender == 1 - to && said.get(..PROBE_LEN) == bytes.get(..PROBE_LEN)
        };
        let taken = self.agents[to].paths.datagram(from, relayed, bytes, self.clock.0);
        if self.sealed && taken.is_ok() {
            assert!(self.tape.iter().any(said), "nobody has said that");
        }
        let answers = self.collect(to);
        assert!(answers.len() <= usize::from(taken.is_ok()), "one probe, one answer");
        for answer in answers {
            assert!(
                answer.bytes.len() <= bytes.len() + PREFIX_LEN,
                "an answer is no longer than what it is to"
            );
            assert_eq!(answer.to.ip(), from.ip(), "it goes where the probe came from");
        }
        self.look(to);
    }

    fn wake(&mut self, who: usize) {
        let now = self.clock.0;
        for _ in 0..ROUNDS {
            let Agent { paths, carried, .. } = &mut self.agents[who];
            if paths.wants_traffic(now) {
                paths.carried(|_| *carried, now);
            }
            paths.wake(now);
            let sent = self.collect(who);
            assert!(sent.len() <= 2 * LEGS * VOLLEY, "{} probes at once", sent.len());
            assert!(sent.iter().all(|datagram| datagram.bytes.len() <= MTU + AROUND));
            self.look(who);
            if self.agents[who].paths.next_wake(now).is_none_or(|next| next > now) {
                return;
            }
        }
        panic!("it never rests");
    }

    /// What an agent has to send goes onto the tape.
    fn collect(&mut self, who: usize) -> Vec<Datagram> {
        let paths = &mut self.agents[who].paths;
        let sent: Vec<_> = std::iter::from_fn(|| paths.poll_datagram()).collect();
        self.tape.extend(sent.iter().map(|datagram| (who, datagram.clone())));
        sent
    }

    fn look(&self, who: usize) {
        let Agent { paths, inputs, .. } = &self.agents[who];
        for peer in &inputs.peers {
            let view = paths.view(&peer.name).expect("each peer has a path");
            assert!((0.0..=1.0).contains(&view.loss), "{view:?}");
            assert!(view.mtu.is_none_or(|mtu| (peer.least_mtu..=peer.mtu).contains(&mtu)), "{view:?}");
            match &view.way {
                Way::Direct => assert!(view.endpoint.is_some(), "{view:?}"),
                Way::Relayed(relay) => assert_eq!(Some(relay), peer.relay.as_ref()),
                Way::Down(_) => assert_eq!(view.rtt, None),
            }
        }
    }
}

impl Agent {
    fn new(me: usize, keys: Option<u64>) -> Self {
        let mut drawn = me as u8;
        // The same each time: what was found is found again.
        let random: Random = Box::new(move |bytes| {
            drawn = drawn.wrapping_add(1);
            bytes.fill(drawn);
        });
        let peer = |n: usize| Peer {
            name: name(n),
            data_id: id(n),
            key: keys.map(|keys| data_key(&secret(n, keys))),
            endpoints: vec![address(n)],
            relay: None,
            neighbour: n != RELAY,
            mtu: 1440,
            least_mtu: 1240,
        };
        let inputs = Inputs { me: id(me), peers: vec![peer(1 - me), peer(RELAY)] };
        let mut paths = Paths::new(keys.map(|keys| secret(me, keys)), random, 1);
        paths.set(inputs.clone());
        Self { paths, inputs, carried: Traffic::default() }
    }

    /// Something else is known of the other.
    fn change(&mut self, script: &mut Script<'_>) {
        let peer = &mut self.inputs.peers[0];
        match script.below(6) {
            0 => peer.relay = (script.byte() & 1 != 0).then(|| name(RELAY)),
            1 => peer.mtu = script.choose(&[1240, 1440, MTU as u16]),
            2 => peer.neighbour ^= true,
            3 => peer.endpoints = (0..script.below(MOST)).map(|n| elsewhere(n as u8)).collect(),
            4 => peer.endpoints.truncate(script.below(MOST)),
            _ if peer.endpoints.len() < MOST => peer.endpoints.push(address(PEER)),
            _ => peer.endpoints.clear(),
        }
    }
}

/// A probe or an answer as it may be, or anything.
fn made_up(script: &mut Script<'_>) -> Vec<u8> {
    if script.byte() & 3 == 0 {
        return script.piece().to_vec();
    }
    let mut bytes = vec![script.choose(&[PROBE, ANSWER]), 0, 0, 0];
    bytes.extend(id(script.below(4)).0.to_be_bytes());
    bytes.extend([0, 0, 0, script.byte(), script.byte(), script.byte(), script.byte(), script.byte()]);
    bytes.extend([script.byte(), 0, script.byte(), script.byte()]);
    bytes.resize(PROBE_LEN + script.below(64), script.byte());
    bytes
}

/// What goes by a relay begins so.
fn prefix(sender: usize) -> [u8; PREFIX_LEN] {
    Prefix::new(id(sender), id(1 - sender)).encode()
}

fn name(n: usize) -> PeerName {
    format!("n{n}").parse().expect("a name")
}

fn id(n: usize) -> DataId {
    DataId(n as u32 + 100)
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n as u8], 6783))
}

fn elsewhere(last: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, last], 6783))
}

fn secret(n: usize, keys: u64) -> DataSecret {
    let mut bytes = [n as u8 + 1; 32];
    bytes[8..16].copy_from_slice(&keys.to_be_bytes());
    DataSecret::new(bytes)
}

const RELAY: usize = 2;
/// Of the two, the one that has more addresses.
const PEER: usize = 1;
const STEPS: usize = 48;
/// Endpoints of a peer; with one that was seen and a relay, the ways to it.
const MOST: usize = 3;
const LEGS: usize = MOST + 2;
/// Probes of different sizes on one way.
const VOLLEY: usize = 10;
/// The largest inner packet, and what is around it: header, tag and what a relay wants.
const MTU: usize = 8940;
const AROUND: usize = 16 + 16 + PREFIX_LEN;
/// After so many wakes at one moment nothing more is due.
const ROUNDS: usize = 4;
