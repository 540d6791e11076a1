//! The header before every inner packet on the wire.
//!
//! ```text
//!  0         1        2           4                             8                16
//!  ┌────┬────┬────────┬───────────┬─────────────────────────────┬────────────────┬───────────────┬────────┐
//!  │ver.│kind│ flags  │   flow    │ clear: the sender's data_id │ inner packet …                          │
//!  │ver.│kind│ flags  │   flow    │ sealed: receiver's session  │    counter     │ inner packet …│  tag   │
//!  └────┴────┴────────┴───────────┴─────────────────────────────┴────────────────┴───────────────┴────────┘
//! ```
//!
//! Integers are big-endian. The kind tells the rest; versions and kinds that are not known are told apart, so that
//! each can be counted. A datagram that begins with a zero byte is of no version. The counter's top byte names the
//! sender's lane, which has a replay window of its own.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{DataId, SessionIndex};

/// What a data packet's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The inner packet's transport checksum is the sum of its pseudo-header alone.
    pub partial: bool,
    /// A hash of the inner flow: all of a flow goes to one of the receiver's workers.
    pub flow: u16,
    pub envelope: Envelope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Envelope {
    Clear { sender: DataId },
    Sealed { index: SessionIndex, counter: u64 },
}

/// Why a datagram has no header that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("shorter than a header")]
    Short,
    #[error("version {0} of the wire format is not known")]
    Version(u8),
    #[error("kind {0} of packet is not known")]
    Kind(u8),
    #[error("flags {0:#04x} are not known")]
    Flags(u8),
}

impl Header {
    /// Writes the header over the first bytes of `datagram`, which has room for it.
    pub fn write(&self, datagram: &mut [u8]) {
        let kind = match self.envelope {
            Envelope::Clear { sender } => {
                datagram[4..CLEAR_LEN].copy_from_slice(&sender.0.to_be_bytes());
                KIND_CLEAR
            }
            Envelope::Sealed { index, counter } => {
                datagram[4..8].copy_from_slice(&index.0.to_be_bytes());
                datagram[8..SEALED_LEN].copy_from_slice(&counter.to_be_bytes());
                KIND_SEALED
            }
        };
        datagram[0] = VERSION << 4 | kind;
        datagram[1] = if self.partial { FLAG_PARTIAL } else { 0 };
        datagram[FLOW_AT..4].copy_from_slice(&self.flow.to_be_bytes());
    }

    /// Reads the header at the front of a datagram.
    pub fn decode(datagram: &[u8]) -> Result<Self, HeaderError> {
        let (&first, _) = datagram.split_first().ok_or(HeaderError::Short)?;
        let (version, kind) = (first >> 4, first & 0x0f);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        if kind != KIND_CLEAR && kind != KIND_SEALED {
            return Err(HeaderError::Kind(kind));
        }
        let &[_, flags, f0, f1, i0, i1, i2, i3] = datagram.first_chunk().ok_or(HeaderError::Short)?;
        // A flag changes what the rest means: without knowing how, it can't be delivered.
        if flags & !FLAG_PARTIAL != 0 {
            return Err(HeaderError::Flags(flags));
        }
        let id = u32::from_be_bytes([i0, i1, i2, i3]);
        let envelope = if kind == KIND_CLEAR {
            Envelope::Clear { sender: DataId(id) }
        } else {
            let counter = datagram[CLEAR_LEN..].first_chunk().ok_or(HeaderError::Short)?;
            Envelope::Sealed { index: SessionIndex(id), counter: u64::from_be_bytes(*counter) }
        };
        Ok(Self { partial: flags & FLAG_PARTIAL != 0, flow: u16::from_be_bytes([f0, f1]), envelope })
    }
}

/// Bytes of a clear packet's header, of a sealed one's.
pub const CLEAR_LEN: usize = 8;
pub const SEALED_LEN: usize = 16;
/// Where the flow's two bytes are, in every kind of data packet.
pub const FLOW_AT: usize = 2;
const VERSION: u8 = 1;
const KIND_CLEAR: u8 = 1;
const KIND_SEALED: u8 = 2;
const FLAG_PARTIAL: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_known_is_told_apart() {
        assert_eq!(Header::decode(&[]), Err(HeaderError::Short));
        assert_eq!(Header::decode(&[0x11; 7]), Err(HeaderError::Short));
        assert_eq!(Header::decode(&[0x12, 0, 0, 0, 0, 0, 0, 0, 0]), Err(HeaderError::Short));
        assert_eq!(Header::decode(&[0; 8]), Err(HeaderError::Version(0)));
        assert_eq!(Header::decode(&[0x21; 8]), Err(HeaderError::Version(2)));
        assert_eq!(Header::decode(&[0x1f; 8]), Err(HeaderError::Kind(15)));
        assert_eq!(Header::decode(&[0x11, 2, 0, 0, 0, 0, 0, 0]), Err(HeaderError::Flags(2)));
    }

    #[test]
    fn the_wire_format_is_what_the_picture_says() {
        let mut bytes = [0; SEALED_LEN];
        let clear = Envelope::Clear { sender: DataId(0x0405_0607) };
        Header { partial: true, flow: 0x0203, envelope: clear }.write(&mut bytes);
        assert_eq!(bytes[..CLEAR_LEN], [0x11, 1, 2, 3, 4, 5, 6, 7]);
        let sealed = Envelope::Sealed { index: SessionIndex(0x0405_0607), counter: 0x08090a0b_0c0d0e0f };
        Header { partial: false, flow: 0x0203, envelope: sealed }.write(&mut bytes);
        assert_eq!(bytes, [0x12, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    }

    proptest! {
        #[test]
        fn a_header_reads_back(partial: bool, flow: u16, id: u32, counter in any::<Option<u64>>(), inner: Vec<u8>) {
            let envelope = match counter {
                Some(counter) => Envelope::Sealed { index: SessionIndex(id), counter },
                None => Envelope::Clear { sender: DataId(id) },
            };
            let header = Header { partial, flow, envelope };
            let len = if counter.is_some() { SEALED_LEN } else { CLEAR_LEN };
            let mut datagram = [&vec![0; len][..], &inner].concat();
            header.write(&mut datagram);
            prop_assert_eq!(Header::decode(&datagram), Ok(header));
            prop_assert_eq!(&datagram[len..], &inner[..]);
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            if let Ok(header) = Header::decode(&bytes) {
                let mut again = bytes.clone();
                header.write(&mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }
}
