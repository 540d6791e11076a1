//! A tap on a cable: hears every frame, both ways, and can say frames of its own, with whatever addresses.
use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use nix::sys::socket::{setsockopt, sockopt};

use crate::{linux, namespace::Netns};

/// Listens until it is dropped.
pub struct Wiretap {
    socket: Arc<UdpSocket>,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Vec<Vec<u8>>>,
    over: AtomicBool,
}

/// A frame that carries a UDP datagram over IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram(Vec<u8>);

impl Wiretap {
    /// On an interface of a network namespace. What passed before is not heard.
    pub fn on(netns: &Netns, interface: &str) -> anyhow::Result<Self> {
        let open = || Ok(linux::packet_socket(interface)?);
        let what = || format!("tap {interface} in {}", netns.name());
        let descriptor = netns.run(open).with_context(what)?;
        setsockopt(&descriptor, sockopt::RcvBufForce, &BUFFER).with_context(what)?;
        // Send, receive and time-outs work on any socket.
        let socket = Arc::new(UdpSocket::from(descriptor));
        socket.set_read_timeout(Some(TICK))?;
        let shared = Arc::<Shared>::default();
        let thread = thread::spawn({
            let (socket, shared) = (Arc::clone(&socket), Arc::clone(&shared));
            move || listen(&socket, &shared)
        });
        Ok(Self { socket, shared, thread: Some(thread) })
    }

    /// All frames so far, in order.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        self.heard().clone()
    }

    /// The UDP datagrams among them.
    pub fn datagrams(&self) -> Vec<Datagram> {
        self.heard().iter().filter_map(|frame| Datagram::parse(frame.clone())).collect()
    }

    /// Forgets what it has heard.
    pub fn clear(&self) {
        self.heard().clear();
    }

    /// Says a frame to who is at the end of the interface.
    pub fn say(&self, frame: &[u8]) -> anyhow::Result<()> {
        self.socket.send(frame).context("say a frame")?;
        Ok(())
    }

    fn heard(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Wiretap {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic was told on stderr already.
            let _ = thread.join();
        }
    }
}

impl Datagram {
    /// None for any other frame.
    fn parse(frame: Vec<u8>) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        let is_udp = frame[12..ETHERNET] == [8, 0] && *ip.first()? == 0x45 && *ip.get(9)? == 17;
        let datagram = Self(frame);
        (is_udp && datagram.0.len() >= HEADERS && datagram.0.len() >= ETHERNET + datagram.ip_len())
            .then_some(datagram)
    }

    pub fn source(&self) -> SocketAddrV4 {
        self.endpoint(ETHERNET + 12, ETHERNET + IP)
    }

    pub fn destination(&self) -> SocketAddrV4 {
        self.endpoint(ETHERNET + 16, ETHERNET + IP + 2)
    }

    /// Bytes of the IP packet.
    pub fn ip_len(&self) -> usize {
        usize::from(self.number(ETHERNET + 2))
    }

    pub fn payload(&self) -> &[u8] {
        &self.0[HEADERS..ETHERNET + self.ip_len()]
    }

    /// The frame with another payload, and from another address.
    pub fn forged(&self, source: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
        let mut frame = [&self.0[..HEADERS], payload].concat();
        let mut put = |at: usize, bytes: &[u8]| frame[at..at + bytes.len()].copy_from_slice(bytes);
        put(ETHERNET + 2, &((IP + UDP + payload.len()) as u16).to_be_bytes());
        put(ETHERNET + 10, &[0, 0]);
        put(ETHERNET + 12, &source.ip().octets());
        put(ETHERNET + IP, &source.port().to_be_bytes());
        put(ETHERNET + IP + 4, &((UDP + payload.len()) as u16).to_be_bytes());
        // Over IPv4 a datagram may go without a checksum (RFC 768).
        put(ETHERNET + IP + 6, &[0, 0]);
        let sum = checksum(&frame[ETHERNET..ETHERNET + IP]).to_be_bytes();
        frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum);
        frame
    }

    /// The frame with another payload.
    pub fn with(&self, payload: &[u8]) -> Vec<u8> {
        self.forged(self.source(), payload)
    }

    fn endpoint(&self, address: usize, port: usize) -> SocketAddrV4 {
        let octets: [u8; 4] = self.0[address..address + 4].try_into().expect("four bytes");
        SocketAddrV4::new(Ipv4Addr::from(octets), self.number(port))
    }

    fn number(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }
}

fn listen(socket: &UdpSocket, shared: &Shared) {
    let mut buffer = vec![0; LARGEST];
    while !shared.over.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let mut heard = shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
                heard.push(buffer[..length].to_vec());
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // The interface is gone.
            Err(_) => return,
        }
    }
}

/// RFC 1071, of a whole number of words.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// Bytes of the headers.
const ETHERNET: usize = 14;
const IP: usize = 20;
const UDP: usize = 8;
const HEADERS: usize = ETHERNET + IP + UDP;
/// Bytes of the largest frame that a virtual cable carries.
const LARGEST: usize = (1 << 16) + ETHERNET;
/// Bytes that may wait to be heard.
const BUFFER: usize = 64 << 20;
/// How often it looks whether it is over.
const TICK: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_datagram_says_what_it_was_told_to() {
        let mut frame = vec![0; HEADERS];
        frame[12..14].copy_from_slice(&[8, 0]);
        (frame[ETHERNET], frame[ETHERNET + 9]) = (0x45, 17);
        frame[ETHERNET + 3] = 28;
        let empty = Datagram::parse(frame.clone()).unwrap();
        assert_eq!(empty.payload(), b"");
        let thief = "198.51.100.7:4000".parse().unwrap();
        let forged = Datagram::parse(empty.forged(thief, b"hello")).unwrap();
        assert_eq!((forged.source(), forged.payload(), forged.ip_len()), (thief, &b"hello"[..], 33));
        assert_eq!(checksum(&forged.0[ETHERNET..ETHERNET + IP]), 0);
        frame[ETHERNET + 9] = 6;
        assert_eq!(Datagram::parse(frame), None, "TCP");
        assert_eq!(Datagram::parse(vec![0; 20]), None);
    }
}
