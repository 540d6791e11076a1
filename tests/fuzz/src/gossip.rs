//! Frames of links: anybody's before the hello, any peer's behind it. What an agent keeps and says for them is bounded,
//! and it passes on only what it would take.

use super::script::{Clock, Script};
use prost::Message;
use std::time::Duration;
use weft::{
    ipam::{
        death::{Death, DeathGossip},
        election::{Ballot, Vote, VoteGossip},
        span::Layout,
        token::RingGossiper,
    },
    mesh::{
        gossip::{Gossiper, Item},
        link::LinkId,
        machine::{Config, Input, Mesh, Output},
        peers::{PeerGossip, PeerRecord},
        wire::{self, Frame, Hello, frame::Body},
    },
    types::{Incarnation, PeerName},
};

struct Scene {
    mesh: Mesh,
    clock: Clock,
    links: u64,
}

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut scene = Scene::new();
    for _ in 0..STEPS {
        let Some(step) = script.next() else { break };
        let inputs = scene.step(step, &mut script);
        for input in inputs {
            scene.mesh.handle(input, scene.clock.0);
            scene.drain();
        }
    }
    scene.look();
}

impl Scene {
    fn new() -> Self {
        let clock = Clock::new();
        let config = Config {
            record: PeerRecord::new(name(0), Incarnation(5)),
            universe: UNIVERSE.parse().expect("a universe"),
            identity: None,
            seeds: Vec::new(),
            bootstrap: Vec::new(),
            max_links: 4,
            items: Vec::new(),
            gossipers: gossipers(),
            seed: 1,
        };
        let mut scene = Self { mesh: Mesh::new(config, clock.0), clock, links: 0 };
        scene.mesh.handle(Input::Wake, scene.clock.0);
        scene.drain();
        scene
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) -> Vec<Input> {
        let link = LinkId(self.links.saturating_sub(script.below(8) as u64));
        let framed = |body| vec![Input::Frame { link, frame: Frame { body: Some(body) } }];
        match step % 8 {
            // A new link, and a hello that is welcome, or not.
            0 => {
                self.links += 1;
                let (link, peer) = (LinkId(self.links), name(script.below(6)));
                let opened = Input::Opened { link, dialled: None, remote: "[::1]:9".into(), certified: None };
                let hello = Hello {
                    protocol: 1,
                    name: peer.to_string(),
                    incarnation: script.below(10) as u64,
                    software: "weft".into(),
                    universe: UNIVERSE.into(),
                    seeds: Vec::new(),
                };
                let frame = Frame { body: Some(Body::Hello(hello)) };
                vec![opened, Input::Frame { link, frame }]
            }
            1 => Frame::decode(script.piece())
                .map(|frame| vec![Input::Frame { link, frame }])
                .unwrap_or_default(),
            2 => framed(Body::Items(wire::Items {
                items: (0..script.below(4)).map(|_| item(script).into()).collect(),
                complete: script.byte() & 1 != 0,
            })),
            3 => {
                let differs = script.below(64);
                let buckets = (0..64).map(|bucket| u64::from(bucket == differs)).collect();
                let channel = wire::digest::Channel { channel: channel(script), buckets };
                framed(Body::Digest(wire::Digest { channels: vec![channel] }))
            }
            4 => {
                let entry = |script: &mut Script<'_>| wire::summary::Entry {
                    key: script.choose(&[b"n1".to_vec(), b"n2".to_vec(), vec![10, 32, 1, 0]]),
                    rank: script.take(2).into(),
                    hash: script.byte().into(),
                };
                let entries = (0..script.below(4)).map(|_| entry(script)).collect();
                let wanted = vec![script.choose(&[b"n1".to_vec(), b"n2".to_vec()])];
                let buckets = (0..script.below(64) as u32).collect();
                let channel = wire::summary::Channel { channel: channel(script), buckets, entries, wanted };
                framed(Body::Summary(wire::Summary { channels: vec![channel], partial: false }))
            }
            5 => framed(Body::Unicast(wire::Unicast {
                source: name(script.below(6)).to_string(),
                destination: name(script.below(6)).to_string(),
                hop_limit: script.below(12) as u32,
                channel: channel(script),
                body: script.take(4).into(),
                seal: None,
            })),
            6 => {
                self.clock.pass(Duration::from_millis(script.choose(&[1, 100, 1000, 5000, 60_000])));
                vec![Input::Wake, Input::Sent { link, frames: script.below(4) }]
            }
            _ => vec![match script.below(5) {
                0 => Input::Closed { link, reason: "gone".into() },
                1 => Input::Publish(vec![item(script)]),
                2 => Input::Heard(name(script.below(6))),
                3 => Input::Update(Box::new(|record| record.mtu ^= 1)),
                _ => Input::Unicast { to: name(script.below(6)), channel: "ring".into(), body: vec![1] },
            }],
        }
    }

    /// Does what the machine says, as far as it matters.
    fn drain(&mut self) {
        let mut outputs = 0;
        while let Some(output) = self.mesh.poll_output() {
            outputs += 1;
            if let Output::Close { link } = output {
                let closed = Input::Closed { link, reason: "closed".into() };
                self.mesh.handle(closed, self.clock.0);
            }
        }
        assert!(outputs < 200, "one input makes {outputs} outputs");
        while self.mesh.next_news().is_some() {}
    }

    fn look(&mut self) {
        assert!(self.mesh.links().len() <= 4 + 16, "links are bounded");
        let mut judges = gossipers();
        judges.push(Box::new(PeerGossip(None)));
        for item in self.mesh.items() {
            assert_eq!(item.check_bounds(), Ok(()));
            let judge = judges.iter_mut().find(|judge| judge.channel() == item.channel);
            assert_eq!(judge.map_or(Ok(()), |judge| judge.check(item)), Ok(()));
        }
        assert_eq!(self.mesh.peers().own().name, name(0), "we stay who we are");
    }
}

