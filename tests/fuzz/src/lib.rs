//! Everything in Weft that decodes bytes from outside, one function for each way in: whatever the bytes, it returns.
//!
//! ```text
//!   bin/*.rs ──── libFuzzer makes inputs up ────────────┐
//!                                                       ├──▶ packet, handshake, gossip … (&[u8]): panics, or not
//!   corpus/*/* ── kept inputs, by tests/corpus ─────────┘
//! ```
//! A function does not only decode. Where it takes its bytes for a script, of frames, merges or damaged datagrams, it also
//! holds the decoder to what must be true whatever came: that two orders of merging agree, that no address has two users.

pub mod arguments;
pub mod certificate;
pub mod coalesce;
pub mod deed;
pub mod firewall;
pub mod gossip;
pub mod handshake;
pub mod local;
pub mod packet;
pub mod probe;
pub mod record;
pub mod ring;
mod script;
pub mod shim;
pub mod split;
pub mod state;
pub mod store;
pub mod words;

/// A way in, by its name: that of its program and of its folder of inputs.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 17] = [
    ("arguments", arguments::run),
    ("certificate", certificate::run),
    ("coalesce", coalesce::run),
    ("deed", deed::run),
    ("firewall", firewall::run),
    ("gossip", gossip::run),
    ("handshake", handshake::run),
    ("local", local::run),
    ("packet", packet::run),
    ("probe", probe::run),
    ("record", record::run),
    ("ring", ring::run),
    ("shim", shim::run),
    ("split", split::run),
    ("state", state::run),
    ("store", store::run),
    ("words", words::run),
];
