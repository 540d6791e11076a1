//! The Noise IK handshake: two messages that agree on a key for each direction, with fresh secrets from both ends.
//!
//! ```text
//!   initiator                                                          responder
//!     e, es, s, ss   hello {name, incarnation, moment, algorithm}   ─▶   who it is, told to nobody else
//!     ◀─   e, ee, se   answer {index, incarnation, algorithm}             keys
//!   keys
//! ```
//!
//! The prologue is the initiation's prefix and the name of who is called: whoever changes the prefix in passing breaks
//! the handshake, and so does a peer that publishes another's key as its own and passes the message on. What Noise does
//! not say: the two raw keys of its split go into the packets' own ciphers, for there the counter is not Noise's.
//! (The Noise Protocol Framework, revision 34, sections 7.5 and 5.2.)
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::message::{ANSWER_LEN, HELLO_LEN, INITIATION_NOISE, NAME_TAG_LEN, PREFIX_LEN, RESPONSE_NOISE};
use crate::{
    datapath::{
        seal::{Algorithm, KEY_LEN, OpenKey, SealKey},
        sessions::SessionIndex,
    },
    types::{DataKey, DataSecret, Incarnation, PeerName},
};
use aws_lc_rs::digest::{self, SHA256};
use snow::{
    Builder, HandshakeState,
    params::{CipherChoice, DHChoice, HashChoice},
    resolvers::{CryptoResolver, DefaultResolver},
    types::{Cipher, Dh, Hash, Random},
};
use zeroize::Zeroizing;

/// Stands for a peer's name in messages, at one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NameTag([u8; NAME_TAG_LEN]);

impl NameTag {
    pub fn of(name: &PeerName) -> Self {
        let hash = digest::digest(&SHA256, name.as_str().as_bytes());
        Self(*hash.as_ref().first_chunk().expect("SHA-256 has more bytes"))
    }
}

/// Who is called, and in which message: the handshake's prologue.
#[derive(Clone, Copy)]
pub struct Callee<'a> {
    pub prefix: &'a [u8; PREFIX_LEN],
    pub name: NameTag,
}

/// What an initiator tells of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub from: NameTag,
    pub stamp: Stamp,
    /// What it would like to seal with.
    pub algorithm: Algorithm,
}

/// Orders all initiations of one agent, over restarts too, so that none is taken twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    pub incarnation: Incarnation,
    /// Counts up within the incarnation.
    pub moment: u64,
}

/// What a responder says to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the responder calls the session.
    pub index: SessionIndex,
    pub incarnation: Incarnation,
    /// What both seal with.
    pub algorithm: Algorithm,
}

/// One end's keys of a session.
pub struct Keys {
    pub algorithm: Algorithm,
    pub sending: Zeroizing<[u8; KEY_LEN]>,
    pub receiving: Zeroizing<[u8; KEY_LEN]>,
}

/// The message is not from who it should be, not for us, or was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the handshake message can't be opened: it was made with other keys or changed on its way")]
pub struct Unopened;

/// An end that waits for the response.
pub struct Initiator(Box<HandshakeState>);

/// An end that has read an initiation.
pub struct Responder {
    state: Box<HandshakeState>,
    /// Whose initiation it is, proved: the name in the hello must fit it.
    pub key: DataKey,
    pub hello: Hello,
}

impl Keys {
    pub fn seal_key(&self) -> SealKey {
        SealKey::new(self.algorithm, &self.sending)
    }

    pub fn open_key(&self) -> OpenKey {
        OpenKey::new(self.algorithm, &self.receiving)
    }
}

impl Initiator {
    /// Begins a handshake with who has `peer`. `ephemeral` is to be random and never used again.
    pub fn new(
        secret: &DataSecret,
        peer: &DataKey,
        ephemeral: Zeroizing<[u8; 32]>,
        callee: Callee<'_>,
        hello: Hello,
    ) -> Result<(Self, [u8; INITIATION_NOISE]), Unopened> {
        let prologue = callee.prologue();
        let mut state =
            builder(secret, ephemeral, &prologue)?.remote_public_key(&peer.0)?.build_initiator()?;
        let mut noise = [0; INITIATION_NOISE];
        state.write_message(&hello.encode(), &mut noise)?;
        Ok((Self(Box::new(state)), noise))
    }

    /// Reads the response. After a message that can't be opened the right one still can.
    pub fn finish(&mut self, noise: &[u8; RESPONSE_NOISE]) -> Result<(Answer, Keys), Unopened> {
        let mut answer = [0; ANSWER_LEN];
        self.0.read_message(noise, &mut answer)?;
        let answer = Answer::decode(&answer).ok_or(Unopened)?;
        let (sending, receiving) = split(&mut self.0);
        Ok((answer, Keys { algorithm: answer.algorithm, sending, receiving }))
    }
}

