//! Links over gRPC: the server, the caller, and the two halves of a stream.
//!
//! HTTP/2 over TLS 1.3 with certificates of both sides; in clear only where an agent runs with `--insecure`. This is the
//! one place that knows of TLS: what leaves it is a link with the names that the other end's certificate has.

use super::{
    dial::Target,
    link::{LinkId, QUEUE_FRAMES},
    wire::{Frame, mesh_client::MeshClient, mesh_server},
};
use crate::{
    identity::{self, Certificate},
    types::{PeerAddress, PeerName},
};
use anyhow::{Context as _, bail};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use std::{
    collections::BTreeMap,
    future::{Future, ready},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::io::InspectReader;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server, server::Connected},
};

/// What happens on the wire.
pub enum Event {
    Opened(Box<Opened>),
    DialFailed {
        target: Target,
        reason: String,
    },
    /// A caller could not prove who it is.
    TurnedAway {
        remote: SocketAddr,
        reason: String,
    },
    Frame {
        link: LinkId,
        frame: Frame,
    },
    Closed {
        link: LinkId,
        reason: String,
    },
}

/// A new link with both its halves.
pub struct Opened {
    pub link: LinkId,
    pub dialled: Option<Target>,
    pub remote: SocketAddr,
    /// Our own end's address.
    pub local: IpAddr,
    pub pulse: Pulse,
    /// None: in clear.
    pub credential: Option<Arc<Credential>>,
    pub frames: Streaming<Frame>,
    pub outgoing: mpsc::Sender<Frame>,
    /// Frames that have left since this was last looked at.
    pub left: Arc<AtomicUsize>,
    /// Keeps a connection that we made.
    pub channel: Option<Channel>,
}

/// When the other end of a connection was heard last, be it by an answer to a keep-alive.
#[derive(Clone, Debug)]
pub struct Pulse {
    since: Instant,
    /// Milliseconds after that.
    last: Arc<AtomicU64>,
}

/// What the other end of a link has proven.
#[derive(Debug)]
pub struct Credential {
    pub names: Vec<PeerName>,
    /// The leaf first.
    pub chain: Vec<CertificateDer<'static>>,
}

/// What servers and callers share.
#[derive(Clone)]
pub struct Wires {
    /// None: links are in clear.
    pub identity: Option<identity::task::Current>,
    pub events: mpsc::Sender<Event>,
    /// Notified when frames have left.
    pub progress: Arc<Notify>,
    pub next_link: Arc<AtomicU64>,
}

/// The sending half of a link: frames leave as fast as the network takes them.
pub struct Outgoing {
    frames: mpsc::Receiver<Frame>,
    left: Arc<AtomicUsize>,
    progress: Arc<Notify>,
    /// Of the connection that it came on, if we were called.
    _link: Option<Arc<()>>,
}

/// An accepted connection. It ends if no link comes of it in time, or none is left of it.
pub struct Guarded {
    stream: Duplex,
    caller: Caller,
    deadline: Pin<Box<Sleep>>,
    /// It had a link when it was last looked at.
    linked: bool,
    _place: Place,
}

#[derive(Clone)]
pub struct Caller {
    remote: SocketAddr,
    local: IpAddr,
    pulse: Pulse,
    credential: Option<Arc<Credential>>,
    /// Lives as long as any link of the connection.
    link: Arc<Mutex<Weak<()>>>,
}

/// Room for one more connection, in all and from its address.
struct Place {
    address: IpAddr,
    taken: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Wires {
    fn link(&self) -> (LinkId, mpsc::Sender<Frame>, Outgoing) {
        let id = LinkId(self.next_link.fetch_add(1, Ordering::Relaxed));
        let (tx, frames) = mpsc::channel(QUEUE_FRAMES);
        (id, tx, Outgoing { frames, left: Arc::default(), progress: self.progress.clone(), _link: None })
    }
}

#[tonic::async_trait]
impl mesh_server::Mesh for Wires {
    type LinkStream = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

