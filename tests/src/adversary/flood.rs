//! One datagram over and over, at a steady rate.
use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::{
    linux::{self, Batch},
    namespace::Netns,
};

/// Goes on until it is stopped or dropped.
pub struct Flood {
    sent: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    start: Instant,
    thread: Option<thread::JoinHandle<()>>,
}

impl Flood {
    /// From one address in a network namespace, so many a second.
    pub fn start(from: &Netns, to: SocketAddr, datagram: &[u8], rate: u32) -> anyhow::Result<Self> {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let connect = || {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(to)?;
            Ok(socket)
        };
        let socket = from.run(connect).with_context(|| format!("flood {to} from {}", from.name()))?;
        let (sent, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let start = Instant::now();
        let thread = thread::spawn({
            let (sent, over, datagram) = (Arc::clone(&sent), Arc::clone(&over), datagram.to_vec());
            move || {
                // It stands for another machine, whose processor is its own. Without the right to it, it is slower.
                let _ = linux::first_in_line();
                pour(&socket, &datagram, rate, &sent, &over);
            }
        });
        Ok(Self { sent, over, start, thread: Some(thread) })
    }

    /// Ends it; gives how many datagrams went out a second.
    pub fn stop(mut self) -> f64 {
        self.end();
        self.sent.load(Relaxed) as f64 / self.start.elapsed().as_secs_f64()
    }

    fn end(&mut self) {
        self.over.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic was told on stderr already.
            let _ = thread.join();
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.end();
    }
}

fn pour(socket: &UdpSocket, datagram: &[u8], rate: u32, sent: &AtomicU64, over: &AtomicBool) {
    let mut batch = Batch::of(BATCH, datagram);
    let start = Instant::now();
    while !over.load(Relaxed) {
        let due = (start.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        let missing = due.saturating_sub(sent.load(Relaxed)).min(BATCH as u64);
        if missing == 0 {
            thread::sleep(PAUSE);
            continue;
        }
        // What the kernel has no room for comes with the next batch.
        sent.fetch_add(batch.send(socket, missing as usize).unwrap_or(0) as u64, Relaxed);
    }
}

/// Datagrams in one call.
const BATCH: usize = 64;
const PAUSE: Duration = Duration::from_micros(300);
