//! Probes and their answers on the wire.
//!
//! ```text
//!   probe   0: version<<4|7   1-3: 0   4: sender's data id   8: number   16: round trip in µs   20: mac   36..: padding
//!   answer  0: version<<4|8   1-3: 0   4: sender's data id   8: number of the probe   16: 0     20: mac   36
//! ```
//!
//! The mac is keyed by what the two static keys have in common (X25519), so it needs no session and outlives restarts;
//! it covers the receiver's data id as well, so that nothing can be sent back as if it were said by the other. Where
//! packets go in clear it is zero, and an answer is believed for its number, whose lower bits are random. Its upper bits grow,
//! also over restarts: what is said again by somebody else is not taken for a sign of life.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{DataId, DataKey, DataSecret};
use aws_lc_rs::{
    agreement::{PrivateKey, UnparsedPublicKey, X25519, agree},
    constant_time::verify_slices_are_equal,
    hmac::{self, HMAC_SHA256},
};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub kind: Kind,
    pub sender: DataId,
    pub number: u64,
    /// Of the sender's latest probe on this way: it was answered.
    pub rtt: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Probe,
    Answer,
}

/// What two peers prove each other who they are with.
pub struct Key(hmac::Key);

impl Key {
    /// None if the public key is no point to agree with.
    pub fn agree(secret: &DataSecret, key: &DataKey) -> Option<Self> {
        let private = PrivateKey::from_private_key(&X25519, secret.bytes()).ok()?;
        let public = UnparsedPublicKey::new(&X25519, key.0);
        agree(&private, public, (), |shared| {
            let shared = hmac::Key::new(HMAC_SHA256, shared);
            Ok(Self(hmac::Key::new(HMAC_SHA256, hmac::sign(&shared, b"weft probe").as_ref())))
        })
        .ok()
    }

    fn mac(&self, head: &[u8], receiver: DataId) -> [u8; MAC_LEN] {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(head);
        context.update(&receiver.0.to_be_bytes());
        *context.sign().as_ref().first_chunk().expect("SHA-256 has more bytes")
    }
}

impl Probe {
    /// As a datagram to the peer with that data id.
    pub fn encode(self, key: Option<&Key>, receiver: DataId) -> [u8; PROBE_LEN] {
        let mut bytes = [0; PROBE_LEN];
        bytes[0] = match self.kind {
            Kind::Probe => PROBE,
            Kind::Answer => ANSWER,
        };
        bytes[4..8].copy_from_slice(&self.sender.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_be_bytes());
        let micros = self.rtt.map_or(0, |rtt| rtt.as_micros().clamp(1, u32::MAX.into()) as u32);
        bytes[16..MAC_AT].copy_from_slice(&micros.to_be_bytes());
        if let Some(key) = key {
            let mac = key.mac(&bytes[..MAC_AT], receiver);
            bytes[MAC_AT..].copy_from_slice(&mac);
        }
        bytes
    }

    /// None if it is neither probe nor answer. Nothing in it is known to be true before [`Probe::is_from`] says so.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let bytes: &[u8; PROBE_LEN] = datagram.first_chunk()?;
        let kind = match bytes[..4] {
            [PROBE, 0, 0, 0] => Kind::Probe,
            [ANSWER, 0, 0, 0] => Kind::Answer,
            _ => return None,
        };
        let u32_at = |at| bytes[at..].first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
        let number = u64::from_be_bytes(*bytes[8..].first_chunk()?);
        let rtt = Some(u32_at(16)?).filter(|micros| *micros != 0);
        Some(Self {
            kind,
            sender: DataId(u32_at(4)?),
            number,
            rtt: rtt.map(|micros| Duration::from_micros(micros.into())),
        })
    }

    /// Whether who has that key made the datagram for us.
    pub fn is_from(datagram: &[u8], key: &Key, receiver: DataId) -> bool {
        let Some(bytes) = datagram.first_chunk::<PROBE_LEN>() else { return false };
        verify_slices_are_equal(&key.mac(&bytes[..MAC_AT], receiver), &bytes[MAC_AT..]).is_ok()
    }
}

/// Bytes of a probe without padding.
pub const PROBE_LEN: usize = MAC_AT + MAC_LEN;
/// The first bytes of a probe, of an answer.
pub const PROBE: u8 = 1 << 4 | 7;
pub const ANSWER: u8 = 1 << 4 | 8;
const MAC_AT: usize = 20;
const MAC_LEN: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::data_key;
    use proptest::prelude::*;

    fn key(ours: u8, theirs: u8) -> Key {
        let secret = |byte| DataSecret::new([byte; 32]);
        Key::agree(&secret(ours), &data_key(&secret(theirs))).unwrap()
    }

    fn probe() -> Probe {
        Probe { kind: Kind::Probe, sender: DataId(7), number: 1 << 32 | 5, rtt: None }
    }

    #[test]
    fn only_the_two_can_speak_for_each_other() {
        let bytes = probe().encode(Some(&key(1, 2)), DataId(8));
        assert_eq!(bytes.len(), 36, "as the picture says");
        assert!(Probe::is_from(&bytes, &key(2, 1), DataId(8)));
        assert!(!Probe::is_from(&bytes, &key(2, 3), DataId(8)), "another peer's");
        assert!(!Probe::is_from(&bytes, &key(2, 1), DataId(7)), "sent back");
        for at in 0..bytes.len() {
            let mut changed = bytes;
            changed[at] ^= 1;
            assert!(!Probe::is_from(&changed, &key(2, 1), DataId(8)), "byte {at}");
        }
    }

    #[test]
    fn a_key_that_is_no_point_is_refused() {
        assert!(Key::agree(&DataSecret::new([1; 32]), &DataKey([0; 32])).is_none());
    }

    proptest! {
        #[test]
        fn a_probe_reads_back(answer: bool, sender: u32, number: u64, micros: u32, padding: Vec<u8>) {
            let rtt = (micros != 0).then(|| Duration::from_micros(micros.into()));
            let kind = if answer { Kind::Answer } else { Kind::Probe };
            let probe = Probe { kind, sender: DataId(sender), number, rtt };
            let datagram = [&probe.encode(None, DataId(1))[..], &padding].concat();
            prop_assert_eq!(Probe::decode(&datagram), Some(probe));
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            let _ = Probe::decode(&bytes);
            prop_assert!(!Probe::is_from(&bytes, &key(1, 2), DataId(1)));
        }
    }
}