/// An item that is right, wrong, or of a channel that nobody knows.
fn item(script: &mut Script<'_>) -> Item {
    let mut item = match script.below(5) {
        0 => {
            let (peer, incarnation) = (name(script.below(6)), Incarnation(script.below(8) as u64));
            let endpoint = script.choose(&["192.0.2.1:1", "[2001:db8::1]:1"]).parse().expect("an endpoint");
            PeerRecord {
                version: script.below(4) as u64,
                endpoints: vec![endpoint],
                left: script.byte() > 200,
                ..PeerRecord::new(peer, incarnation)
            }
            .to_item()
        }
        1 => super::ring::token(script).to_item(&layout()),
        2 => Death {
            peer: name(script.below(6)),
            incarnation: Incarnation(script.below(8) as u64),
            epoch: script.below(4) as u64,
            taker: name(script.below(6)),
            forced: script.byte() & 1 != 0,
            ranges: script.choose(&[vec!["10.32.0.0/16".parse().expect("a range")], Vec::new()]).clone(),
            known: script.below(3) as u64,
        }
        .to_item(Vec::new()),
        3 => {
            let ballot = |script: &mut Script<'_>| Ballot {
                round: script.below(8) as u64,
                proposer: name(script.below(6)),
            };
            let names = |script: &mut Script<'_>| (0..script.below(6)).map(name).collect::<Vec<_>>();
            let promised = (script.byte() & 1 != 0).then(|| ballot(script));
            let accepted = (script.byte() & 1 != 0).then(|| (ballot(script), names(script)));
            Vote { promised, accepted, decided: names(script) }.to_item(&name(script.below(6)), None)
        }
        _ => Item {
            channel: channel(script),
            key: script.take(1).into(),
            rank: script.take(1).into(),
            body: script.piece().into(),
            signature: script.take(1).into(),
        },
    };
    if script.byte() > 200 && !item.body.is_empty() {
        let at = script.below(item.body.len());
        item.body[at] ^= script.byte();
    }
    item
}

fn channel(script: &mut Script<'_>) -> String {
    script.choose(&["ring", "peers", "deaths", "votes", "names", ""]).into()
}

fn name(number: usize) -> PeerName {
    format!("n{number}").parse().expect("a name")
}

fn layout() -> Layout {
    Layout::new(UNIVERSE.parse().expect("a universe"))
}

fn gossipers() -> Vec<Box<dyn Gossiper>> {
    vec![Box::new(RingGossiper::new(layout(), None)), Box::new(DeathGossip(None)), Box::new(VoteGossip(None))]
}

const UNIVERSE: &str = super::ring::UNIVERSE;
const STEPS: usize = 64;
