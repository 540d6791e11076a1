//! Numbered datagrams at a rate, each of which is checked where it arrives.
use std::{
    collections::HashSet,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use crate::namespace::Netns;

/// Datagrams under way.
pub struct Datagrams {
    what: String,
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sender: JoinHandle<anyhow::Result<u64>>,
    receiver: JoinHandle<anyhow::Result<u64>>,
}

/// What was sent at which rate, and what of it arrived, all of it unharmed and nothing twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    pub sent: u64,
    pub received: u64,
}

impl Arrived {
    /// Share of the datagrams that did not arrive.
    pub fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }
}

/// How they are sent.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    pub per_second: u64,
    /// Bytes of each, at least 8.
    pub size: usize,
    /// So many with one call, which the kernel cuts (`UDP_SEGMENT`).
    pub at_once: usize,
}

impl Datagrams {
    /// Starts sending to `to`, which has that address, until [`Datagrams::finish`].
    pub fn start(from: &Netns, to: &Netns, address: IpAddr, manner: Manner) -> anyhow::Result<Self> {
        let what = format!("UDP from {} to {} at {address}", from.name(), to.name());
        let receiving = to.run(|| Ok(UdpSocket::bind((address, 0))?)).with_context(|| what.clone())?;
        setsockopt(&receiving, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .context("enlarge the receive buffer")?;
        receiving.set_read_timeout(Some(QUIET))?;
        let target = receiving.local_addr()?;
        let any: IpAddr =
            if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let connect = || {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(target)?;
            Ok(socket)
        };
        let sending = from.run(connect).with_context(|| what.clone())?;
        if manner.at_once > 1 {
            setsockopt(&sending, sockopt::UdpGsoSegment, &(manner.size as i32)).context("UDP_SEGMENT")?;
        }
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let receiver = thread::spawn({
            let (stop, received) = (Arc::clone(&stop), Arc::clone(&received));
            move || receive(&receiving, manner.size, &stop, &received)
        });
        let sender = thread::spawn({
            let stop = Arc::clone(&stop);
            move || send(&sending, manner, &stop)
        });
        Ok(Self { what, stop, received, sender, receiver })
    }

    /// How many have arrived so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Stops, and takes in what is still on its way.
    ///
    /// # Errors
    /// When one arrived changed, or twice.
    pub fn finish(self) -> anyhow::Result<Arrived> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("the sender does not panic");
        let received = self.receiver.join().expect("the receiver does not panic");
        let what = self.what;
        Ok(Arrived {
            sent: sent.with_context(|| format!("{what}: send"))?,
            received: received.with_context(|| format!("{what}: receive"))?,
        })
    }
}

fn send(socket: &UdpSocket, manner: Manner, stop: &AtomicBool) -> anyhow::Result<u64> {
    let start = Instant::now();
    let (mut sent, mut batch) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * manner.per_second as f64) as u64;
        if sent + manner.at_once as u64 > due {
            thread::sleep(TICK);
            continue;
        }
        batch.clear();
        (sent..sent + manner.at_once as u64).for_each(|number| batch.extend(datagram(number, manner.size)));
        match socket.send(&batch) {
            Ok(_) => {}
            // A full queue, or a node whose agent is being restarted: what is lost is counted as sent.
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error).with_context(|| format!("after {sent} datagrams")),
        }
        sent += manner.at_once as u64;
    }
    Ok(sent)
}

fn receive(socket: &UdpSocket, size: usize, stop: &AtomicBool, received: &AtomicU64) -> anyhow::Result<u64> {
    let (mut seen, mut buffer) = (HashSet::new(), vec![0; 1 << 16]);
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let arrived = &buffer[..length];
                let number = arrived.first_chunk().map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes));
                ensure!(arrived == datagram(number, size), "datagram {number} arrived changed");
                ensure!(seen.insert(number), "datagram {number} arrived twice");
                received.store(seen.len() as u64, Ordering::Relaxed);
            }
            Err(error) if is_transient(&error) && stop.load(Ordering::Relaxed) => {
                return Ok(seen.len() as u64);
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Its number, and bytes that follow from it.
fn datagram(number: u64, size: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    bytes.extend(number.to_be_bytes());
    while bytes.len() < size {
        // Marsaglia's xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_be_bytes());
    }
    bytes.truncate(size);
    bytes
}

fn is_transient(error: &std::io::Error) -> bool {
    use ErrorKind::{ConnectionRefused, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable};
    matches!(
        error.kind(),
        ErrorKind::WouldBlock
            | ErrorKind::TimedOut
            | Interrupted
            | ConnectionRefused
            | HostUnreachable
            | NetworkUnreachable
            | NetworkDown
    ) || error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32)
}

/// Between two looks at what is due.
const TICK: Duration = Duration::from_micros(500);
/// After so long a silence nothing is on its way any more.
const QUIET: Duration = Duration::from_millis(300);
const RECEIVE_BUFFER: usize = 16 << 20;
