//! The words of Weft as types: parsed once at the edge, with `Display` and `FromStr`, free of any other module.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod attachment;
mod endpoint;
mod key;
mod mac;
mod name;
mod universe;

use std::fmt;

pub use attachment::{AttachmentKey, InvalidAttachment, PodRef, VethAlias};
pub use endpoint::{CONTROL_PORT, Endpoint, InvalidPeerAddress, PeerAddress};
pub use ipnet::IpNet as Prefix;
pub use key::DataKey;
#[cfg(feature = "agent")]
pub use key::DataSecret;
pub use mac::{InvalidMac, Mac};
pub use name::{InvalidPeerName, PeerName};
pub use universe::{InvalidUniverse, LEAST_MTU, Universe};

/// Orders the restarts of one agent: max(stored + 1, wall clock in µs), taken at each start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// What is beyond is forged: it would leave nothing to outbid it with.
    pub const MAX: Self = Self(u64::MAX / 2);
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a peer in the data path's clear packets; drawn at random for each incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataId(pub u32);

/// Names a session in the packets to its receiver, who drew it at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionIndex(pub u32);

impl fmt::Display for SessionIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Each node's one bridge, and its one TUN device.
pub const BRIDGE: &str = "weft";
pub const TUN: &str = "weft0";
/// The nftables table of network policies, of family `inet`.
pub const POLICY_TABLE: &str = "weft-policy";
/// Bytes that clear encapsulation adds to an inner packet over IPv4: outer IP 20 + UDP 8 + header 8.
pub const CLEAR_OVERHEAD: u16 = 36;
/// Bytes that sealing adds to an inner packet over IPv4: outer IP 20 + UDP 8 + header 16 + tag 16.
pub const SEALED_OVERHEAD: u16 = 60;
/// An outer UDP message carries so many bytes at most; the kernel cuts it into datagrams.
pub const LARGEST_MESSAGE: usize = 65_507;
/// An IPv6 underlay's header is that much larger than IPv4's.
pub const IPV6_EXTRA: u16 = 20;
