//! A virtual clock and network for N agents, each the real pure machine, replayable from a seed.
//!
//! ```text
//!   Mesh ──poll_output──▶ Node ──frames──▶ Net: delay, loss, partitions ──handle──▶ Mesh
//!                          │ ▲
//!                      news▼ │outbox
//!                           App  (whatever is plugged in beside the mesh)
//! ```
//! Links are streams: frames arrive in order. Loss takes frames out of them, which no real stream does: so the gossip is
//! held to more than it needs. A hello or refusal that is lost comes late instead, as after a retransmission: without it
//! there is no link that could lose anything. A link across a partition loses everything and breaks after a while, as
//! keep-alive has it.

use super::pool::Common;
use crate::linux::thread_time;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use weft::{
    identity::task::Current,
    mesh::{
        dial::Target,
        gossip::{Gossiper, Item},
        link::LinkId,
        machine::{Config, Input, Mesh, Output},
        peers::PeerRecord,
        pool::Pool,
        wire::{Frame, Items, frame::Body},
    },
    types::{Endpoint, Incarnation, PeerAddress, PeerName},
};

/// What runs beside the mesh in an agent. It answers through its outbox.
pub trait App {
    /// Its channels.
    fn gossipers(&self) -> Vec<Box<dyn Gossiper>> {
        Vec::new()
    }
    /// Its keys; without them nothing is sealed and nobody's seal is looked at.
    fn identity(&self) -> Option<Current> {
        None
    }
    /// Who shares the universe at the start, as far as it knows.
    fn seeds(&self) -> Vec<PeerName> {
        Vec::new()
    }
    fn learned_seeds(&mut self, _seeds: Vec<PeerName>, _out: &mut Outbox) {}
    fn joined(&mut self, _now: Instant, _out: &mut Outbox) {}
    fn contact(&mut self, _now: Instant, _out: &mut Outbox) {}
    /// Other peers are known, or the same ones otherwise.
    fn peers_changed(&mut self, _now: Instant) {}
    fn items(&mut self, _channel: &str, _items: Vec<Item>, _now: Instant, _out: &mut Outbox) {}
    fn unicast(&mut self, _from: PeerName, _channel: &str, _body: Vec<u8>, _now: Instant, _out: &mut Outbox) {
    }
    /// Whether it wants to know, when it is woken now, who would answer its probes.
    fn looks(&self, _now: Instant) -> bool {
        false
    }
    /// `answering`: by the numbers of nodes; empty for who does not look.
    fn wake(&mut self, _mesh: &Mesh, _answering: &[bool], _now: Instant, _out: &mut Outbox) {}
    fn next_wake(&self) -> Option<Instant> {
        None
    }
}

/// Nothing beside the mesh.
impl App for () {}

/// What a mesh has of its app.
type Parts = (Vec<Box<dyn Gossiper>>, Option<Current>, Vec<PeerName>);

fn parts(app: &impl App) -> Parts {
    (app.gossipers(), app.identity(), app.seeds())
}

/// What an app wants of the mesh.
#[derive(Default)]
pub struct Outbox {
    pub inputs: Vec<Input>,
}

pub struct Node<A> {
    pub name: PeerName,
    pub address: SocketAddr,
    pub mesh: Mesh,
    pub app: A,
    pub joined: Option<Instant>,
    pub fatal: Option<String>,
    pub left: bool,
    pub dead: bool,
    /// Frames are read no faster than one in that time.
    pub slowness: Duration,
    wakes_at: Option<Instant>,
    /// A machine may be told to start anew: events for an earlier one are void.
    life: u64,
}

/// How the network behaves; may be changed at any time.
#[derive(Clone, Debug)]
pub struct Weather {
    pub delay: std::ops::Range<Duration>,
    /// Of a frame to be lost.
    pub loss: f64,
    /// Groups of nodes that reach only each other; empty: all do.
    pub groups: Vec<BTreeSet<usize>>,
}

