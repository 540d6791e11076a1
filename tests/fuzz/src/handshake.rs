//! Two agents that agree on keys, and somebody between them who knows both public keys: keeps, replays, changes, cuts and
//! makes up datagrams, and signs them so that they pass the gate.

use super::script::{Clock, Script};
use std::{
    net::SocketAddr,
    sync::LazyLock,
    time::{Duration, Instant},
};
use weft::{
    datapath::{
        handshake::{Config, Datagram, Door, Machine, Peer},
        seal::Algorithm,
        sessions::Sessions,
    },
    identity::data_key,
    types::{DataKey, DataSecret, Incarnation, PeerName, SessionIndex},
};

struct Agent {
    machine: Machine,
    sessions: Sessions,
}

struct Scene {
    agents: [Agent; 2],
    /// All that was ever sent, each with its sender.
    tape: Vec<(usize, Datagram)>,
    clock: Clock,
    /// There was no flood yet.
    calm: bool,
}

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut scene = Scene::new();
    for _ in 0..STEPS {
        let Some(step) = script.next() else { break };
        scene.step(step, &mut script);
    }
}

impl Scene {
    fn new() -> Self {
        let clock = Clock::new();
        let mut scene =
            Self { agents: [0, 1].map(|n| Agent::new(n, clock.0)), tape: Vec::new(), clock, calm: true };
        (0..2).for_each(|n| scene.introduce(n, 1));
        scene
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        let (who, other) = (usize::from(step & 1), usize::from(!step & 1));
        match step >> 1 & 7 {
            0 => self.agents[who].machine.wanted(&KEYS[other].name, self.clock.0),
            1 => {
                let pause = [1, 10, 200, 1000, 5000, 60_000, 120_000, 180_000];
                let now = self.clock.pass(Duration::from_millis(script.choose(&pause)));
                (0..2).for_each(|n| self.agents[n].machine.wake(now));
                (0..2).for_each(|n| self.collect(n));
            }
            // As it was sent, now or once more, from there or from elsewhere.
            2 => _ = self.replay(script, |_, _, _| {}),
            3 => {
                _ = self.replay(script, |to, bytes, script| {
                    let at = script.below(bytes.len());
                    bytes[at] ^= script.byte();
                    sign(to, bytes, script.byte());
                })
            }
            4 => _ = self.replay(script, |_, bytes, script| bytes.resize(script.byte().into(), 0)),
            5 => {
                let mut bytes = script.piece().to_vec();
                sign(who, &mut bytes, script.byte());
                self.deliver(who, elsewhere(script.byte()), &bytes);
            }
            6 => {
                let index = SessionIndex(u32::from_be_bytes([0, 0, script.byte(), script.byte()]));
                match script.below(3) {
                    0 => self.agents[who].machine.surprised(KEYS[other].address, self.clock.0),
                    1 => self.agents[who].machine.confirmed(index),
                    _ => self.introduce(who, script.byte().into()),
                }
            }
            // More than the gate lets in without a cookie. It takes long: it is seldom, and once is enough.
            _ if script.byte() > 247 && std::mem::take(&mut self.calm) => {
                if let Some((to, from, bytes)) = self.replay(script, |_, _, _| {}) {
                    (0..FLOOD).for_each(|_| self.deliver(to, from, &bytes));
                }
            }
            _ => {}
        }
        self.collect(who);
    }

