//! Sealing one datagram in place, and opening it.
//!
//! ```text
//!   0         1       2          4                  8                 16
//!   ├ver.│kind┼ flags ┼ segment ─┼ receiver's index ┼ lane │ number ──┼ inner packet ─────┼ tag, 16 ┤
//!   └──────────── associated data: shown, not changed ────────────────┘└──── enciphered ──┘
//!                                                   └───── nonce ─────┘
//! ```
//!
//! The nonce is four zero bytes and the header's counter, so that one cannot differ from the other. The counter's top
//! byte names the sender's queue, its lane: each worker counts alone, and no counter is used twice under one key.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What packets are sealed with. Both ends of a session use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Aes256Gcm,
    /// For processors without instructions for AES.
    ChaCha20Poly1305,
}

impl Algorithm {
    /// What this processor is fast at.
    pub fn preferred() -> Self {
        #[cfg(target_arch = "x86_64")]
        let aes = is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq");
        #[cfg(target_arch = "aarch64")]
        let aes = std::arch::is_aarch64_feature_detected!("aes")
            && std::arch::is_aarch64_feature_detected!("pmull");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let aes = false;
        if aes { Self::Aes256Gcm } else { Self::ChaCha20Poly1305 }
    }

    fn key(self, key: &[u8; KEY_LEN]) -> LessSafeKey {
        let algorithm = match self {
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        LessSafeKey::new(UnboundKey::new(algorithm, key).expect("both algorithms take 32 bytes"))
    }
}

/// Seals one direction of a session.
pub struct SealKey(LessSafeKey);

impl SealKey {
    pub fn new(algorithm: Algorithm, key: &[u8; KEY_LEN]) -> Self {
        Self(algorithm.key(key))
    }

    /// Enciphers `body` in place and writes the tag that goes behind it. Never twice with one counter in the header.
    pub fn seal(&self, header: &[u8; SEALED_HEADER_LEN], body: &mut [u8], tag: &mut [u8; TAG_LEN]) {
        self.0
            .seal_in_place_scatter(nonce(header), Aad::from(header), body, &[], tag)
            .expect("a datagram is far below the algorithm's limit");
    }
}

/// Opens one direction of a session.
pub struct OpenKey(LessSafeKey);

/// It was not sealed like that by who has the key; too short for a tag counts as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the packet was changed on its way, or sealed with another key")]
pub struct Forged;

impl OpenKey {
    pub fn new(algorithm: Algorithm, key: &[u8; KEY_LEN]) -> Self {
        Self(algorithm.key(key))
    }

    /// Deciphers what lies behind the header in place; gives the length of the inner packet at its front.
    ///
    /// # Errors
    /// What is in `sealed` then is of no use.
    pub fn open(&self, header: &[u8; SEALED_HEADER_LEN], sealed: &mut [u8]) -> Result<usize, Forged> {
        let (body, tag) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(Forged)?;
        let opened = self.0.open_in_place_separate_tag(nonce(header), Aad::from(header), tag, body);
        opened.map(|body| body.len()).map_err(|_| Forged)
    }
}

/// A packet's counter as the header carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// The sender's queue.
    pub lane: u8,
    /// Counts the lane's packets under one key, from 0; 56 bits.
    pub number: u64,
}

impl Counter {
    pub fn encode(self) -> [u8; 8] {
        (u64::from(self.lane) << NUMBER_BITS | self.number & (LANE_END - 1)).to_be_bytes()
    }

    /// Reads the counter of a sealed packet's header.
    pub fn of(header: &[u8; SEALED_HEADER_LEN]) -> Self {
        let [.., lane, n0, n1, n2, n3, n4, n5, n6] = *header;
        Self { lane, number: u64::from_be_bytes([0, n0, n1, n2, n3, n4, n5, n6]) }
    }
}

/// Hands out one lane's numbers under one key. Written by one thread, so that a load and a store do; read by any.
/// The alignment keeps lanes on cache lines of their own.
#[derive(Default)]
#[repr(align(64))]
pub struct Numbers(AtomicU64);

/// The lane has no number left under this key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no packet may be sealed with this key any more")]
pub struct Exhausted;

impl Numbers {
    /// Takes so many numbers in a row; gives the first.
    pub fn take(&self, count: u64) -> Result<u64, Exhausted> {
        let first = self.0.load(Relaxed);
        if count > LANE_END - first {
            return Err(Exhausted);
        }
        self.0.store(first + count, Relaxed);
        Ok(first)
    }

    /// How many have been taken.
    pub fn taken(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

fn nonce(header: &[u8; SEALED_HEADER_LEN]) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[4..].copy_from_slice(&header[8..]);
    Nonce::assume_unique_for_key(nonce)
}

/// Bytes of a sealed packet's header, all of them authenticated.
pub const SEALED_HEADER_LEN: usize = 16;
/// Bytes behind the inner packet.
pub const TAG_LEN: usize = 16;
/// Bytes of either algorithm's key.
pub const KEY_LEN: usize = 32;
/// After so many packets of a lane the session is due for new keys, long before the numbers end.
pub const REKEY_AFTER: u64 = 1 << 48;
const NUMBER_BITS: u32 = 56;
const LANE_END: u64 = 1 << NUMBER_BITS;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: [Algorithm; 2] = [Algorithm::Aes256Gcm, Algorithm::ChaCha20Poly1305];
    const KEY: [u8; KEY_LEN] = [7; KEY_LEN];

    fn header(counter: Counter) -> [u8; SEALED_HEADER_LEN] {
        let mut header = [0x12, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0];
        header[8..].copy_from_slice(&counter.encode());
        header
    }

