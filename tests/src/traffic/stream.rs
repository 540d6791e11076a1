//! TCP transfers with a checksum at both ends.
use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{
    namespace::Netns,
    wait::{self, Deadline},
};

/// A transfer under way.
pub struct Stream {
    what: String,
    shared: Arc<Shared>,
    sender: JoinHandle<anyhow::Result<Checksum>>,
    receiver: JoinHandle<anyhow::Result<Checksum>>,
    start: Instant,
}

/// A transfer that arrived as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transferred {
    pub bytes: u64,
    pub sha256: String,
    pub took: Duration,
}

impl Transferred {
    pub fn gigabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.took.as_secs_f64() / 1e9
    }
}

#[derive(Default)]
struct Shared {
    received: AtomicU64,
    finish: AtomicBool,
}

type Checksum = (u64, [u8; 32]);

/// Sends that many bytes and compares the checksums.
pub fn transfer(
    from: &Netns,
    to: &Netns,
    address: IpAddr,
    bytes: u64,
    within: Duration,
) -> anyhow::Result<Transferred> {
    Stream::start(from, to, address, bytes, within)?.join()
}

/// The address that a server in `server` sees when `from` connects to it.
pub fn seen_as(from: &Netns, server: &Netns, address: IpAddr, within: Duration) -> anyhow::Result<IpAddr> {
    let listener = listen(server, address)?;
    let target = listener.local_addr()?;
    let _connection = from
        .run(|| Ok(TcpStream::connect_timeout(&target, within)?))
        .with_context(|| format!("connect from {} to {target}", from.name()))?;
    let (_, client) = wait::until("a connection", within, || Ok(listener.accept()?))?;
    Ok(client.ip())
}

impl Stream {
    /// Starts sending to `to`, which has that address: so many bytes, or `u64::MAX` until [`Stream::finish`].
    ///
    /// `within` is the limit for the whole transfer.
    pub fn start(
        from: &Netns,
        to: &Netns,
        address: IpAddr,
        bytes: u64,
        within: Duration,
    ) -> anyhow::Result<Self> {
        let what = format!("TCP from {} to {} at {address}", from.name(), to.name());
        let deadline = Deadline::after(within);
        let listener = listen(to, address)?;
        let target = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let start = Instant::now();
        let connect = || {
            let socket = TcpStream::connect_timeout(&target, deadline.left()?)?;
            socket.set_write_timeout(Some(TICK))?;
            Ok(socket)
        };
        let socket = from.run(connect).with_context(|| what.clone()).context("connect")?;
        let receiver = thread::spawn({
            let shared = Arc::clone(&shared);
            move || receive(&listener, &shared.received, deadline)
        });
        let sender = thread::spawn({
            let shared = Arc::clone(&shared);
            move || send(socket, bytes, &shared.finish, deadline)
        });
        Ok(Self { what, shared, sender, receiver, start })
    }

    /// Bytes that have arrived so far.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Whether both ends are through, well or not.
    pub fn is_finished(&self) -> bool {
        self.sender.is_finished() && self.receiver.is_finished()
    }

    /// Waits until that many more bytes than now have arrived.
    pub fn advances(&self, bytes: u64, within: Duration) -> anyhow::Result<()> {
        let from = self.received();
        wait::until(&format!("{}: {bytes} more bytes", self.what), within, || {
            ensure!(!self.receiver.is_finished(), "the transfer has ended");
            let now = self.received();
            ensure!(now >= from.saturating_add(bytes), "{} arrived", now - from);
            Ok(())
        })
    }

    /// Has the sender stop where it is, and waits for the rest.
    pub fn finish(self) -> anyhow::Result<Transferred> {
        self.shared.finish.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for the end of a transfer of a given length.
    pub fn join(self) -> anyhow::Result<Transferred> {
        let what = self.what;
        let sent = self.sender.join().expect("the sender does not panic");
        let received = self.receiver.join().expect("the receiver does not panic");
        let took = self.start.elapsed();
        let (sent, received) = (
            sent.with_context(|| format!("{what}: send"))?,
            received.with_context(|| format!("{what}: receive"))?,
        );
        ensure!(sent.0 == received.0, "{what}: {} bytes were sent, {} arrived", sent.0, received.0);
        ensure!(sent.1 == received.1, "{what}: the bytes that arrived are not those that were sent");
        let sha256 = sent.1.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Transferred { bytes: sent.0, sha256, took })
    }
}

fn listen(at: &Netns, address: IpAddr) -> anyhow::Result<TcpListener> {
    let listener = at
        .run(|| Ok(TcpListener::bind(SocketAddr::new(address, 0))?))
        .with_context(|| format!("listen on {address} in {}", at.name()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn send(
    mut socket: TcpStream,
    bytes: u64,
    finish: &AtomicBool,
    deadline: Deadline,
) -> anyhow::Result<Checksum> {
    let mut block = pattern();
    let (mut sent, mut hash) = (0, Sha256::new());
    while sent < bytes && !finish.load(Ordering::Relaxed) {
        // Each block differs: one that is lost, doubled or out of order is noticed.
        block[..8].copy_from_slice(&sent.to_be_bytes());
        let length = block.len().min(usize::try_from(bytes - sent).unwrap_or(usize::MAX));
        let mut rest = &block[..length];
        hash.update(rest);
        while !rest.is_empty() {
            deadline.left().with_context(|| format!("after {sent} bytes"))?;
            match socket.write(rest) {
                Ok(0) => bail!("the connection was closed after {sent} bytes"),
                Ok(written) => rest = &rest[written..],
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error).with_context(|| format!("after {sent} bytes")),
            }
        }
        sent += length as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    Ok((sent, hash.finalize().into()))
}

fn receive(listener: &TcpListener, received: &AtomicU64, deadline: Deadline) -> anyhow::Result<Checksum> {
    let (mut socket, _) = wait::until("a connection", deadline.left()?, || Ok(listener.accept()?))?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(TICK))?;
    let mut buffer = vec![0; 256 << 10];
    let (mut count, mut hash) = (0, Sha256::new());
    loop {
        deadline.left().with_context(|| format!("after {count} bytes"))?;
        match socket.read(&mut buffer) {
            Ok(0) => return Ok((count, hash.finalize().into())),
            Ok(length) => {
                hash.update(&buffer[..length]);
                count += length as u64;
                received.store(count, Ordering::Relaxed);
            }
            Err(error) if is_pause(&error) => {}
            Err(error) => return Err(error).with_context(|| format!("after {count} bytes")),
        }
    }
}

fn is_pause(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Bytes without a short period.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // Marsaglia's xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..64 << 10).map(|_| next()).collect()
}

/// How often a blocked end looks at its deadline.
const TICK: Duration = Duration::from_millis(100);
