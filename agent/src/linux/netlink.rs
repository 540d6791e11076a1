//! Links, addresses, routes and neighbours over rtnetlink: small types in, small types out.
//!
//! ```text
//!   Netlink::open() ─▶ socket of the calling thread's network namespace, for good
//!        │ request, acknowledgement            │ dump
//!   create_veth, set_up, add_route …       links, addresses, routes, neighbours, fdb
//! ```
//!
//! Nothing here decides anything; adding what exists fails with [`NetlinkError::is_exists`], removing or looking at
//! what is gone with [`NetlinkError::is_gone`].

mod address;
#[cfg(feature = "agent")]
mod conntrack;
mod link;
#[cfg(feature = "agent")]
mod monitor;
mod neighbour;
mod route;

pub use address::{Address, AddressFlags};
#[cfg(feature = "agent")]
pub use conntrack::{Connection, Conntrack};
pub use link::{BridgeOptions, Link, LinkKind, PortOptions, VethPair};
#[cfg(feature = "agent")]
pub use monitor::{AddressMonitor, Event, Monitor};
pub use neighbour::{FdbEntry, Neighbour};
pub use route::{Family, RTPROT_WEFT, Route, RouteKind, RouteScope};

use futures_util::StreamExt;
use rtnetlink::{
    Handle,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::RouteNetlinkMessage,
};
use std::io;

/// A route netlink socket. Clones share it. It speaks to the namespace it was opened in, whichever thread uses it.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

/// What failed, on which object, and the kernel's errno.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {errno}")]
pub struct NetlinkError {
    action: String,
    errno: io::Error,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace. Needs a tokio runtime, which then serves the socket
    /// until the last clone is dropped.
    ///
    /// # Errors
    /// The kernel has no route netlink, or descriptors ran out.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|errno| NetlinkError { action: "open a route netlink socket".into(), errno })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Sends one request and waits for its acknowledgement; `action` words the error.
    async fn request(
        &self,
        message: RouteNetlinkMessage,
        mode: Mode,
        action: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | mode.flags();
        self.exchange(message, |_| {}).await.map_err(|errno| NetlinkError { action: action(), errno })
    }

    /// Asks for one object or, with `dump`, for all of them.
    async fn query<T>(
        &self,
        message: RouteNetlinkMessage,
        dump: bool,
        mut take: impl FnMut(RouteNetlinkMessage) -> Option<T>,
        action: impl FnOnce() -> String,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { NLM_F_ACK };
        let mut found = Vec::new();
        self.exchange(message, |answer| found.extend(take(answer)))
            .await
            .map_err(|errno| NetlinkError { action: action(), errno })?;
        Ok(found)
    }

    async fn exchange(
        &self,
        message: NetlinkMessage<RouteNetlinkMessage>,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut answers = self
            .handle
            .clone()
            .request(message)
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the netlink socket is closed"))?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => each(inner),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                _ => {}
            }
        }
        // The acknowledgement, or the end of the list, closes the stream.
        Ok(())
    }
}

impl NetlinkError {
    /// What should be made is there already.
    pub fn is_exists(&self) -> bool {
        self.errno.raw_os_error() == Some(libc::EEXIST)
    }

    /// What was to be removed, changed or looked at is not there (any more).
    pub fn is_gone(&self) -> bool {
        matches!(
            self.errno.raw_os_error(),
            Some(libc::ENODEV | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENXIO)
        )
    }

    /// Why, without what.
    pub fn errno(&self) -> &io::Error {
        &self.errno
    }
}

/// What the kernel does when the object is, or is not, there already.
#[derive(Clone, Copy)]
enum Mode {
    /// Make it; fail if it exists.
    Create,
    /// Make it, or overwrite what has the same key.
    Replace,
    /// Change or remove it; fail if it does not exist.
    Existing,
}

impl Mode {
    fn flags(self) -> u16 {
        match self {
            Self::Create => NLM_F_CREATE | NLM_F_EXCL,
            Self::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Self::Existing => 0,
        }
    }
}
