//! The handshake's messages on the wire, in front of which stands what all kinds share.
//!
//! ```text
//!   initiation  0: version<<4|3   1-3: 0   4: sender's index     8: noise: e, s, hello     137: mac1   153: mac2
//!   response    0: version<<4|4   1-3: 0   4: receiver's index   8: noise: e, answer        69: mac1
//!   cookie      0: version<<4|5   1-3: 0   4: receiver's index   8: nonce   16: sealed cookie   48
//! ```
//!
//! What `mac1` and `mac2` are for, `gate` says; what is inside of the noise, `noise`.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::datapath::sessions::SessionIndex;

/// A handshake datagram whose kind and length are right; nothing in it is known to be true yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    Initiation { sender: SessionIndex, bytes: &'a [u8; INITIATION_LEN] },
    Response { receiver: SessionIndex, bytes: &'a [u8; RESPONSE_LEN] },
    Cookie { receiver: SessionIndex, bytes: &'a [u8; COOKIE_LEN] },
}

impl<'a> Message<'a> {
    pub fn decode(datagram: &'a [u8]) -> Option<Self> {
        let &[kind, 0, 0, 0, i0, i1, i2, i3, ..] = datagram else { return None };
        let index = SessionIndex(u32::from_be_bytes([i0, i1, i2, i3]));
        match kind {
            INITIATION => Some(Self::Initiation { sender: index, bytes: datagram.try_into().ok()? }),
            RESPONSE => Some(Self::Response { receiver: index, bytes: datagram.try_into().ok()? }),
            COOKIE => Some(Self::Cookie { receiver: index, bytes: datagram.try_into().ok()? }),
            _ => None,
        }
    }
}

/// The first bytes of every message.
pub(super) fn prefix(kind: u8, index: SessionIndex) -> [u8; PREFIX_LEN] {
    let [i0, i1, i2, i3] = index.0.to_be_bytes();
    [kind, 0, 0, 0, i0, i1, i2, i3]
}

/// A sealed data packet without an inner packet: shows the receiver that we have the key.
pub(super) const SEALED: u8 = VERSION << 4 | 2;
pub(super) const INITIATION: u8 = VERSION << 4 | 3;
pub(super) const RESPONSE: u8 = VERSION << 4 | 4;
pub(super) const COOKIE: u8 = VERSION << 4 | 5;
const VERSION: u8 = 1;

pub(super) const PREFIX_LEN: usize = 8;
pub(super) const MAC_LEN: usize = 16;
/// Ephemeral key 32, sealed static key 32 + 16, sealed hello.
pub(super) const INITIATION_NOISE: usize = 32 + 48 + HELLO_LEN + 16;
/// Ephemeral key 32, sealed answer.
pub(super) const RESPONSE_NOISE: usize = 32 + ANSWER_LEN + 16;
pub(super) const NAME_TAG_LEN: usize = 16;
/// Name 16, incarnation 8, moment 8, algorithm 1.
pub(super) const HELLO_LEN: usize = NAME_TAG_LEN + 17;
/// Index 4, incarnation 8, algorithm 1.
pub(super) const ANSWER_LEN: usize = 13;

pub const INITIATION_LEN: usize = PREFIX_LEN + INITIATION_NOISE + 2 * MAC_LEN;
pub const RESPONSE_LEN: usize = PREFIX_LEN + RESPONSE_NOISE + MAC_LEN;
/// Shorter than what it answers: a forged source gains nothing by it.
pub const COOKIE_LEN: usize = 16 + 2 * MAC_LEN;
/// No handshake datagram is longer.
pub const MESSAGE_LEN_MAX: usize = INITIATION_LEN;
const _: () = assert!(COOKIE_LEN < INITIATION_LEN && RESPONSE_LEN < INITIATION_LEN);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kind_and_length_must_fit() {
        let index = SessionIndex(0x0102_0304);
        let mut datagram = prefix(RESPONSE, index).to_vec();
        assert_eq!(datagram, [0x14, 0, 0, 0, 1, 2, 3, 4]);
        datagram.resize(RESPONSE_LEN, 9);
        let bytes = datagram.as_slice().try_into().unwrap();
        assert_eq!(Message::decode(&datagram), Some(Message::Response { receiver: index, bytes }));
        assert_eq!(Message::decode(&datagram[..RESPONSE_LEN - 1]), None);
        datagram[0] = INITIATION;
        assert_eq!(Message::decode(&datagram), None);
        assert_eq!([INITIATION_LEN, RESPONSE_LEN, COOKIE_LEN], [169, 85, 48], "as the picture says");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            let _ = Message::decode(&bytes);
        }
    }
}
