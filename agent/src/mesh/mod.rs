//! Who is in the network.

pub mod gossip;