impl Responder {
    /// Reads an initiation.
    pub fn new(
        secret: &DataSecret,
        ephemeral: Zeroizing<[u8; 32]>,
        callee: Callee<'_>,
        noise: &[u8; INITIATION_NOISE],
    ) -> Result<Self, Unopened> {
        let prologue = callee.prologue();
        let mut state = builder(secret, ephemeral, &prologue)?.build_responder()?;
        let mut hello = [0; HELLO_LEN];
        state.read_message(noise, &mut hello)?;
        let hello = Hello::decode(&hello).ok_or(Unopened)?;
        let key = state.get_remote_static().and_then(DataKey::from_bytes).ok_or(Unopened)?;
        Ok(Self { state: Box::new(state), key, hello })
    }

    /// Answers it.
    pub fn answer(mut self, answer: Answer) -> Result<([u8; RESPONSE_NOISE], Keys), Unopened> {
        let mut noise = [0; RESPONSE_NOISE];
        self.state.write_message(&answer.encode(), &mut noise)?;
        let (receiving, sending) = split(&mut self.state);
        Ok((noise, Keys { algorithm: answer.algorithm, sending, receiving }))
    }
}

impl Callee<'_> {
    fn prologue(&self) -> [u8; PREFIX_LEN + NAME_TAG_LEN] {
        let mut bytes = [0; PREFIX_LEN + NAME_TAG_LEN];
        bytes[..PREFIX_LEN].copy_from_slice(self.prefix);
        bytes[PREFIX_LEN..].copy_from_slice(&self.name.0);
        bytes
    }
}

impl Hello {
    fn encode(&self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[..16].copy_from_slice(&self.from.0);
        bytes[16..24].copy_from_slice(&self.stamp.incarnation.0.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.stamp.moment.to_be_bytes());
        bytes[32] = code(self.algorithm);
        bytes
    }

    fn decode(bytes: &[u8; HELLO_LEN]) -> Option<Self> {
        let (from, rest) = bytes.split_first_chunk()?;
        let (incarnation, rest) = rest.split_first_chunk()?;
        let (moment, code) = rest.split_first_chunk()?;
        let stamp = Stamp {
            incarnation: Incarnation(u64::from_be_bytes(*incarnation)),
            moment: u64::from_be_bytes(*moment),
        };
        Some(Self { from: NameTag(*from), stamp, algorithm: algorithm(code)? })
    }
}

impl Answer {
    fn encode(&self) -> [u8; ANSWER_LEN] {
        let mut bytes = [0; ANSWER_LEN];
        bytes[..4].copy_from_slice(&self.index.0.to_be_bytes());
        bytes[4..12].copy_from_slice(&self.incarnation.0.to_be_bytes());
        bytes[12] = code(self.algorithm);
        bytes
    }

    fn decode(bytes: &[u8; ANSWER_LEN]) -> Option<Self> {
        let (index, rest) = bytes.split_first_chunk()?;
        let (incarnation, code) = rest.split_first_chunk()?;
        Some(Self {
            index: SessionIndex(u32::from_be_bytes(*index)),
            incarnation: Incarnation(u64::from_be_bytes(*incarnation)),
            algorithm: algorithm(code)?,
        })
    }
}

pub(super) fn code(algorithm: Algorithm) -> u8 {
    match algorithm {
        Algorithm::Aes256Gcm => 1,
        Algorithm::ChaCha20Poly1305 => 2,
    }
}

pub(super) fn algorithm(code: &[u8]) -> Option<Algorithm> {
    match code {
        [1] => Some(Algorithm::Aes256Gcm),
        [2] => Some(Algorithm::ChaCha20Poly1305),
        _ => None,
    }
}

fn builder<'a>(
    secret: &'a DataSecret,
    ephemeral: Zeroizing<[u8; 32]>,
    prologue: &'a [u8],
) -> Result<Builder<'a>, Unopened> {
    let pattern = PATTERN.parse().map_err(|_| Unopened)?;
    let resolver = Box::new(Resolver { ephemeral });
    Ok(Builder::with_resolver(pattern, resolver).local_private_key(secret.bytes())?.prologue(prologue)?)
}

/// The initiator's key and the responder's.
fn split(state: &mut HandshakeState) -> (Zeroizing<[u8; 32]>, Zeroizing<[u8; 32]>) {
    let (initiator, responder) = state.dangerously_get_raw_split();
    (Zeroizing::new(initiator), Zeroizing::new(responder))
}