pub struct Sim<A: App> {
    pub now: Instant,
    pub weather: Weather,
    pub nodes: Vec<Node<A>>,
    pub rng: ChaCha8Rng,
    pub max_links: usize,
    /// What the agents have had of the processor, without what the simulator takes itself; `None`: it is not measured.
    pub busy: Option<Duration>,
    pool: Common,
    start: Instant,
    seed: u64,
    pipes: BTreeMap<u64, Pipe>,
    ends: BTreeMap<(usize, LinkId), u64>,
    next: u64,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    events: HashMap<u64, (usize, u64, Event)>,
}

/// A frame, the items of which are held once, however many links they are on.
enum OnTheWay {
    Items { items: Box<[Arc<Item>]>, complete: bool },
    Other(Frame),
}

/// A stream between two nodes.
struct Pipe {
    ends: [(usize, LinkId); 2],
    /// When the last frame towards each end arrives.
    arrives: [Instant; 2],
}

enum Event {
    Wake,
    Input(Input),
    /// A frame arrives, and its sender is told that it has left.
    Frame {
        pipe: u64,
        towards: usize,
        frame: OnTheWay,
        lost: bool,
    },
    Broken {
        pipe: u64,
    },
    Dial {
        target: Target,
        addresses: Vec<PeerAddress>,
    },
}

impl<A: App> Sim<A> {
    pub fn new(seed: u64) -> Self {
        let now = Instant::now();
        Self {
            now,
            weather: Weather {
                delay: Duration::from_micros(200)..Duration::from_millis(5),
                loss: 0.0,
                groups: Vec::new(),
            },
            nodes: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            max_links: 64,
            busy: None,
            pool: Common::default(),
            start: now,
            seed,
            pipes: BTreeMap::new(),
            ends: BTreeMap::new(),
            next: 0,
            queue: BinaryHeap::new(),
            events: HashMap::new(),
        }
    }

    /// Starts an agent that knows the addresses of some others; returns its number.
    pub fn start(&mut self, name: &str, bootstrap: &[usize], app: A) -> usize {
        self.start_knowing(name, bootstrap, Vec::new(), app)
    }

    /// Starts an agent with the items that it knew before.
    pub fn start_knowing(&mut self, name: &str, bootstrap: &[usize], items: Vec<Item>, app: A) -> usize {
        let n = self.nodes.len();
        let address = address(n);
        let name: PeerName = name.parse().expect("a name");
        let mesh = self.mesh(&name, address, bootstrap, items, parts(&app));
        self.nodes.push(Node {
            name,
            address,
            mesh,
            app,
            joined: None,
            fatal: None,
            left: false,
            dead: false,
            slowness: Duration::ZERO,
            wakes_at: None,
            life: 0,
        });
        self.handle(n, Input::Wake);
        n
    }

    /// Kills an agent and starts it anew with the items that it knew.
    pub fn restart(&mut self, n: usize, bootstrap: &[usize]) {
        let items = self.nodes[n].mesh.items().cloned().collect();
        self.kill(n);
        self.revive(n, bootstrap, items);
    }

    /// Starts an agent anew that was killed.
    pub fn revive(&mut self, n: usize, bootstrap: &[usize], items: Vec<Item>) {
        let node = &self.nodes[n];
        let (name, address, parts) = (node.name.clone(), node.address, parts(&node.app));
        let mesh = self.mesh(&name, address, bootstrap, items, parts);
        let node = &mut self.nodes[n];
        (node.mesh, node.joined, node.wakes_at, node.dead) = (mesh, None, None, false);
        self.handle(n, Input::Wake);
    }

    /// Ends an agent without a word.
    pub fn kill(&mut self, n: usize) {
        self.nodes[n].life += 1;
        self.nodes[n].dead = true;
        let ends = self.ends.range((n, LinkId(0))..=(n, LinkId(u64::MAX))).map(|(end, pipe)| (*end, *pipe));
        for (end, pipe) in ends.collect::<Vec<_>>() {
            self.ends.remove(&end);
            self.break_pipe(pipe);
        }
    }

    /// Has an app do something, and passes on what it then wants of the mesh.
    pub fn call<T>(&mut self, n: usize, work: impl FnOnce(&mut A, Instant, &mut Outbox) -> T) -> T {
        let mut out = Outbox::default();
        let done = work(&mut self.nodes[n].app, self.now, &mut out);
        for input in out.inputs {
            self.handle(n, input);
        }
        self.handle(n, Input::Wake);
        done
    }

