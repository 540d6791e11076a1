//! Small datagrams, in batches: as many as go, or at a rate.
use std::{
    io::ErrorKind,
    net::{Ipv4Addr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use super::Way;
use crate::linux::Batch;

/// A pair of sockets, one in each pod.
pub struct Flow {
    sender: UdpSocket,
    receiver: UdpSocket,
}

/// What became of a number of datagrams.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    pub sent: u64,
    pub received: u64,
    /// From the first to the last that was sent.
    pub took: Duration,
}

impl Trial {
    /// Datagrams per second, as they were really sent.
    pub fn rate(&self) -> f64 {
        self.sent as f64 / self.took.as_secs_f64()
    }

    /// Share of the datagrams that did not arrive.
    pub fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }
}

impl Flow {
    pub fn open(way: Way<'_>) -> anyhow::Result<Self> {
        let receiver = way.to.run(|| Ok(UdpSocket::bind((way.address, 0))?))?;
        // A receiver that gets no processor for a moment must not lose what has arrived.
        setsockopt(&receiver, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the receive buffer")?;
        receiver.set_read_timeout(Some(QUIET))?;
        let target = receiver.local_addr()?;
        let connect = || {
            let sender = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            sender.connect(target)?;
            Ok(sender)
        };
        Ok(Self { sender: way.from.run(connect)?, receiver })
    }

    /// Sends as fast as it goes; returns how many per second arrive in `time` after `warm_up`.
    pub fn flood(&self, warm_up: Duration, time: Duration) -> f64 {
        let (stop, received) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| self.receive(&stop, &received));
            scope.spawn(|| {
                let mut batch = Batch::new(BATCH, PAYLOAD);
                while !stop.load(Ordering::Relaxed) {
                    // Full queues are what a flood is about.
                    let _ = batch.send(&self.sender, BATCH);
                }
            });
            thread::sleep(warm_up);
            let (start, before) = (Instant::now(), received.load(Ordering::Relaxed));
            thread::sleep(time);
            let (took, after) = (start.elapsed(), received.load(Ordering::Relaxed));
            stop.store(true, Ordering::Relaxed);
            (after - before) as f64 / took.as_secs_f64()
        })
    }

    /// Sends for `time` at that many per second, if it can, and counts what arrives.
    pub fn trial(&self, rate: f64, time: Duration) -> Trial {
        let (stop, received) = (AtomicBool::new(false), AtomicU64::new(0));
        let (sent, took) = thread::scope(|scope| {
            scope.spawn(|| self.receive(&stop, &received));
            let outcome = self.pace(rate, time);
            stop.store(true, Ordering::Relaxed);
            outcome
        });
        Trial { sent, received: received.into_inner(), took }
    }

    fn pace(&self, rate: f64, time: Duration) -> (u64, Duration) {
        let mut batch = Batch::new(BATCH, PAYLOAD);
        let start = Instant::now();
        let mut sent = 0;
        loop {
            let elapsed = start.elapsed();
            if elapsed >= time {
                return (sent, elapsed);
            }
            let due = (elapsed.as_secs_f64() * rate) as u64;
            match due.saturating_sub(sent) {
                0 => thread::sleep(PAUSE),
                // What the sender's own queue refuses was not sent.
                count => sent += batch.send(&self.sender, count as usize).unwrap_or(0) as u64,
            }
        }
    }

    /// Counts until told to stop and nothing has come for a while.
    fn receive(&self, stop: &AtomicBool, received: &AtomicU64) {
        let mut batch = Batch::new(BATCH, PAYLOAD);
        loop {
            match batch.receive(&self.receiver) {
                Ok(count) => drop(received.fetch_add(count as u64, Ordering::Relaxed)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) if stop.load(Ordering::Relaxed) => return,
                Err(_) => {}
            }
        }
    }
}

/// Bytes of a datagram's payload.
const PAYLOAD: usize = 64;
/// Datagrams of one call.
const BATCH: usize = 64;
/// Between two looks at what is due; short enough for bursts below a batch.
const PAUSE: Duration = Duration::from_micros(100);
/// What takes longer to arrive counts as lost.
const QUIET: Duration = Duration::from_millis(50);
/// Bytes, by the kernel's own counting, which is several times the payload.
const RECEIVE_BUFFER: usize = 32 << 20;