    async fn link(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::LinkStream>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| Status::internal("the connection is not one of ours"))?;
        let (link, outgoing, mut stream) = self.link();
        stream._link = Some(caller.begin_link());
        let opened = Opened {
            link,
            dialled: None,
            remote: caller.remote,
            local: caller.local,
            pulse: caller.pulse.clone(),
            credential: caller.credential.clone(),
            frames: request.into_inner(),
            outgoing,
            left: stream.left.clone(),
            channel: None,
        };
        let stopped = |_| Status::unavailable("the agent is stopping");
        self.events.send(Event::Opened(Box::new(opened))).await.map_err(stopped)?;
        Ok(Response::new(Box::pin(stream.map(Ok))))
    }
}

/// Accepts connections, at most `limit` at a time; more wait in the kernel's queue. One address has at most a quarter of
/// the places, so that nobody alone keeps the others out: what it opens beyond is closed. The port is free when the
/// future is dropped.
pub fn accept(
    listener: TcpListener,
    limit: Arc<Semaphore>,
    wires: Wires,
) -> (impl Future<Output = ()> + Send, ReceiverStream<io::Result<Guarded>>) {
    let (tx, rx) = mpsc::channel(1);
    let (share, taken) = ((limit.available_permits() / 4).max(1), Arc::default());
    let accept = async move {
        let mut handshakes = JoinSet::new();
        loop {
            let next = async {
                let permit = limit.clone().acquire_owned().await.expect("nobody closes it");
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                next = next => next,
                Some(_) = handshakes.join_next() => continue,
            };
            match accepted {
                Ok((stream, remote)) => {
                    // A dual-stack socket shows IPv4 callers as ::ffff:192.0.2.1.
                    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
                    let Some(place) = Place::take(&taken, remote.ip(), share, permit) else {
                        tracing::debug!(%remote, "a connection too many from this address");
                        continue;
                    };
                    let (tx, wires) = (tx.clone(), wires.clone());
                    handshakes.spawn(async move {
                        if let Some(guarded) = greet(stream, remote, place, &wires).await {
                            let _ = tx.send(Ok(guarded)).await;
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept control connections; trying again");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    (accept, ReceiverStream::new(rx))
}

/// Has a caller prove who it is, in as much time as it may take to open a link.
async fn greet(stream: TcpStream, remote: SocketAddr, place: Place, wires: &Wires) -> Option<Guarded> {
    let _ = stream.set_nodelay(true);
    let deadline = Box::pin(sleep(IDLE));
    let local = stream.local_addr().ok()?.ip().to_canonical();
    let (stream, pulse) = Pulse::of(stream);
    let (stream, credential): (Duplex, _) = match &wires.identity {
        None => (Box::pin(stream), None),
        Some(current) => {
            let acceptor = TlsAcceptor::from(current.borrow().identity.tls().server.clone());
            match timeout(IDLE, acceptor.accept(stream)).await.ok()? {
                Ok(stream) => {
                    let credential = Credential::of(stream.get_ref().1.peer_certificates())?;
                    (Box::pin(stream), Some(Arc::new(credential)))
                }
                Err(error) => {
                    match identity::explain_io(&error) {
                        Some(reason) => drop(wires.events.send(Event::TurnedAway { remote, reason }).await),
                        None => tracing::debug!(%remote, %error, "a caller does not speak TLS as agents do"),
                    }
                    return None;
                }
            }
        }
    };
    let caller = Caller { remote, local, pulse, credential, link: Arc::default() };
    Some(Guarded { stream, caller, deadline, linked: false, _place: place })
}

/// Serves links on accepted connections until `stop`, then until the links have ended.
pub async fn serve(
    wires: Wires,
    connections: ReceiverStream<io::Result<Guarded>>,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let service = mesh_server::MeshServer::new(wires).max_decoding_message_size(MAX_FRAME);
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .serve_with_incoming_shutdown(service, connections, stop)
        .await
}

/// Opens a link to the first address that answers; our `own` ones are left out.
///
/// # Errors
/// No address answers, for the reasons named.
pub async fn call(
    target: Target,
    addresses: &[PeerAddress],
    own: &[SocketAddr],
    wires: &Wires,
) -> anyhow::Result<Opened> {
    let mut reasons = Vec::new();
    let mut tried = 0;
    for address in addresses {
        let found =
            match timeout(RESOLVE, tokio::net::lookup_host((address.host.as_str(), address.port))).await {
                Ok(Ok(found)) => found,
                Ok(Err(error)) => {
                    reasons.push(format!("{address}: {error}"));
                    continue;
                }
                Err(_) => {
                    reasons.push(format!("{address}: its name is not resolved within {RESOLVE:?}"));
                    continue;
                }
            };
        let mut found: Vec<_> = found.filter(|found| !own.contains(found)).collect();
        if found.is_empty() {
            reasons.push(format!("{address}: that is this agent itself"));
        }
        rand::seq::SliceRandom::shuffle(found.as_mut_slice(), &mut rand::rng());
        for remote in found {
            tried += 1;
            if tried > MAX_ADDRESSES {
                bail!("none of {MAX_ADDRESSES} addresses answers: {}", reasons.join("; "));
            }
            match connect(remote, wires).await {
                Ok(opened) => return Ok(Opened { dialled: Some(target), ..opened }),
                // It cannot be told from what is said in TLS.
                Err(error) if wires.identity.is_none() => {
                    reasons.push(format!(
                        "{remote}: {error:#} (is that agent run with --insecure, as this one?)"
                    ));
                }
                Err(error) => reasons.push(format!("{remote}: {error:#}")),
            }
        }
    }
    bail!("{}", if reasons.is_empty() { "it has no address".into() } else { reasons.join("; ") })
}

async fn connect(remote: SocketAddr, wires: &Wires) -> anyhow::Result<Opened> {
    let late = || format!("no connection within {CONNECT:?}");
    let stream = timeout(CONNECT, TcpStream::connect(remote)).await.with_context(late)??;
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?.ip().to_canonical();
    let (stream, pulse) = Pulse::of(stream);
    let (stream, credential): (Duplex, _) = match &wires.identity {
        None => (Box::pin(stream), None),
        Some(current) => {
            let connector = TlsConnector::from(current.borrow().identity.tls().client.clone());
            let name = ServerName::from(remote.ip().to_canonical());
            match timeout(CONNECT, connector.connect(name, stream)).await.with_context(late)? {
                Ok(stream) => {
                    let credential = Credential::of(stream.get_ref().1.peer_certificates());
                    let credential = credential.context("its certificate cannot be read")?;
                    (Box::pin(stream), Some(Arc::new(credential)))
                }
                Err(error) => bail!("{}", identity::explain_io(&error).unwrap_or_else(|| error.to_string())),
            }
        }
    };
    // One stream is one connection: what is lost is called anew from the start.
    let mut stream = Some(TokioIo::new(stream));
    let gone = || io::Error::from(io::ErrorKind::NotConnected);
    let connector = tower::service_fn(move |_| ready(stream.take().ok_or_else(gone)));
    let channel = match timeout(CONNECT, endpoint(remote)?.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => bail!("{}", root_cause(&error)),
        Err(_) => bail!("{}", late()),
    };
    let (link, outgoing, stream) = wires.link();
    let left = stream.left.clone();
    let mut client = MeshClient::new(channel.clone()).max_decoding_message_size(MAX_FRAME);
    let answer = timeout(CONNECT, client.link(stream))
        .await
        .with_context(|| format!("no answer within {CONNECT:?}"))?;
    let frames = answer.map_err(|status| anyhow::anyhow!("{}", describe(&status)))?.into_inner();
    let channel = Some(channel);
    Ok(Opened { link, dialled: None, remote, local, pulse, credential, frames, outgoing, left, channel })
}

fn endpoint(remote: SocketAddr) -> anyhow::Result<Endpoint> {
    Ok(Endpoint::from_shared(format!("http://{remote}"))?
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Passes on what comes in until the link ends. A full queue of events slows the other end down.
pub async fn read(
    link: LinkId,
    mut frames: Streaming<Frame>,
    channel: Option<Channel>,
    events: mpsc::Sender<Event>,
) {
    let reason = loop {
        match frames.message().await {
            Ok(Some(frame)) => {
                if events.send(Event::Frame { link, frame }).await.is_err() {
                    return;
                }
            }
            Ok(None) => break "the other end closed it".into(),
            Err(status) => break describe(&status),
        }
    };
    drop(channel);
    let _ = events.send(Event::Closed { link, reason }).await;
}

fn describe(status: &Status) -> String {
    let code = status.code();
    match (status.message(), std::error::Error::source(status)) {
        (_, Some(source)) => root_cause(source),
        ("", None) => code.to_string(),
        (message, None) => message.to_owned(),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    identity::explain_text(&error.to_string())
}

impl Credential {
    fn of(chain: Option<&[CertificateDer<'_>]>) -> Option<Self> {
        let chain: Vec<_> = chain?.iter().map(|der| der.clone().into_owned()).collect();
        let names = Certificate::parse(chain.first()?).ok()?.names;
        Some(Self { names, chain })
    }
}

impl Stream for Outgoing {
    type Item = Frame;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Frame>> {
        let next = self.frames.poll_recv(cx);
        if let Poll::Ready(Some(_)) = next {
            self.left.fetch_add(1, Ordering::Relaxed);
            self.progress.notify_one();
        }
        next
    }
}

impl Caller {
    fn begin_link(&self) -> Arc<()> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let token = link.upgrade().unwrap_or_default();
        *link = Arc::downgrade(&token);
        token
    }

    fn is_linked(&self) -> bool {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).strong_count() > 0
    }
}

impl Pulse {
    /// Listens to a connection.
    fn of(stream: TcpStream) -> (InspectReader<TcpStream, impl FnMut(&[u8])>, Self) {
        let pulse = Self { since: Instant::now(), last: Arc::default() };
        let beat = pulse.clone();
        let heard = move |_: &[u8]| beat.last.store(beat.age(), Ordering::Relaxed);
        (InspectReader::new(stream, heard), pulse)
    }

    /// Nothing came for longer than keep-alives take.
    pub fn is_still(&self) -> bool {
        Duration::from_millis(self.age().saturating_sub(self.last.load(Ordering::Relaxed))) > STILL
    }

    fn age(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }
}

impl Place {
    /// None where that address has its share.
    fn take(
        taken: &Arc<Mutex<BTreeMap<IpAddr, usize>>>,
        address: IpAddr,
        share: usize,
        permit: OwnedSemaphorePermit,
    ) -> Option<Self> {
        let mut places = taken.lock().unwrap_or_else(PoisonError::into_inner);
        let has = places.entry(address).or_default();
        (*has < share).then(|| {
            *has += 1;
            Self { address, taken: taken.clone(), _permit: permit }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = places.get_mut(&self.address) {
            *has -= 1;
            if *has == 0 {
                places.remove(&self.address);
            }
        }
    }
}

/// Bytes both ways, sealed or not.
trait Bytes: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Bytes for T {}
type Duplex = Pin<Box<dyn Bytes>>;

impl Connected for Guarded {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let linked = self.caller.is_linked();
        if std::mem::replace(&mut self.linked, linked) && !linked {
            self.deadline.as_mut().reset(Instant::now() + IDLE);
        }
        if !linked && self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.stream.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Bytes of a frame, decoded: several times what an agent sends.
const MAX_FRAME: usize = 4 << 20;
const MAX_HEADERS: u32 = 16 << 10;
/// Links on one connection: agents make one.
const STREAMS: u32 = 4;
/// Silence after which a connection is asked for a sign of life.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long that sign may take.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Silence in which at least one answer to a keep-alive should have come.
const STILL: Duration = Duration::from_millis(1500);
const CONNECT: Duration = Duration::from_secs(1);
const RESOLVE: Duration = Duration::from_secs(3);
/// Addresses of one target that are tried in a row.
const MAX_ADDRESSES: usize = 4;
/// How long an accepted connection may go without a link, before the first and after the last.
const IDLE: Duration = Duration::from_secs(3);
/// Rest after a failed accept, which fails again at once where descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