    fn mesh(
        &mut self,
        name: &PeerName,
        address: SocketAddr,
        bootstrap: &[usize],
        items: Vec<Item>,
        (gossipers, identity, seeds): Parts,
    ) -> Mesh {
        let record = self.first_record(name, address);
        let address = |n: &usize| PeerAddress { host: self.nodes[*n].address.ip().to_string(), port: 6783 };
        let config = Config {
            record,
            universe: "10.32.0.0/12".parse().expect("a universe"),
            identity,
            seeds,
            bootstrap: bootstrap.iter().map(address).collect(),
            max_links: self.max_links,
            items,
            gossipers,
            seed: self.rng.random(),
        };
        Mesh::with_pool(config, Box::new(self.pool.clone()), self.now)
    }

    /// What an agent that starts now says of itself first.
    pub fn first_record(&self, name: &PeerName, address: SocketAddr) -> PeerRecord {
        let incarnation = Incarnation((self.now - self.start).as_micros() as u64 + 1);
        let endpoints = vec![Endpoint(address)];
        PeerRecord { endpoints, ..PeerRecord::new(name.clone(), incarnation) }
    }

    /// Gives an agent an input now.
    pub fn handle(&mut self, n: usize, input: Input) {
        let now = self.now;
        let outputs = self.timed(n, |node| {
            node.mesh.handle(input, now);
            std::iter::from_fn(|| node.mesh.poll_output()).collect::<Vec<_>>()
        });
        let mut out = Outbox::default();
        for output in outputs {
            let node = &mut self.nodes[n];
            match output {
                Output::Dial { target, addresses } => {
                    let delay = self.delay() * 3;
                    self.at(self.now + delay, n, Event::Dial { target, addresses });
                }
                Output::Send { link, frame } => self.send(n, link, frame),
                Output::Close { link } => self.close(n, link),
                Output::Unicast { from, channel, body } => {
                    node.app.unicast(from, &channel, body, self.now, &mut out)
                }
                Output::Seeds(seeds) => node.app.learned_seeds(seeds, &mut out),
                Output::PeersChanged => node.app.peers_changed(self.now),
                Output::Joined => {
                    node.joined = Some(self.now);
                    deliver(node, self.now, &mut out);
                    node.app.joined(self.now, &mut out);
                }
                Output::Contact => {
                    deliver(node, self.now, &mut out);
                    node.app.contact(self.now, &mut out);
                }
                Output::Left => node.left = true,
                Output::Fatal(reason) => node.fatal = Some(reason),
            }
        }
        self.timed(n, |node| deliver(node, now, &mut out));
        for input in out.inputs {
            self.handle(n, input);
        }
        let wake =
            self.timed(n, |node| [node.mesh.next_wake(), node.app.next_wake()].into_iter().flatten().min());
        let node = &self.nodes[n];
        if let Some(wake) = wake.map(|at| at.max(self.now + TICK))
            && node.wakes_at.is_none_or(|at| wake < at || at < self.now)
        {
            self.nodes[n].wakes_at = Some(wake);
            self.at(wake, n, Event::Wake);
        }
    }

    /// Has an agent work.
    fn timed<T>(&mut self, n: usize, work: impl FnOnce(&mut Node<A>) -> T) -> T {
        let began = self.busy.map(|_| thread_time());
        let done = work(&mut self.nodes[n]);
        if let (Some(busy), Some(began)) = (&mut self.busy, began) {
            *busy += thread_time() - began;
        }
        done
    }

