//! TCP streams at full speed.
use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::socket::{setsockopt, sockopt::TcpCongestion};

use super::{Way, processor};
use crate::wait;

/// What arrived between two moments, and what it cost.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    pub bytes: u64,
    pub took: Duration,
    /// Of all processors together.
    pub busy: Duration,
}

impl Moved {
    pub fn gigabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.took.as_secs_f64()
    }

    pub fn seconds_per_gigabyte(&self) -> f64 {
        self.busy.as_secs_f64() / (self.bytes as f64 * 1e-9)
    }
}

/// Sends over so many connections at once, and looks at what arrives in `time` after `warm_up`.
pub fn tcp(way: Way<'_>, streams: usize, warm_up: Duration, time: Duration) -> anyhow::Result<Moved> {
    let connect = || connect(way).with_context(|| format!("connect to {}", way.address));
    let pairs: Vec<_> = (0..streams).map(|_| connect()).collect::<Result<_, _>>()?;
    let received = AtomicU64::new(0);
    let moved = thread::scope(|scope| {
        for (sender, receiver) in &pairs {
            scope.spawn(|| send(sender));
            scope.spawn(|| receive(receiver, &received));
        }
        let moved = watch(&received, warm_up, time);
        // Whoever is blocked wakes up, and nothing is left on its way.
        for socket in pairs.iter().flat_map(|(sender, receiver)| [receiver, sender]) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        moved
    })?;
    ensure!(moved.bytes > 0, "nothing arrived in {time:?} over {streams} TCP streams");
    Ok(moved)
}

fn watch(received: &AtomicU64, warm_up: Duration, time: Duration) -> anyhow::Result<Moved> {
    let look = || anyhow::Ok((Instant::now(), received.load(Ordering::Relaxed), processor::busy()?));
    thread::sleep(warm_up);
    let (start, bytes_before, busy_before) = look()?;
    thread::sleep(time);
    let (end, bytes, busy) = look()?;
    Ok(Moved { bytes: bytes - bytes_before, took: end - start, busy: busy.saturating_sub(busy_before) })
}

fn connect(way: Way<'_>) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = way.to.run(|| Ok(TcpListener::bind((way.address, 0))?))?;
    listener.set_nonblocking(true)?;
    let target: SocketAddr = listener.local_addr()?;
    let sender = way.from.run(|| Ok(TcpStream::connect_timeout(&target, WITHIN)?))?;
    // A machine's default may be another, and would be what is measured.
    setsockopt(&sender, TcpCongestion, &"cubic".into()).context("choose cubic")?;
    let (receiver, _) = wait::until("a connection", WITHIN, || Ok(listener.accept()?))?;
    receiver.set_nonblocking(false)?;
    Ok((sender, receiver))
}

/// Until the socket is shut down.
fn send(mut socket: &TcpStream) {
    let block = vec![0x55; BLOCK];
    while socket.write_all(&block).is_ok() {}
}

fn receive(mut socket: &TcpStream, received: &AtomicU64) {
    let mut block = vec![0; BLOCK];
    while let Ok(length @ 1..) = socket.read(&mut block) {
        received.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// Bytes of one call.
const BLOCK: usize = 256 << 10;
/// A connection is made in less than this, or not at all.
const WITHIN: Duration = Duration::from_secs(5);
