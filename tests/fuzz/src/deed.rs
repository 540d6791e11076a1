//! Sealed tokens: parts of true ones put together anew, changed, and sealed by a liar that owns something itself. Nothing is
//! believed but what was said by who may say it.

use super::script::Script;
use prost::Message;
use std::{
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use weft::{
    identity::{
        Ca, Checker, Identity, Sealer, Trust,
        task::{Current, State},
    },
    ipam::{
        ring::Ring,
        span::{Layout, Span},
        token::{RingGossiper, Token},
    },
    mesh::{
        gossip::{Gossiper, Rejected},
        wire::{Deed, Grant, Seal},
    },
    types::PeerName,
};

/// A network of two seeds, `a` and `liar`, in which some ranges have changed hands.
struct Scene {
    /// All that was ever said.
    truth: Vec<Token>,
    liar: Sealer,
    judge: Mutex<RingGossiper>,
}

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut token = script.choose(&SCENE.truth);
    let mut deed = Deed::decode(token.signature.as_slice()).expect("it is one of ours");
    let mut lied = false;
    for _ in 0..8 {
        match script.next().map(|step| step % 8) {
            Some(0) => deed.grants.extend(other(&mut script).grants),
            Some(1) => _ = deed.grants.pop(),
            Some(2) => deed.seal = other(&mut script).seal,
            Some(3) => {
                let Token { start, end, owner, hands, version, .. } = script.choose(&SCENE.truth);
                match script.below(4) {
                    0 => (token.start, token.end) = (start, end),
                    1 => token.owner = owner,
                    2 => token.hands = hands + script.below(3) as u64,
                    _ => token.version = version + script.below(3) as u64,
                }
            }
            Some(4) => {
                lied = true;
                deed.seal = Some(seal(&token));
            }
            // A hand-over of the liar's making.
            Some(5) => {
                lied = true;
                let given =
                    Token { version: 0, hands: script.below(4) as u64, ..script.choose(&SCENE.truth) };
                deed.grants.push(Grant { seal: Some(seal(&given)), token: given.to_body(&layout()) });
            }
            Some(6) => change(&mut deed, &mut script),
            _ => break,
        }
    }
    token.signature = deed.encode_to_vec();
    if let (1, false) = (script.below(2), token.signature.is_empty()) {
        let at = usize::from(script.number()) % token.signature.len();
        token.signature[at] ^= script.byte();
    }
    let mut item = token.to_item(&layout());
    if script.below(4) == 1 {
        // A field that nobody knows.
        item.body.extend([0x7a, 1, script.byte()]);
    }
    let judged = SCENE.judge.lock().unwrap_or_else(PoisonError::into_inner).check(&item);
    if judged.is_ok() {
        assert_eq!(item.body, token.to_body(&layout()), "a token says nothing that is not sealed");
        assert!(item.signature.len() <= MOST, "{} bytes are more than anybody needs", item.signature.len());
    }
    let said = |truth: &&Token| {
        Token { signature: Vec::new(), ..(*truth).clone() }
            == Token { signature: Vec::new(), ..token.clone() }
    };
    match judged {
        Ok(()) if SCENE.truth.iter().any(|truth| said(&truth)) => {}
        // What the liar owned, it may cut and hand over as it likes.
        Ok(()) => {
            assert!(lied, "nobody has said that: {token:?}");
            let own = SCENE.truth.iter().filter(|token| token.owner.as_str() == LIAR);
            let inside = |own: &Token| own.span().intersect(token.span()) == Some(token.span());
            assert!(own.into_iter().any(inside), "the liar never owned that: {token:?}");
        }
        Err(Rejected::Forged(_) | Rejected::Invalid(_)) => {}
        Err(other) => panic!("{other:?}"),
    }
}

/// Another true token's deed.
fn other(script: &mut Script<'_>) -> Deed {
    Deed::decode(script.choose(&SCENE.truth).signature.as_slice()).expect("it is one of ours")
}

fn change(deed: &mut Deed, script: &mut Script<'_>) {
    let seals = deed.grants.iter_mut().filter_map(|grant| grant.seal.as_mut()).chain(&mut deed.seal);
    let mut seals: Vec<_> = seals.collect();
    let count = seals.len();
    let Some(seal) = seals.get_mut(script.below(count)) else { return };
    let field = match script.below(3) {
        0 => Some(&mut seal.signature),
        1 => seal.certificates.first_mut(),
        _ => return seal.certificates.push(vec![7; script.number().into()]),
    };
    if let Some(byte) = field.and_then(|field| {
        let at = usize::from(script.number()) % field.len().max(1);
        field.get_mut(at)
    }) {
        *byte ^= script.byte();
    }
}

fn seal(token: &Token) -> Seal {
    SCENE.liar.seal("token", &token.to_body(&layout()))
}

fn layout() -> Layout {
    Layout::new(super::ring::UNIVERSE.parse().expect("a universe"))
}

/// Made when it is first asked for: with keys that nobody else ever has, so that none lie about.
static SCENE: LazyLock<Scene> = LazyLock::new(|| {
    let now = SystemTime::now();
    let made = Ca::create(now).expect("a CA");
    let ca = Ca::load(made.cert.as_bytes(), made.key.as_bytes()).expect("the CA");
    let keys = |name: &str| -> Current {
        let name: PeerName = name.parse().expect("a name");
        let leaf = ca.issue(&name, Duration::from_secs(1 << 30), now).expect("a certificate");
        let trust = Trust::from_pem(made.cert.as_bytes(), None).expect("a bundle");
        let identity = Identity::new(name, trust, leaf.cert.as_bytes(), leaf.key.as_bytes(), now);
        watch::channel(State { identity: Arc::new(identity.expect("an identity")), trouble: None }).1
    };
    let seeds: [PeerName; 2] = ["a", LIAR].map(|name| name.parse().expect("a name"));
    let mut judge = RingGossiper::new(
        layout(),
        Some((Checker::new(keys("judge")), watch::channel(Default::default()).1)),
    );
    judge.seeds(&seeds);
    let mut truth = Ring::genesis(layout(), &seeds).expect("two seeds have room");
    let hand_overs = [("a", 4..=7, "b"), (LIAR, 12..=15, "b"), ("b", 6..=7, "c"), ("b", 14..=15, LIAR)];
    for (from, blocks, to) in hand_overs {
        let unit = layout().unit();
        let span = Span { first: blocks.start() * unit, last: (blocks.end() + 1) * unit - 1 };
        let ring_of = |name: &str, truth: &[Token]| {
            let mut ring = Ring::new(layout(), Some(Sealer::new(keys(name))));
            truth.iter().for_each(|token| _ = ring.merge(token.clone()));
            ring
        };
        let [from, to]: [PeerName; 2] = [from, to].map(|name| name.parse().expect("a name"));
        truth.extend(ring_of(from.as_str(), &truth).give(&from, span, &to));
        let mut ring = ring_of(to.as_str(), &truth);
        truth.extend(ring.flag(&ring.owned(&to), |_| true));
    }
    for token in &truth {
        assert_eq!(judge.check(&token.to_item(&layout())), Ok(()), "{token:?}");
    }
    Scene { truth, liar: Sealer::new(keys(LIAR)), judge: Mutex::new(judge) }
});

/// Bytes of the longest deed that was drawn up here, with all its certificates as long as may be.
const MOST: usize = 5 * (4 << 10);
const LIAR: &str = "liar";