    /// Delivers one of the tape, changed or not.
    fn replay(
        &mut self,
        script: &mut Script<'_>,
        change: impl FnOnce(usize, &mut Vec<u8>, &mut Script<'_>),
    ) -> Option<(usize, SocketAddr, Vec<u8>)> {
        let back = script.below(self.tape.len());
        let (sender, datagram) = self.tape.iter().rev().nth(back)?.clone();
        let to = KEYS.iter().position(|keys| keys.address == datagram.to)?;
        let from = match script.byte() {
            0..200 => KEYS[sender].address,
            there => elsewhere(there),
        };
        let mut bytes = datagram.bytes;
        change(to, &mut bytes, script);
        self.deliver(to, from, &bytes);
        Some((to, from, bytes))
    }

    fn deliver(&mut self, to: usize, from: SocketAddr, bytes: &[u8]) {
        let agent = &mut self.agents[to];
        let sealed = bytes.first() == Some(&0x12);
        match bytes.split_first_chunk() {
            Some((header, rest)) if sealed => {
                let index = SessionIndex(u32::from_be_bytes([header[4], header[5], header[6], header[7]]));
                match agent.sessions.receiving(index) {
                    Some(session) => {
                        let mut opener = session.opener();
                        let opened = opener.open(header, &mut rest.to_vec());
                        if opened.is_ok() && session.confirm() {
                            agent.machine.confirmed(index);
                        }
                        match opened {
                            Ok(0) if opener.is_latest() => agent.machine.shown(index, from),
                            Ok(_) => {
                                if let Some(before) = opener.moved(from) {
                                    agent.machine.moved(index, before, from, self.clock.0);
                                    opener.settle(from);
                                }
                            }
                            Err(_) => {}
                        }
                    }
                    None => agent.machine.surprised(from, self.clock.0),
                }
            }
            _ => _ = agent.machine.datagram(from, bytes, self.clock.0),
        }
        self.collect(to);
    }

    fn introduce(&mut self, who: usize, incarnation: u64) {
        let Keys { name, key, address, .. } = &KEYS[1 - who];
        let endpoint = (incarnation != 0).then_some(*address);
        let record = Peer { name: name.clone(), key: *key, incarnation: Incarnation(incarnation), endpoint };
        let records = if incarnation == 255 { Vec::new() } else { vec![record] };
        self.agents[who].machine.set_peers(records, self.clock.0);
        self.collect(who);
    }

    /// What an agent has to send goes onto the tape, and there is never much of it.
    fn collect(&mut self, who: usize) {
        let Agent { machine, sessions } = &mut self.agents[who];
        let mut sent = 0;
        while let Some(datagram) = machine.poll_datagram() {
            sent += 1;
            self.tape.push((who, datagram));
        }
        assert!(sent <= 6, "one datagram makes an agent say {sent}");
        if let Some(changed) = machine.poll_sessions() {
            assert!(changed.receiving_count() <= 3, "one peer has {} sessions", changed.receiving_count());
            *sessions = changed;
        }
        assert!(machine.next_wake().is_none_or(|at| at <= self.clock.0 + Duration::from_secs(200)));
    }
}

impl Agent {
    fn new(number: usize, now: Instant) -> Self {
        let Keys { name, secret, key, .. } = &KEYS[number];
        let mut drawn = number as u64;
        let config = Config {
            name: name.clone(),
            secret: secret.clone(),
            key: *key,
            incarnation: Incarnation(1),
            algorithm: Algorithm::Aes256Gcm,
            lanes: 2,
            // The same each time: what was found is found again.
            random: Box::new(move |bytes| {
                for byte in bytes {
                    drawn =
                        drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    *byte = (drawn >> 56) as u8;
                }
            }),
        };
        Self { machine: Machine::new(config, now), sessions: Sessions::default() }
    }
}

/// Makes the authenticator right that only asks for the receiver's public key.
fn sign(to: usize, bytes: &mut [u8], how: u8) {
    if let (Ok(initiation), 0..200) = (<&mut [u8; _]>::try_from(&mut *bytes), how) {
        KEYS[to].door.write_macs(initiation, (how & 1 != 0).then_some(&[how; 16]));
    } else if let (Ok(response), 0..200) = (<&mut [u8; _]>::try_from(bytes), how) {
        KEYS[to].door.write_mac(response);
    }
}

fn elsewhere(last: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, last], 6783))
}

struct Keys {
    name: PeerName,
    secret: DataSecret,
    key: DataKey,
    door: Door,
    address: SocketAddr,
}

static KEYS: LazyLock<[Keys; 2]> = LazyLock::new(|| {
    [0, 1].map(|n: u8| {
        let secret = DataSecret::new([n + 1; 32]);
        let key = data_key(&secret);
        let name = format!("n{n}").parse().expect("a name");
        let address = SocketAddr::from(([192, 0, 2, n + 1], 6783));
        Keys { name, key, door: Door::of(&key), secret, address }
    })
});

const STEPS: usize = 20;
/// Just above what the gate takes from anybody at once.
const FLOOD: usize = 201;
