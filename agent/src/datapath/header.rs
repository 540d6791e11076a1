//! The header before every inner packet on the wire, in clear.
//!
//! ```text
//!  0         1        2                    4                      8
//!  ┌────┬────┬────────┬────────────────────┬──────────────────────┬───────────────
//!  │ver.│kind│ flags  │ segment information│ the sender's data_id │ inner packet …
//!  └────┴────┴────────┴────────────────────┴──────────────────────┴───────────────
//! ```
//!
//! Integers are big-endian. The kind tells the rest; versions and kinds that are not known are told apart, so that
//! each can be counted. A datagram that begins with a zero byte is of no version.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::DataId;

/// The header of a clear data packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// No flag has a meaning yet.
    pub flags: u8,
    /// How the inner packet is a part of a larger one; 0 for a packet that stands alone.
    pub segment: u16,
    /// Who sent it.
    pub sender: DataId,
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
}

impl Header {
    /// The header of a whole packet from `sender`.
    pub fn whole(sender: DataId) -> Self {
        Self { flags: 0, segment: 0, sender }
    }

    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let [s0, s1] = self.segment.to_be_bytes();
        let [d0, d1, d2, d3] = self.sender.0.to_be_bytes();
        [VERSION << 4 | KIND_CLEAR, self.flags, s0, s1, d0, d1, d2, d3]
    }

    /// Reads the header at the front of a datagram; gives the inner packet behind it, unread.
    pub fn decode(datagram: &[u8]) -> Result<(Self, &[u8]), HeaderError> {
        let (&first, _) = datagram.split_first().ok_or(HeaderError::Short)?;
        let (version, kind) = (first >> 4, first & 0x0f);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        if kind != KIND_CLEAR {
            return Err(HeaderError::Kind(kind));
        }
        let Some((&[_, flags, s0, s1, d0, d1, d2, d3], inner)) = datagram.split_first_chunk() else {
            return Err(HeaderError::Short);
        };
        let sender = DataId(u32::from_be_bytes([d0, d1, d2, d3]));
        Ok((Self { flags, segment: u16::from_be_bytes([s0, s1]), sender }, inner))
    }
}

/// Bytes of a clear packet's header.
pub const HEADER_LEN: usize = 8;
const VERSION: u8 = 1;
const KIND_CLEAR: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_known_is_told_apart() {
        assert_eq!(Header::decode(&[]), Err(HeaderError::Short));
        assert_eq!(Header::decode(&[0x11; 7]), Err(HeaderError::Short));
        assert_eq!(Header::decode(&[0; 8]), Err(HeaderError::Version(0)));
        assert_eq!(Header::decode(&[0x21; 8]), Err(HeaderError::Version(2)));
        assert_eq!(Header::decode(&[0x12; 8]), Err(HeaderError::Kind(2)));
    }

    #[test]
    fn the_wire_format_is_what_the_picture_says() {
        let header = Header { flags: 0, segment: 0x0203, sender: DataId(0x0405_0607) };
        assert_eq!(header.encode(), [0x11, 0, 2, 3, 4, 5, 6, 7]);
    }

    proptest! {
        #[test]
        fn a_header_reads_back(flags: u8, segment: u16, sender: u32, inner: Vec<u8>) {
            let header = Header { flags, segment, sender: DataId(sender) };
            let datagram = [&header.encode()[..], &inner].concat();
            prop_assert_eq!(Header::decode(&datagram), Ok((header, &inner[..])));
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            if let Ok((header, inner)) = Header::decode(&bytes) {
                prop_assert_eq!([&header.encode()[..], inner].concat(), bytes);
            }
        }
    }
}
