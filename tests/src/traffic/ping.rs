//! One ICMP echo.
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    process,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::{namespace::Netns, wait::Deadline};

/// Pings once; returns the round trip's time.
///
/// # Errors
/// When no answer comes in time, and at once when the network says that the address can't be reached.
pub fn ping(from: &Netns, to: IpAddr, within: Duration) -> anyhow::Result<Duration> {
    from.run(|| echo(to, within)).with_context(|| format!("ping {to} from {}", from.name()))
}

fn echo(to: IpAddr, within: Duration) -> anyhow::Result<Duration> {
    static SEQUENCE: AtomicU16 = AtomicU16::new(0);
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).context("open a raw socket")?;
    // Send, receive and time-outs work on any socket; only the address' port means nothing here.
    let socket = UdpSocket::from(raw);
    socket.connect(SocketAddr::new(to, 0)).with_context(|| format!("no route to {to}"))?;

    let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
    let request = request(to.is_ipv4(), process::id() as u16, sequence);
    let deadline = Deadline::after(within);
    let start = Instant::now();
    socket.send(&request).context("send")?;
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.left().with_context(|| format!("no answer within {within:?}"))?;
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut buffer) {
            Ok(length) if answers(to.is_ipv4(), &request, &buffer[..length]) => return Ok(start.elapsed()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => bail!("{error}"),
        }
    }
}

/// RFC 792, RFC 4443: type, code, checksum, identifier, sequence number, data.
fn request(v4: bool, id: u16, sequence: u16) -> Vec<u8> {
    let mut message = vec![if v4 { 8 } else { 128 }, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(b"weft-lab ping");
    if v4 {
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    message
}

/// IPv4's raw sockets deliver the IP header, IPv6's don't.
fn answers(v4: bool, request: &[u8], received: &[u8]) -> bool {
    let header = if v4 { received.first().map_or(0, |byte| usize::from(byte & 15) * 4) } else { 0 };
    let echo_reply = if v4 { 0 } else { 129 };
    received.get(header..).is_some_and(|message| {
        message.first() == Some(&echo_reply) && message.get(4..) == Some(&request[4..])
    })
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let sum: u32 = bytes.chunks(2).map(word).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_message_with_its_checksum_is_zero() {
        assert_eq!(checksum(&request(true, 4711, 3)), 0);
    }

    #[test]
    fn only_the_reply_to_this_request_counts() {
        let request = request(true, 1, 2);
        let mut reply = vec![0x45; 20];
        reply.extend(&request);
        assert!(!answers(true, &request, &reply), "the request itself is seen on loopback");
        reply[20] = 0;
        assert!(answers(true, &request, &reply));
        reply[27] = 9;
        assert!(!answers(true, &request, &reply));
        assert!(!answers(true, &request, &[]));
    }
}
