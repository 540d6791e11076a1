//! Super-packets: what the kernel would have cut into segments for a network card, whole through the TUN.
//!
//! ```text
//!   out   TUN ─ virtio header, up to 64 KiB ─▶ split ─▶ segments, each a whole inner packet ─▶ one GSO send
//!   in    GRO receive ─▶ inner packets ─▶ coalesce ─▶ super-packets with a virtio header ─▶ TUN
//! ```
//!
//! Every segment has headers of its own on the wire, so that each that arrives can be delivered. Its transport
//! checksum is left partial, the sum of the pseudo-header alone, as the kernel leaves it to a network card: the outer
//! checksum or the seal's tag protects it on the way, and the receiving kernel completes it where somebody looks.

pub mod checksum;
pub mod coalesce;
pub mod headers;
pub mod split;
#[cfg(test)]
mod tests;
pub mod virtio;

/// Bytes of the largest inner packet: IPv4's total length.
pub const MAX_PACKET: usize = 65_535;