    /// Runs for some virtual time.
    pub fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Runs until something holds; returns after how long, or `None` if it did not hold in that time. It is looked at
    /// every 10 ms.
    pub fn run_until(&mut self, time: Duration, holds: impl Fn(&Self) -> bool) -> Option<Duration> {
        let start = self.now;
        let mut look = start;
        loop {
            if self.now >= look {
                if holds(self) {
                    return Some(self.now - start);
                }
                look = self.now + Duration::from_millis(10);
            }
            match self.queue.peek() {
                Some(Reverse((at, _))) if *at <= start + time => {}
                _ => {
                    self.now = start + time;
                    return holds(self).then_some(time);
                }
            }
            let Some(Reverse((at, id))) = self.queue.pop() else { unreachable!("it was peeked at") };
            self.now = at;
            if let Some((n, life, event)) = self.events.remove(&id)
                && self.nodes[n].life == life
            {
                self.event(n, event);
            }
        }
    }

    /// Fails the test if something does not hold within that virtual time; names the seed.
    pub fn expect(&mut self, what: &str, time: Duration, holds: impl Fn(&Self) -> bool) -> Duration {
        match self.run_until(time, holds) {
            Some(took) => took,
            None => panic!("seed {}: not within {time:?}: {what}", self.seed),
        }
    }

    pub fn reaches(&self, a: usize, b: usize) -> bool {
        let groups = &self.weather.groups;
        groups.is_empty() || groups.iter().any(|group| group.contains(&a) && group.contains(&b))
    }

    /// Who would answer a node's probes, by numbers.
    fn answering(&self, n: usize) -> Vec<bool> {
        let alive = |node: &Node<A>| !node.left && !node.dead && node.fatal.is_none();
        self.nodes.iter().enumerate().map(|(other, node)| alive(node) && self.reaches(n, other)).collect()
    }

    fn event(&mut self, n: usize, event: Event) {
        match event {
            Event::Wake => {
                // An earlier one may have come after this one was set.
                if self.nodes[n].wakes_at != Some(self.now) {
                    return;
                }
                self.nodes[n].wakes_at = None;
                let mut out = Outbox::default();
                if self.nodes[n].app.next_wake().is_some_and(|at| at <= self.now) {
                    let answering =
                        if self.nodes[n].app.looks(self.now) { self.answering(n) } else { Vec::new() };
                    let now = self.now;
                    self.timed(n, |node| node.app.wake(&node.mesh, &answering, now, &mut out));
                }
                for input in out.inputs {
                    self.handle(n, input);
                }
                self.handle(n, Input::Wake);
            }
            Event::Input(input) => self.handle(n, input),
            Event::Dial { target, addresses } => self.dial(n, target, &addresses),
            Event::Broken { pipe } => self.break_pipe(pipe),
            Event::Frame { pipe, towards, frame, lost } => {
                let Some(ends) = self.pipes.get(&pipe).map(|pipe| pipe.ends) else { return };
                let ((to, link), (from, back)) = (ends[towards], ends[1 - towards]);
                if !self.reaches(from, to) {
                    self.at(self.now + KEEP_ALIVE, to, Event::Broken { pipe });
                    return;
                }
                self.handle(from, Input::Sent { link: back, frames: 1 });
                if !lost {
                    self.handle(to, Input::Frame { link, frame: frame.arrives() });
                }
            }
        }
    }

    fn dial(&mut self, n: usize, target: Target, addresses: &[PeerAddress]) {
        let there = |address: &PeerAddress| {
            let ip: Ipv4Addr = address.host.parse().ok()?;
            Some(u32::from(ip).checked_sub(FIRST_ADDRESS)? as usize)
        };
        let answers = |other: &usize| {
            let Some(node) = self.nodes.get(*other) else { return false };
            let ended = node.left || node.dead || node.fatal.is_some();
            !ended && *other != n && self.reaches(n, *other)
        };
        let Some(other) = addresses.iter().filter_map(there).find(answers) else {
            let input = Input::DialFailed { target, reason: "nobody answers".into() };
            self.at(self.now + Duration::from_secs(1), n, Event::Input(input));
            return;
        };
        let pipe = self.next;
        self.next += 1;
        let ends = [(n, LinkId(2 * pipe)), (other, LinkId(2 * pipe + 1))];
        self.pipes.insert(pipe, Pipe { ends, arrives: [self.now; 2] });
        self.ends.extend(ends.map(|end| (end, pipe)));
        let remote = |n: usize, sim: &Self| sim.nodes[n].address.to_string();
        self.handle(
            other,
            Input::Opened { link: ends[1].1, dialled: None, remote: remote(n, self), certified: None },
        );
        self.handle(
            n,
            Input::Opened {
                link: ends[0].1,
                dialled: Some(target),
                remote: remote(other, self),
                certified: None,
            },
        );
    }

