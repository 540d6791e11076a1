//! Who may make us work: what is checked before the costly part of a handshake (WireGuard, section 5.4.7).
//!
//! ```text
//!   mac1   keyed by the receiver's public key     wrong ─▶ dropped: the sender does not know whom it calls
//!   ─▶ few handshakes lately?                     yes ───▶ in
//!   ─▶ mac2  keyed by a cookie of ours            wrong ─▶ a cookie goes back: only who is at its address gets it
//!   ─▶ few from that address lately?              yes ───▶ in, else dropped
//! ```
//!
//! A cookie is a keyed hash of the sender's address under a secret that changes every two minutes, so that nothing is
//! kept for who only knocks. It travels sealed: who can't see the initiation can't make up a cookie for it.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Random, draw,
    message::{COOKIE, COOKIE_LEN, INITIATION_LEN, MAC_LEN, RESPONSE_LEN, prefix},
};
use crate::{
    datapath::{
        icmp::Bucket,
        seal::{Algorithm, OpenKey, SEALED_HEADER_LEN, SealKey, TAG_LEN},
        sessions::SessionIndex,
    },
    types::DataKey,
};
use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{self, SHA256},
    hmac::{self, HMAC_SHA256},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

/// Proves that its owner gets what is sent to its address.
pub type Cookie = [u8; MAC_LEN];

/// The keys that follow from a public key: whoever knows whom it calls has them.
pub struct Door {
    mac1: hmac::Key,
    cookie: hmac::Key,
}

impl Door {
    pub fn of(key: &DataKey) -> Self {
        let labelled = |label: &[u8]| {
            let hash = digest::digest(&SHA256, &[label, &key.0].concat());
            hmac::Key::new(HMAC_SHA256, hash.as_ref())
        };
        Self { mac1: labelled(b"weft mac1"), cookie: labelled(b"weft cookie") }
    }

    /// Writes `mac1`, and `mac2` if there is a cookie.
    pub fn write_macs(&self, initiation: &mut [u8; INITIATION_LEN], cookie: Option<&Cookie>) {
        write_mac(&self.mac1, initiation, MAC1);
        match cookie {
            Some(cookie) => write_mac(&hmac::Key::new(HMAC_SHA256, cookie), initiation, MAC2),
            None => initiation[MAC2..].fill(0),
        }
    }

    pub fn write_mac(&self, response: &mut [u8; RESPONSE_LEN]) {
        write_mac(&self.mac1, response, RESPONSE_MAC);
    }

    pub(super) fn fits(&self, response: &[u8; RESPONSE_LEN]) -> bool {
        mac_fits(&self.mac1, response, RESPONSE_MAC)
    }

    /// Opens a cookie that answers the initiation with that `mac1`.
    pub(super) fn cookie(&self, reply: &[u8; COOKIE_LEN], mac1: &[u8]) -> Option<Cookie> {
        let (header, mut sealed) = (reply.first_chunk()?, reply[SEALED_HEADER_LEN..].to_vec());
        OpenKey::new(COOKIE_SEAL, &self.cookie_key(mac1)).open(header, &mut sealed).ok()?;
        sealed.first_chunk().copied()
    }

    fn cookie_key(&self, mac1: &[u8]) -> [u8; 32] {
        hmac::sign(&self.cookie, mac1).as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

/// The `mac1` of an initiation.
pub(super) fn mac1(initiation: &[u8; INITIATION_LEN]) -> &[u8] {
    &initiation[MAC1..MAC2]
}

/// What is to be done about an initiation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Open,
    /// First it shall show, by this reply, that it is where it says.
    Ask([u8; COOKIE_LEN]),
    WrongMac,
    Busy,
}

pub(super) struct Gate {
    door: Door,
    /// The secret that cookies are made with now, the one before, and since when.
    secrets: [hmac::Key; 2],
    turned: Instant,
    anyone: Bucket,
    replies: Bucket,
    /// Those who have shown that they are where they say.
    sources: BTreeMap<IpAddr, Bucket>,
}

impl Gate {
    pub(super) fn new(key: &DataKey, random: &mut Random, now: Instant) -> Self {
        Self {
            door: Door::of(key),
            secrets: [secret(random), secret(random)],
            turned: now,
            anyone: Bucket::new(ANYONE, ANYONE_BURST),
            replies: Bucket::new(REPLY, REPLY_BURST),
            sources: BTreeMap::new(),
        }
    }

    pub(super) fn door(&self) -> &Door {
        &self.door
    }

