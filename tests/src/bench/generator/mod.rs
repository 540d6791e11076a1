//! Traffic from one pod to another: blocking threads and large buffers, so that the generator is not what is measured.
//!
//! The sockets are opened inside the pods' namespaces; the threads that use them need not be there.
mod exchange;
mod processor;
mod tcp;
mod udp;

use std::net::IpAddr;

pub use exchange::exchange;
pub use tcp::tcp;
pub use udp::Flow;

use crate::namespace::Netns;

/// From where to where.
#[derive(Clone, Copy)]
pub struct Way<'a> {
    pub from: &'a Netns,
    pub to: &'a Netns,
    /// The receiving pod's address.
    pub address: IpAddr,
}