    fn send(&mut self, n: usize, link: LinkId, frame: Frame) {
        let Some(id) = self.ends.get(&(n, link)).copied() else { return };
        let delay = self.delay();
        let lost = self.rng.random_bool(self.weather.loss);
        let Some(pipe) = self.pipes.get_mut(&id) else { return };
        let towards = usize::from(pipe.ends[0] == (n, link));
        let to = pipe.ends[towards].0;
        let first = matches!(frame.body, Some(Body::Hello(_) | Body::Refusal(_)));
        let again = if lost && first { RETRANSMISSION } else { Duration::ZERO };
        let arrives = (self.now + delay + again).max(pipe.arrives[towards] + self.nodes[to].slowness);
        pipe.arrives[towards] = arrives;
        let from = pipe.ends[1 - towards].0;
        if !self.reaches(from, to) {
            self.at(self.now + KEEP_ALIVE, n, Event::Broken { pipe: id });
        }
        let frame = OnTheWay::new(frame, &mut self.pool);
        self.at(arrives, to, Event::Frame { pipe: id, towards, frame, lost: lost && !first });
    }

    /// One side ends a link: the other hears of it after what was sent.
    fn close(&mut self, n: usize, link: LinkId) {
        let Some(id) = self.ends.remove(&(n, link)) else { return };
        let Some(pipe) = self.pipes.get(&id) else { return };
        let towards = usize::from(pipe.ends[0] == (n, link));
        let (to, arrives) = (pipe.ends[towards].0, pipe.arrives[towards]);
        self.at(arrives.max(self.now) + TICK, to, Event::Broken { pipe: id });
    }

    fn break_pipe(&mut self, id: u64) {
        let Some(pipe) = self.pipes.remove(&id) else { return };
        for (n, link) in pipe.ends {
            if self.ends.remove(&(n, link)).is_some() {
                let delay = self.delay();
                let closed = Input::Closed { link, reason: "connection reset".into() };
                self.at(self.now + delay, n, Event::Input(closed));
            }
        }
    }

    fn delay(&mut self) -> Duration {
        self.rng.random_range(self.weather.delay.clone())
    }

    fn at(&mut self, at: Instant, n: usize, event: Event) {
        let id = self.next;
        self.next += 1;
        self.queue.push(Reverse((at, id)));
        self.events.insert(id, (n, self.nodes.get(n).map_or(0, |node| node.life), event));
    }
}

impl OnTheWay {
    fn new(frame: Frame, pool: &mut Common) -> Self {
        match frame.body {
            Some(Body::Items(Items { items, complete })) => Self::Items {
                items: items.into_iter().map(|item| pool.item(item.into())).collect(),
                complete,
            },
            _ => Self::Other(frame),
        }
    }

    fn arrives(self) -> Frame {
        match self {
            Self::Items { items, complete } => {
                let items = items.iter().map(|item| (**item).clone().into()).collect();
                Frame { body: Some(Body::Items(Items { items, complete })) }
            }
            Self::Other(frame) => frame,
        }
    }
}

fn deliver<A: App>(node: &mut Node<A>, now: Instant, out: &mut Outbox) {
    while let Some((channel, items)) = node.mesh.next_news() {
        node.app.items(&channel, items, now, out);
    }
}

/// Of a node, by its number.
pub fn address(n: usize) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::from(FIRST_ADDRESS + n as u32).into(), 6783)
}

/// Of the first node: 10.0.0.0.
const FIRST_ADDRESS: u32 = 0x0a00_0000;
/// The clock's smallest step.
const TICK: Duration = Duration::from_micros(1);
/// When a lost hello is sent again: Linux's least retransmission timeout.
const RETRANSMISSION: Duration = Duration::from_millis(200);
/// When a dead connection is noticed: keep-alive's interval and timeout.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
