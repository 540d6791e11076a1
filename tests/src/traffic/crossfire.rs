//! Every pod sends every other numbered datagrams; each knows what it should get, and from whom.
use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use crate::pod::Pod;

/// Datagrams under way.
pub struct Crossfire {
    stop: Arc<AtomicBool>,
    hits: Arc<AtomicU64>,
    senders: Vec<JoinHandle<u64>>,
    receivers: Vec<JoinHandle<anyhow::Result<()>>>,
}

/// What was sent, and what of it arrived where it should, unharmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hits {
    pub sent: u64,
    pub received: u64,
}

impl Crossfire {
    /// Begins between pods that have IPv4 addresses, which they must keep.
    pub fn start(pods: &[Arc<Pod>]) -> anyhow::Result<Self> {
        let all: Arc<[IpAddr]> = pods.iter().map(|pod| pod.address()).collect::<Result<_, _>>()?;
        let (stop, hits) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for (me, pod) in pods.iter().enumerate() {
            let open = || Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?);
            let socket = pod.netns().run(open).with_context(|| format!("listen in {}", pod.full_name()))?;
            socket.set_read_timeout(Some(TICK))?;
            let receiving = socket.try_clone()?;
            receivers.push(thread::spawn({
                let (all, stop, hits) = (all.clone(), stop.clone(), hits.clone());
                move || receive(&receiving, me, &all, &stop, &hits)
            }));
            let (all, stop) = (all.clone(), stop.clone());
            senders.push(thread::spawn(move || send(&socket, me, &all, &stop)));
        }
        Ok(Self { stop, hits, senders, receivers })
    }

    /// How many have arrived so far.
    pub fn received(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Fails once a pod has got what it should not have; [`Crossfire::finish`] says what.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.receivers.iter().any(JoinHandle::is_finished), "a pod got what was not for it");
        Ok(())
    }

    /// # Errors
    /// When one arrived changed, at another pod, or from another.
    pub fn finish(self) -> anyhow::Result<Hits> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.senders.into_iter().map(|sender| sender.join().expect("it does not panic")).sum();
        for receiver in self.receivers {
            receiver.join().expect("it does not panic")?;
        }
        Ok(Hits { sent, received: self.hits.load(Ordering::Relaxed) })
    }
}

fn send(socket: &UdpSocket, me: usize, all: &[IpAddr], stop: &AtomicBool) -> u64 {
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        for (to, address) in all.iter().enumerate().filter(|(to, _)| *to != me) {
            // While a node has no way, its kernel refuses: that counts as sent, and lost.
            let _ = socket.send_to(&datagram(me, to, sent), (*address, PORT));
            sent += 1;
        }
        thread::sleep(PAUSE);
    }
    sent
}

fn receive(
    socket: &UdpSocket,
    me: usize,
    all: &[IpAddr],
    stop: &AtomicBool,
    hits: &AtomicU64,
) -> anyhow::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((length, source)) => {
                check(&buffer[..length], source, me, all)?;
                hits.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("receive"),
        }
    }
    Ok(())
}

fn check(arrived: &[u8], source: SocketAddr, me: usize, all: &[IpAddr]) -> anyhow::Result<()> {
    let Some((&[from, to], rest)) = arrived.split_first_chunk() else {
        bail!("{source} sent {} bytes", arrived.len());
    };
    let (from, to) = (usize::from(from), usize::from(to));
    let number = rest.first_chunk().map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes));
    ensure!(to == me, "{} got number {number}, which was for {:?}", all[me], all.get(to));
    ensure!(all.get(from) == Some(&source.ip()), "{source} sent what {:?} did", all.get(from));
    ensure!(arrived == datagram(from, to, number), "number {number} of {source} arrived changed");
    Ok(())
}

/// From whom and to whom, the number, and bytes that follow from it: of all sizes up to what fits any path.
fn datagram(from: usize, to: usize, number: u64) -> Vec<u8> {
    let size = HEADER + (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize;
    let mut bytes = Vec::with_capacity(size);
    bytes.extend([from as u8, to as u8]);
    bytes.extend(number.to_be_bytes());
    bytes.extend(
        (HEADER..size).map(|at| ((at as u64 ^ number).wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8),
    );
    bytes
}

const HEADER: usize = 10;
/// The same in all pods, so that what goes to the wrong one is seen there.
const PORT: u16 = 7000;
/// Between two datagrams to one pod.
const PAUSE: Duration = Duration::from_millis(20);
const TICK: Duration = Duration::from_millis(100);