/// Noise's parts as they are, but for the random bytes: those are handed in.
struct Resolver {
    ephemeral: Zeroizing<[u8; 32]>,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Handed(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        DefaultResolver.resolve_dh(choice)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

/// Random bytes for one ephemeral key; asked again, it refuses.
struct Handed(Option<Zeroizing<[u8; 32]>>);

impl Random for Handed {
    fn try_fill_bytes(&mut self, to: &mut [u8]) -> Result<(), snow::Error> {
        let bytes = self.0.take().ok_or(snow::Error::Rng)?;
        to.copy_from_slice(bytes.get(..to.len()).ok_or(snow::Error::Rng)?);
        Ok(())
    }
}

impl From<snow::Error> for Unopened {
    fn from(_: snow::Error) -> Self {
        Self
    }
}

const PATTERN: &str = "Noise_IK_25519_AESGCM_SHA256";

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::datapath::seal::{SEALED_HEADER_LEN, TAG_LEN};
    use aws_lc_rs::agreement::{PrivateKey, X25519};

    const PREFIX: [u8; PREFIX_LEN] = [0x13, 0, 0, 0, 1, 2, 3, 4];
    const ANSWER: Answer = Answer {
        index: SessionIndex(5),
        incarnation: Incarnation(6),
        algorithm: Algorithm::ChaCha20Poly1305,
    };

    pub(in super::super) fn public(secret: &DataSecret) -> DataKey {
        let private = PrivateKey::from_private_key(&X25519, secret.bytes()).unwrap();
        DataKey::from_bytes(private.compute_public_key().unwrap().as_ref()).unwrap()
    }

    fn secret(byte: u8) -> DataSecret {
        DataSecret::new([byte; 32])
    }

    fn random(byte: u8) -> Zeroizing<[u8; 32]> {
        Zeroizing::new([byte; 32])
    }

    fn hello() -> Hello {
        let stamp = Stamp { incarnation: Incarnation(7), moment: 8 };
        Hello { from: tag("a"), stamp, algorithm: Algorithm::Aes256Gcm }
    }

    fn tag(name: &str) -> NameTag {
        NameTag::of(&name.parse().unwrap())
    }

    fn callee(prefix: &[u8; PREFIX_LEN]) -> Callee<'_> {
        Callee { prefix, name: tag("b") }
    }

    fn initiate() -> (Initiator, [u8; INITIATION_NOISE]) {
        Initiator::new(&secret(1), &public(&secret(2)), random(3), callee(&PREFIX), hello()).unwrap()
    }

    #[test]
    fn both_ends_get_each_others_keys_and_words() {
        let (mut initiator, initiation) = initiate();
        let responder = Responder::new(&secret(2), random(4), callee(&PREFIX), &initiation).unwrap();
        assert_eq!((responder.key, responder.hello), (public(&secret(1)), hello()));
        let (response, theirs) = responder.answer(ANSWER).unwrap();
        let (answer, ours) = initiator.finish(&response).unwrap();
        assert_eq!(answer, ANSWER);
        let header = [1; SEALED_HEADER_LEN];
        for (sealer, opener) in [(ours.seal_key(), theirs.open_key()), (theirs.seal_key(), ours.open_key())] {
            let (mut body, mut tag) = (*b"inner", [0; TAG_LEN]);
            sealer.seal(&header, &mut body, &mut tag);
            let mut sealed = [&body[..], &tag].concat();
            assert_eq!(opener.open(&header, &mut sealed), Ok(5));
        }
        let (mut body, mut tag) = (*b"inner", [0; TAG_LEN]);
        ours.seal_key().seal(&header, &mut body, &mut tag);
        let mut sealed = [&body[..], &tag].concat();
        assert!(ours.open_key().open(&header, &mut sealed).is_err(), "each direction has its own key");
    }

    #[test]
    fn a_change_of_any_byte_is_noticed_and_the_right_message_still_taken() {
        let (mut initiator, initiation) = initiate();
        for at in 0..INITIATION_NOISE {
            let mut changed = initiation;
            changed[at] ^= 1;
            assert!(Responder::new(&secret(2), random(4), callee(&PREFIX), &changed).is_err(), "byte {at}");
        }
        let mut other = PREFIX;
        other[7] ^= 1;
        assert!(Responder::new(&secret(2), random(4), callee(&other), &initiation).is_err(), "another index");
        let responder = Responder::new(&secret(2), random(4), callee(&PREFIX), &initiation).unwrap();
        let (response, _) = responder.answer(ANSWER).unwrap();
        for at in 0..RESPONSE_NOISE {
            let mut changed = response;
            changed[at] ^= 1;
            assert!(initiator.finish(&changed).is_err(), "byte {at}");
        }
        assert!(initiator.finish(&response).is_ok());
    }

    #[test]
    fn only_who_is_meant_can_read_an_initiation() {
        let (_, initiation) = initiate();
        assert!(Responder::new(&secret(9), random(4), callee(&PREFIX), &initiation).is_err());
        let other_name = Callee { prefix: &PREFIX, name: tag("c") };
        assert!(Responder::new(&secret(2), random(4), other_name, &initiation).is_err());
    }

    #[test]
    fn an_ephemeral_key_is_made_of_what_was_handed_in() {
        let ephemeral = public(&secret(3));
        assert_eq!(initiate().1[..32], ephemeral.0);
    }
}
