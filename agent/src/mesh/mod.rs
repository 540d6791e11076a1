//! Who is in the network.