    pub(super) fn admit(
        &mut self,
        initiation: &[u8; INITIATION_LEN],
        sender: SessionIndex,
        from: SocketAddr,
        random: &mut Random,
        now: Instant,
    ) -> Verdict {
        if !mac_fits(&self.door.mac1, initiation, MAC1) {
            return Verdict::WrongMac;
        }
        if self.anyone.take(now) {
            return Verdict::Open;
        }
        self.turn(random, now);
        let shown = self
            .secrets
            .iter()
            .any(|secret| mac_fits(&hmac::Key::new(HMAC_SHA256, &cookie(secret, from)), initiation, MAC2));
        match shown {
            true if self.source(from.ip(), now) => Verdict::Open,
            false if self.replies.take(now) => Verdict::Ask(self.reply(initiation, sender, from, random)),
            _ => Verdict::Busy,
        }
    }

    fn source(&mut self, address: IpAddr, now: Instant) -> bool {
        if self.sources.len() >= SOURCES {
            // Who has all its tokens back is as good as new.
            self.sources.retain(|_, bucket| !bucket.is_full(now));
        }
        let known = self.sources.len();
        match self.sources.entry(network(address)) {
            Entry::Occupied(mut bucket) => bucket.get_mut().take(now),
            Entry::Vacant(_) if known >= SOURCES => false,
            Entry::Vacant(place) => place.insert(Bucket::new(SOURCE, SOURCE_BURST)).take(now),
        }
    }

    fn reply(
        &self,
        initiation: &[u8; INITIATION_LEN],
        sender: SessionIndex,
        from: SocketAddr,
        random: &mut Random,
    ) -> [u8; COOKIE_LEN] {
        let mut header = [0; SEALED_HEADER_LEN];
        header[..8].copy_from_slice(&prefix(COOKIE, sender));
        header[8..].copy_from_slice(&*draw::<8>(random));
        let (mut body, mut tag) = (cookie(&self.secrets[0], from), [0; TAG_LEN]);
        let key = self.door.cookie_key(mac1(initiation));
        SealKey::new(COOKIE_SEAL, &key).seal(&header, &mut body, &mut tag);
        let mut reply = [0; COOKIE_LEN];
        reply[..16].copy_from_slice(&header);
        reply[16..32].copy_from_slice(&body);
        reply[32..].copy_from_slice(&tag);
        reply
    }

    fn turn(&mut self, random: &mut Random, now: Instant) {
        if now.duration_since(self.turned) >= COOKIE_LIFE {
            self.secrets.swap(0, 1);
            self.secrets[0] = secret(random);
            self.turned = now;
        }
    }
}

fn secret(random: &mut Random) -> hmac::Key {
    hmac::Key::new(HMAC_SHA256, &*draw::<32>(random))
}

fn cookie(secret: &hmac::Key, from: SocketAddr) -> Cookie {
    let mut context = hmac::Context::with_key(secret);
    match from.ip().to_canonical() {
        IpAddr::V4(address) => context.update(&address.octets()),
        IpAddr::V6(address) => context.update(&address.octets()),
    }
    context.update(&from.port().to_be_bytes());
    short(&context.sign())
}

/// One owner has all of an IPv6 network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !0 << 64).into(),
    }
}

fn write_mac(key: &hmac::Key, message: &mut [u8], at: usize) {
    let mac = short(&hmac::sign(key, &message[..at]));
    message[at..at + MAC_LEN].copy_from_slice(&mac);
}

fn mac_fits(key: &hmac::Key, message: &[u8], at: usize) -> bool {
    let mac = short(&hmac::sign(key, &message[..at]));
    verify_slices_are_equal(&mac, &message[at..at + MAC_LEN]).is_ok()
}

fn short(tag: &hmac::Tag) -> [u8; MAC_LEN] {
    *tag.as_ref().first_chunk().expect("SHA-256 has more bytes")
}

