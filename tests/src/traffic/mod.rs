//! Probes that need no tools in the namespaces: each opens its sockets on threads inside them, and has a deadline.
mod crossfire;
mod datagrams;
mod path_mtu;
mod ping;
mod stream;
mod udp;

pub use crossfire::{Crossfire, Hits};
pub use datagrams::{Arrived, Datagrams, Manner};
pub use path_mtu::{PathMtu, path_mtu};
pub use ping::ping;
pub use stream::{Stream, Transferred, seen_as, transfer};
pub use udp::udp_echo;
