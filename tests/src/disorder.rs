//! A switch that lets some packets wait, so that later ones overtake them.
//!
//! ```text
//!   n1 ──▶ ingress: 1 % ──▶ "late", a TAP device ──▶ held for up to some milliseconds ──▶ "late", a port of the bridge
//!              └── the others ──▶ bridge "wire" ──▶ n2
//! ```
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context;
use tokio::{sync::oneshot, time::sleep};
use tokio_tun::Tun;
use weft::linux::netlink::{Netlink, PortOptions};

use crate::{
    fault::nft,
    node::Node,
    underlay::{Underlay, WIRE},
};

/// Holds until it is dropped.
pub struct Disorder<'a> {
    underlay: &'a Underlay,
    delayed: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl<'a> Disorder<'a> {
    /// That many percent of what the nodes send come late. What is delayed must not be larger than the MTU, so the
    /// nodes must not send super-packets.
    pub fn start(underlay: &'a Underlay, nodes: &[&Node], percent: u8) -> anyhow::Result<Self> {
        let delayed = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let count = Arc::clone(&delayed);
        let netns = underlay.netns.try_clone()?;
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let outcome = (|| {
                nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
                let runtime = runtime?;
                let tap = runtime.block_on(plug())?;
                anyhow::Ok((runtime, tap))
            })();
            match outcome {
                Ok((runtime, tap)) => {
                    let _ = ready.send(Ok(()));
                    runtime.block_on(hold(tap, stopped, &count));
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        });
        is_ready.recv().context("the thread ended")?.context("make a device that delays packets")?;
        let chain = |node: &&Node| {
            let name = node.name();
            format!(
                "chain {name} {{ type filter hook ingress device \"{name}\" priority 0; \
                 numgen random mod 100 < {percent} fwd to \"{LATE}\"; }}"
            )
        };
        let chains: Vec<_> = nodes.iter().map(chain).collect();
        nft(&underlay.netns, &format!("table netdev {LATE} {{\n{}\n}}", chains.join("\n")))?;
        Ok(Self { underlay, delayed, stop: Some(stop), thread: Some(thread) })
    }

    /// Packets that came late so far.
    pub fn delayed(&self) -> u64 {
        self.delayed.load(Ordering::Relaxed)
    }
}

impl Drop for Disorder<'_> {
    fn drop(&mut self) {
        let removed = nft(&self.underlay.netns, &format!("delete table netdev {LATE}"));
        if let (Err(error), false) = (removed, thread::panicking()) {
            eprintln!("packets go on to come late: {error:#}");
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes the device a port of the bridge, which must not learn from it whose packets it delays.
async fn plug() -> anyhow::Result<Arc<Tun>> {
    let tap = Tun::builder().name(LATE).tap().build()?.remove(0);
    let netlink = Netlink::open()?;
    let (port, wire) = (netlink.link_by_name(LATE).await?.index, netlink.link_by_name(WIRE).await?.index);
    netlink.set_master(port, Some(wire)).await?;
    netlink.set_port(port, PortOptions::default()).await?;
    netlink.set_up(port, true).await?;
    Ok(Arc::new(tap))
}

async fn hold(tap: Arc<Tun>, mut stopped: oneshot::Receiver<()>, count: &AtomicU64) {
    let mut frame = vec![0; 1 << 16];
    loop {
        let length = tokio::select! {
            received = tap.recv(&mut frame) => received,
            _ = &mut stopped => return,
        };
        let Ok(length) = length else { return };
        let number = count.fetch_add(1, Ordering::Relaxed);
        let (tap, frame) = (Arc::clone(&tap), frame[..length].to_vec());
        tokio::spawn(async move {
            sleep(DELAYS[number as usize % DELAYS.len()]).await;
            // A full queue loses it, as a switch does.
            let _ = tap.send(&frame).await;
        });
    }
}

/// In turn: none but the way through this process, and more than a round trip.
const DELAYS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(3)];
const LATE: &str = "late";