const MAC1: usize = INITIATION_LEN - 2 * MAC_LEN;
const MAC2: usize = INITIATION_LEN - MAC_LEN;
const RESPONSE_MAC: usize = RESPONSE_LEN - MAC_LEN;
const COOKIE_SEAL: Algorithm = Algorithm::ChaCha20Poly1305;
/// A cookie is good for at least as long, and at most for twice as long.
pub(super) const COOKIE_LIFE: Duration = Duration::from_secs(120);
/// Handshakes that are taken from anyone: 200 a second are a few percent of a core.
const ANYONE: Duration = Duration::from_millis(5);
const ANYONE_BURST: u32 = 200;
/// Above that, from one address that is shown to be right: 20 a second.
const SOURCE: Duration = Duration::from_millis(50);
const SOURCE_BURST: u32 = 20;
/// Addresses that are counted at a time.
const SOURCES: usize = 1024;
/// Cookies that are sent: 2,000 a second.
const REPLY: Duration = Duration::from_micros(500);
const REPLY_BURST: u32 = 200;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::datapath::handshake::sim::random;

    const KEY: DataKey = DataKey([1; 32]);
    const SENDER: SessionIndex = SessionIndex(7);

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 6783))
    }

    fn initiation(cookie: Option<&Cookie>) -> [u8; INITIATION_LEN] {
        let mut bytes = [3; INITIATION_LEN];
        Door::of(&KEY).write_macs(&mut bytes, cookie);
        bytes
    }

    /// A gate at which so many have been let in that it asks for cookies.
    fn busy(random: &mut Random, now: Instant) -> Gate {
        let mut gate = Gate::new(&KEY, random, now);
        for _ in 0..ANYONE_BURST {
            assert_eq!(gate.admit(&initiation(None), SENDER, at(1), random, now), Verdict::Open);
        }
        gate
    }

    fn asked(verdict: Verdict) -> Cookie {
        let Verdict::Ask(reply) = verdict else { panic!("{verdict:?}") };
        Door::of(&KEY).cookie(&reply, mac1(&initiation(None))).unwrap()
    }

    #[test]
    fn who_does_not_know_the_key_is_not_heard() {
        let (mut random, now) = (random(1), Instant::now());
        let mut gate = Gate::new(&KEY, &mut random, now);
        let mut wrong = [3; INITIATION_LEN];
        Door::of(&DataKey([2; 32])).write_macs(&mut wrong, None);
        assert_eq!(gate.admit(&wrong, SENDER, at(1), &mut random, now), Verdict::WrongMac);
        for byte in 0..MAC2 {
            let mut changed = initiation(None);
            changed[byte] ^= 1;
            assert_eq!(gate.admit(&changed, SENDER, at(1), &mut random, now), Verdict::WrongMac);
        }
    }

    #[test]
    fn under_load_a_cookie_opens_for_its_address_only() {
        let (mut random, now) = (random(1), Instant::now());
        let mut gate = busy(&mut random, now);
        let mut admit = |cookie, from| gate.admit(&initiation(cookie), SENDER, from, &mut random, now);
        let cookie = asked(admit(None, at(1)));
        assert_eq!(admit(Some(&cookie), at(1)), Verdict::Open);
        assert!(matches!(admit(Some(&cookie), at(2)), Verdict::Ask(_)));
        for _ in 1..SOURCE_BURST {
            assert_eq!(admit(Some(&cookie), at(1)), Verdict::Open);
        }
        assert_eq!(admit(Some(&cookie), at(1)), Verdict::Busy, "too many from there");
        let other = asked(admit(None, at(2)));
        assert_eq!(admit(Some(&other), at(2)), Verdict::Open, "others are not concerned");
    }

    #[test]
    fn a_cookie_ends() {
        let (mut random, now) = (random(1), Instant::now());
        let mut gate = busy(&mut random, now);
        let cookie = asked(gate.admit(&initiation(None), SENDER, at(1), &mut random, now));
        for (later, good) in [(COOKIE_LIFE, true), (2 * COOKIE_LIFE, false)] {
            let now = now + later;
            while gate.anyone.take(now) {}
            let verdict = gate.admit(&initiation(Some(&cookie)), SENDER, at(1), &mut random, now);
            assert_eq!(verdict == Verdict::Open, good, "{verdict:?}");
        }
    }

    #[test]
    fn a_cookie_is_read_only_by_who_sent_the_initiation() {
        let (mut random, now) = (random(1), Instant::now());
        let mut gate = busy(&mut random, now);
        let verdict = gate.admit(&initiation(None), SENDER, at(1), &mut random, now);
        let Verdict::Ask(reply) = verdict else { panic!("{verdict:?}") };
        assert_eq!(Door::of(&KEY).cookie(&reply, &[0; MAC_LEN]), None);
        for at in 0..COOKIE_LEN {
            let mut changed = reply;
            changed[at] ^= 1;
            assert_eq!(Door::of(&KEY).cookie(&changed, mac1(&initiation(None))), None, "byte {at}");
        }
    }

    #[test]
    fn the_addresses_that_are_counted_are_bounded() {
        let (mut random, now) = (random(1), Instant::now());
        let mut gate = Gate::new(&KEY, &mut random, now);
        for low in 0..2 * SOURCES as u32 {
            gate.source(IpAddr::from((0xc000_0000 + low).to_be_bytes()), now);
        }
        assert_eq!(gate.sources.len(), SOURCES);
        assert!(gate.source(at(1).ip(), now + SOURCE), "whose tokens are back gave way");
    }
}
