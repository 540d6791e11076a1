//! A way between a client and a server that can be made bad: it refuses, goes silent, is slow, or is cut.
use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    time::sleep,
};

use crate::background::Background;

/// Runs until it is dropped.
pub struct Relay {
    address: SocketAddr,
    way: watch::Sender<Way>,
    calls: Arc<AtomicU64>,
    _background: Background,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quality {
    Good,
    /// Connections end as soon as they begin; those that stand stay.
    Refusing,
    /// Nothing goes through any more, and nobody is told.
    Silent,
    /// A few bytes at a time, with pauses.
    Slow,
}

#[derive(Clone, Copy, Debug)]
struct Way {
    quality: Quality,
    /// Raised to cut what stands.
    cuts: u64,
}

impl Relay {
    /// Passes what comes to a listener, which may be in another network namespace, on to a server in the caller's.
    pub fn start(listener: TcpListener, server: SocketAddr) -> anyhow::Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let (way, seen) = watch::channel(Way { quality: Quality::Good, cuts: 0 });
        let calls = Arc::<AtomicU64>::default();
        let count = calls.clone();
        let accept = async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (client, _) = listener.accept().await?;
                count.fetch_add(1, Ordering::Relaxed);
                if seen.borrow().quality != Quality::Refusing {
                    tokio::spawn(pass(client, server, seen.clone()));
                }
            }
        };
        Ok(Self { address, way, calls, _background: Background::run(accept)? })
    }

    /// On a free port of 127.0.0.1, in the caller's network namespace.
    pub fn local(server: SocketAddr) -> anyhow::Result<Self> {
        Self::start(TcpListener::bind("127.0.0.1:0").context("listen")?, server)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, quality: Quality) {
        self.way.send_modify(|way| way.quality = quality);
    }

    /// How many connections have been begun, refused ones too.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Whether a connection stands.
    pub fn is_used(&self) -> bool {
        // One watches for all that are to come.
        self.way.receiver_count() > 1
    }

    /// Ends all connections that stand.
    pub fn cut(&self) {
        self.way.send_modify(|way| way.cuts += 1);
    }

    /// Ends all connections, and refuses new ones.
    pub fn close(&self) {
        self.set(Quality::Refusing);
        self.cut();
    }
}

async fn pass(client: TcpStream, server: SocketAddr, mut way: watch::Receiver<Way>) -> std::io::Result<()> {
    let server = TcpStream::connect(server).await?;
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let cuts = way.borrow().cuts;
    let there = pump(from_client, to_server, way.clone());
    let back = pump(from_server, to_client, way.clone());
    tokio::select! {
        ended = async { tokio::try_join!(there, back) } => ended.map(drop),
        _ = way.wait_for(|way| way.cuts != cuts) => Ok(()),
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut way: watch::Receiver<Way>,
) -> std::io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let slow = way.borrow().quality == Quality::Slow;
        let room = if slow { FEW } else { buffer.len() };
        let length = from.read(&mut buffer[..room]).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        if slow {
            sleep(PAUSE).await;
        }
        if way.wait_for(|way| way.quality != Quality::Silent).await.is_err() {
            return Ok(());
        }
        to.write_all(&buffer[..length]).await?;
    }
}

/// Bytes at a time on a slow way.
const FEW: usize = 256;
const PAUSE: Duration = Duration::from_millis(2);