    fn seal(key: &SealKey, header: &[u8; SEALED_HEADER_LEN], body: &[u8]) -> Vec<u8> {
        let (mut body, mut tag) = (body.to_vec(), [0; TAG_LEN]);
        key.seal(header, &mut body, &mut tag);
        [&body[..], &tag].concat()
    }

    fn hex(text: &str) -> Vec<u8> {
        let digit = |byte| char::from(byte).to_digit(16).unwrap() as u8;
        text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
    }

    /// Test cases 13 and 14 of "The Galois/Counter Mode of Operation" (McGrew and Viega, 2005).
    #[test]
    fn aes_256_gcm_is_the_published_one() {
        let key = Algorithm::Aes256Gcm.key(&[0; KEY_LEN]);
        let zeros = || Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let tag = key.seal_in_place_separate_tag(zeros(), Aad::empty(), &mut []).unwrap();
        assert_eq!(tag.as_ref(), hex("530f8afbc74536b9a963b4f1c4cb738b"));
        let mut body = [0; 16];
        let tag = key.seal_in_place_separate_tag(zeros(), Aad::empty(), &mut body).unwrap();
        assert_eq!(body[..], hex("cea7403d4d606b6e074ec5d3baf39d18"));
        assert_eq!(tag.as_ref(), hex("d0d1c8a799996bf0265b98b5d48ab919"));
    }

    /// RFC 8439, section 2.8.2.
    #[test]
    fn chacha20_poly1305_is_the_published_one() {
        let key: [u8; KEY_LEN] = std::array::from_fn(|at| 0x80 + at as u8);
        let key = Algorithm::ChaCha20Poly1305.key(&key);
        let nonce =
            Nonce::assume_unique_for_key([7, 0, 0, 0, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47]);
        let mut body =
            *b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the \
            future, sunscreen would be it.";
        let aad = Aad::from(hex("50515253c0c1c2c3c4c5c6c7"));
        let tag = key.seal_in_place_separate_tag(nonce, aad, &mut body).unwrap();
        assert_eq!(body[..16], hex("d31a8d34648e60db7b86afbc53ef7ec2"));
        assert_eq!(tag.as_ref(), hex("1ae10b594f09e26a7e902ecbd0600691"));
    }

    #[test]
    fn the_nonce_is_the_headers_counter() {
        let header = header(Counter { lane: 3, number: 0x0001_0203_0405_0607 });
        assert_eq!(nonce(&header).as_ref(), &[0, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_change_of_any_byte_is_noticed() {
        for algorithm in BOTH {
            let (sealer, opener) = (SealKey::new(algorithm, &KEY), OpenKey::new(algorithm, &KEY));
            let header = header(Counter { lane: 1, number: 2 });
            let sealed = seal(&sealer, &header, b"inner packet");
            let mut good = sealed.clone();
            assert_eq!(opener.open(&header, &mut good), Ok(12));
            assert_eq!(&good[..12], b"inner packet");
            for at in 0..SEALED_HEADER_LEN + sealed.len() {
                let (mut header, mut sealed) = (header, sealed.clone());
                match at.checked_sub(SEALED_HEADER_LEN) {
                    None => header[at] ^= 1,
                    Some(at) => sealed[at] ^= 0x80,
                }
                assert_eq!(opener.open(&header, &mut sealed), Err(Forged), "byte {at}");
            }
            for len in 0..sealed.len() {
                assert_eq!(opener.open(&header, &mut sealed.clone()[..len]), Err(Forged), "cut to {len}");
            }
        }
    }

    #[test]
    fn another_key_or_algorithm_does_not_open() {
        let header = header(Counter { lane: 0, number: 0 });
        let mut sealed = seal(&SealKey::new(Algorithm::Aes256Gcm, &KEY), &header, b"inner");
        let opens = |algorithm, key, sealed: &mut [u8]| OpenKey::new(algorithm, key).open(&header, sealed);
        assert_eq!(opens(Algorithm::Aes256Gcm, &[8; KEY_LEN], &mut sealed.clone()), Err(Forged));
        assert_eq!(opens(Algorithm::ChaCha20Poly1305, &KEY, &mut sealed.clone()), Err(Forged));
        assert_eq!(opens(Algorithm::Aes256Gcm, &KEY, &mut sealed), Ok(5));
    }

    #[test]
    fn numbers_never_wrap() {
        let numbers = Numbers::default();
        assert_eq!((numbers.take(1), numbers.take(45), numbers.take(1)), (Ok(0), Ok(1), Ok(46)));
        numbers.0.store(LANE_END - 2, Relaxed);
        assert_eq!(numbers.take(3), Err(Exhausted));
        assert_eq!(numbers.take(2), Ok(LANE_END - 2));
        assert_eq!(numbers.take(1), Err(Exhausted));
        assert_eq!(numbers.taken(), LANE_END);
    }

    proptest! {
        #[test]
        fn a_counter_reads_back(lane: u8, number in 0..LANE_END) {
            let counter = Counter { lane, number };
            prop_assert_eq!(Counter::of(&header(counter)), counter);
        }

        #[test]
        fn what_is_sealed_opens(body in prop::collection::vec(any::<u8>(), 0..2000), lane: u8, chacha: bool) {
            let algorithm = BOTH[usize::from(chacha)];
            let header = header(Counter { lane, number: 9 });
            let mut sealed = seal(&SealKey::new(algorithm, &KEY), &header, &body);
            prop_assert_eq!(OpenKey::new(algorithm, &KEY).open(&header, &mut sealed), Ok(body.len()));
            prop_assert_eq!(&sealed[..body.len()], &body[..]);
        }

        #[test]
        fn any_bytes_are_refused(header: [u8; SEALED_HEADER_LEN], mut bytes: Vec<u8>) {
            prop_assert_eq!(OpenKey::new(Algorithm::Aes256Gcm, &KEY).open(&header, &mut bytes), Err(Forged));
        }
    }
}
