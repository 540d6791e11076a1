//! Tokens in any order, also such as no honest agent makes: all who have heard the same believe the same, every address has
//! one owner at most, and an allocator on top of them gives no address to two.

use super::script::{Clock, Script};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};
use weft::{
    ipam::{
        Allocator, Config, Found, KnownPeer, Now, Request, Stored, ring::Ring, seed::SeedPlan, span::Layout,
        token::Token,
    },
    types::{AttachmentKey, Incarnation, PeerName, PodRef},
};

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let tokens: Vec<_> = (0..script.below(24)).map(|_| token(&mut script)).collect();
    merge(&tokens);
    Scene::new(&mut script).play(&mut script, &tokens);
}

/// Any token of whole blocks, of few owners and with low counts, so that they meet.
pub fn token(script: &mut Script<'_>) -> Token {
    let unit = layout().unit();
    let (a, b, counts, flags) = (script.below(16), script.below(16), script.byte(), script.byte());
    Token {
        start: a.min(b) as u128 * unit,
        end: (a.max(b) as u128 + 1) * unit - 1,
        owner: name(flags & 3),
        epoch: u64::from(flags >> 2 & 1),
        hands: u64::from(counts & 3),
        version: u64::from(counts >> 2 & 7),
        free: flags & 8 != 0,
        signature: vec![7; usize::from(flags >> 4 & 1)],
    }
}

fn merge(tokens: &[Token]) {
    let merged = |tokens: &mut dyn Iterator<Item = &Token>| {
        let mut ring = Ring::new(layout(), None);
        tokens.for_each(|token| _ = ring.merge(token.clone()));
        ring
    };
    let ring = merged(&mut tokens.iter());
    let known: Vec<_> = ring.tokens().cloned().collect();
    let (left, right) = tokens.split_at(tokens.len() / 2);
    for mut order in [
        Box::new(tokens.iter().rev()) as Box<dyn Iterator<Item = &Token>>,
        Box::new(right.iter().chain(left).chain(right)),
    ] {
        assert_eq!(merged(&mut order).tokens().cloned().collect::<Vec<_>>(), known, "merging is a join");
    }
    let mut next = 0;
    for (span, _) in ring.ranges() {
        assert!(next <= span.first && span.first <= span.last && span.last <= layout().whole().last);
        next = span.last + 1;
    }
    for block in 0..16 {
        let offset = block * layout().unit() + 3;
        let over = known.iter().filter(|token| token.span().contains(offset));
        let winner = over.max_by(|a, b| a.cmp_rank(b).then(a.start.cmp(&b.start)));
        assert_eq!(ring.owner(offset), winner.map(|token| &token.owner), "offset {offset}");
    }
    let routed: u128 =
        ring.routes().iter().map(|(prefix, _)| layout().span(*prefix).expect("ours").size()).sum();
    assert_eq!(routed, ring.shares(false).values().sum::<u128>());
}

struct Scene {
    allocator: Allocator,
    clock: Clock,
    /// What the runtime believes.
    pods: BTreeMap<u8, IpAddr>,
}

impl Scene {
    fn new(script: &mut Script<'_>) -> Self {
        let clock = Clock::new();
        let seeds: SeedPlan = [name(0), name(1)].into_iter().take(script.below(3)).collect();
        let config = Config {
            name: name(0),
            universe: layout().universe(),
            seeds,
            sealer: None,
            has_bootstrap: script.byte() & 1 != 0,
            seeding: weft::ipam::Seeding::Given,
            assigned: None,
        };
        let allocator = Allocator::new(config, Stored::default(), Found::default(), now(&clock));
        let mut allocator = allocator.expect("two seeds have room");
        allocator.effects();
        Self { allocator, clock, pods: BTreeMap::new() }
    }

    fn play(&mut self, script: &mut Script<'_>, tokens: &[Token]) {
        for _ in 0..STEPS {
            let Some(step) = script.next() else { break };
            let (now, pod) = (now(&self.clock), script.below(12) as u8);
            match step % 8 {
                0 | 1 => {
                    if let Ok(allocation) = self.allocator.reserve(request(pod), now) {
                        let before = self.pods.insert(pod, allocation.address);
                        assert!(
                            before.is_none_or(|before| before == allocation.address),
                            "it keeps what it has"
                        );
                        self.allocator.activated(&key(pod));
                    }
                }
                2 => {
                    let freed = self.allocator.release(&key(pod), now);
                    assert_eq!(freed.map(|freed| freed.address), self.pods.remove(&pod));
                }
                3 => {
                    let heard = tokens.iter().skip(pod.into()).take(script.below(8));
                    let items: Vec<_> = heard.map(|token| token.to_item(&layout())).collect();
                    self.allocator.on_items(&items, now);
                }
                4 => self.allocator.on_unicast(&name(pod & 3), script.take(6), now),
                5 => {
                    let offset = u128::from(script.byte()) % (layout().whole().last + 1);
                    let held = vec![layout().address(offset)];
                    let (incarnation, deaths_digest) = (Incarnation(1), 0);
                    let name = name(pod & 3);
                    let (absent, left) = (Vec::new(), false);
                    let peer = KnownPeer {
                        name,
                        reachable: pod & 4 != 0,
                        held,
                        incarnation,
                        deaths_digest,
                        absent,
                        left,
                    };
                    self.allocator.on_peers(&[peer], now);
                }
                6 => {
                    self.clock.pass(Duration::from_secs(script.choose(&[1, 31, 61])));
                    self.allocator.tick(self::now(&self.clock));
                }
                _ if pod == 11 && self.pods.is_empty() => self.allocator.leave(&name(1), now),
                _ => self.allocator.on_contact(now),
            }
            self.check();
        }
    }

    fn check(&mut self) {
        let effects = self.allocator.effects();
        assert!(effects.unicasts.len() <= 1, "one peer is asked at a time");
        for item in &effects.publish {
            assert!(Token::from_item(item, &layout()).is_ok(), "what we publish is what others take");
        }
        let view = self.allocator.view();
        let used: BTreeSet<_> = self.pods.values().copied().chain(view.bridge).collect();
        assert_eq!(used.len(), self.pods.len() + usize::from(view.bridge.is_some()), "one address, one user");
        for address in used {
            assert!(view.allocations.contains_key(&address), "{address} was forgotten");
            assert!(!layout().reserved(layout().offset(address).expect("ours")));
        }
        assert_eq!(view.allocations.len(), self.pods.len() + usize::from(view.bridge.is_some()));
        assert!(view.conceded.iter().all(|address| !view.allocations.contains_key(address)));
        assert!(self.allocator.next_wake().is_none_or(|at| at <= self.clock.0 + Duration::from_secs(600)));
    }
}

fn now(clock: &Clock) -> Now {
    Now { at: clock.0, unix_ms: 0 }
}

fn request(pod: u8) -> Request {
    Request { key: key(pod), pod: PodRef::default(), wanted: Vec::new(), ranges: Vec::new(), mac: None }
}

fn key(pod: u8) -> AttachmentKey {
    AttachmentKey::new(&format!("p{pod}"), "eth0").expect("a key")
}

fn name(number: u8) -> PeerName {
    format!("n{number}").parse().expect("a name")
}

fn layout() -> Layout {
    Layout::new(UNIVERSE.parse().expect("a universe"))
}

/// Sixteen blocks of sixteen addresses.
pub const UNIVERSE: &str = "10.32.0.0/24";
const STEPS: usize = 64;
