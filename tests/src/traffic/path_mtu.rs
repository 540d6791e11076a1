//! Packets that may not be fragmented, and what the network says about them.
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::errno::Errno;

use crate::{linux, namespace::Netns, wait};

/// What a sender learned, in bytes of IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathMtu {
    /// The sender's own interface.
    pub interface: u32,
    /// What an ICMP error said of the path.
    pub path: u32,
    /// How long it took from the first packet that was too big.
    pub took: Duration,
}

/// Sends packets as big as the sender's interface allows, with DF, until one comes back as too big for the path.
///
/// # Errors
/// When no ICMP error arrives in time: then the path takes them or swallows them.
pub fn path_mtu(from: &Netns, interface: &str, to: IpAddr, within: Duration) -> anyhow::Result<PathMtu> {
    let interface = from.links(async |links| links.mtu_of(interface).await)?;
    from.run(|| probe(interface, to, within))
        .with_context(|| format!("path MTU from {} to {to}", from.name()))
}

fn probe(interface: u32, to: IpAddr, within: Duration) -> anyhow::Result<PathMtu> {
    let (any, headers): (SocketAddr, u32) =
        if to.is_ipv4() { ("0.0.0.0:0".parse()?, 20 + 8) } else { ("[::]:0".parse()?, 40 + 8) };
    let socket = UdpSocket::bind(any)?;
    socket.connect(SocketAddr::new(to, DISCARD))?;
    linux::forbid_fragmentation(&socket).context("forbid fragmentation")?;
    let packet = vec![0; (interface - headers) as usize];
    let start = Instant::now();
    wait::until("an ICMP error for a packet that is too big", within, || {
        match socket.send(&packet) {
            Err(error) if error.raw_os_error() == Some(Errno::EMSGSIZE as i32) => {}
            // Nobody listens on the port, which the other end may say.
            Err(error) if error.kind() != ErrorKind::ConnectionRefused => return Err(error.into()),
            _ => {}
        }
        match linux::path_mtu(&socket).context("read the path's MTU")? {
            path if path < interface => Ok(PathMtu { interface, path, took: start.elapsed() }),
            path => bail!("packets of {path} bytes raise no error"),
        }
    })
}

/// RFC 863: whatever arrives there is thrown away.
const DISCARD: u16 = 9;
