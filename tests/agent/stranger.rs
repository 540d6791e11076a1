//! Somebody on the underlay who speaks to agents, and not as agents do.
use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context, bail};
use hyper_util::rt::TokioIo;
use prost::{
    Message,
    bytes::{Buf, BufMut},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use weft::identity::Tls;
use weft_lab::{Lab, keys, namespace::Netns};
use weft_proto::mesh::{Digest, Frame, Hello, PeerRecord, frame::Body};

/// A stream of `Mesh.Link`, of which every message may be anything.
pub struct Link {
    pub outgoing: mpsc::Sender<Vec<u8>>,
    incoming: Streaming<Vec<u8>>,
    /// The connection lives as long as this.
    _channel: Channel,
}

impl Link {
    /// From the calling thread's network namespace, with keys.
    pub async fn open(to: IpAddr, keys: &Tls) -> anyhow::Result<Self> {
        let remote = SocketAddr::new(to, PORT);
        let stream = timeout(PATIENCE, tokio::net::TcpStream::connect(remote)).await.context("connect")??;
        let stream = TlsConnector::from(keys.client.clone()).connect(ServerName::from(to), stream);
        let mut stream = Some(TokioIo::new(timeout(PATIENCE, stream).await.context("TLS")??));
        let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
        let connector = tower::service_fn(move |_| std::future::ready(stream.take().ok_or_else(gone)));
        let endpoint = Endpoint::from_shared(format!("http://{remote}"))?;
        let channel =
            timeout(PATIENCE, endpoint.connect_with_connector(connector)).await.context("HTTP/2")??;
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await?;
        let (outgoing, frames) = mpsc::channel(64);
        let request = Request::new(ReceiverStream::new(frames));
        let path = "/weft.mesh.v1.Mesh/Link".parse().expect("a path");
        let answer =
            timeout(PATIENCE, client.streaming(request, path, Raw)).await.context("open a link")??;
        Ok(Self { outgoing, incoming: answer.into_inner(), _channel: channel })
    }

    pub async fn send(&self, frame: Body) -> anyhow::Result<()> {
        Ok(self.outgoing.send(Frame { body: Some(frame) }.encode_to_vec()).await?)
    }

    /// The next frame; none when the agent has ended the link.
    pub async fn next(&mut self) -> anyhow::Result<Option<Body>> {
        let next = timeout(PATIENCE, self.incoming.message()).await.context("the agent says nothing")?;
        match next {
            Ok(Some(bytes)) => Ok(Frame::decode(bytes.as_slice())?.body),
            Ok(None) | Err(_) => Ok(None),
        }
    }

    /// Listens until the agent ends the link.
    pub async fn ended(mut self) -> anyhow::Result<()> {
        while self.next().await?.is_some() {}
        Ok(())
    }
}

/// Keys of the lab's CA for somebody who is no agent.
pub fn keys(lab: &Lab, name: &str) -> anyhow::Result<Tls> {
    Ok(keys::identity(lab.ca_dir(), name)?.tls().clone())
}

/// What an agent would say first.
pub fn hello(name: &str) -> Body {
    Body::Hello(Hello {
        protocol: 1,
        name: name.into(),
        incarnation: 1,
        software: "a stranger".into(),
        universe: "10.32.0.0/12".into(),
        seeds: Vec::new(),
    })
}

/// Runs a conversation in a network namespace.
pub fn talk<T: Send>(
    from: &Netns,
    work: impl AsyncFnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    from.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work())
    })
}

/// The data id of a peer, as an agent tells everybody who has nothing and asks.
pub fn data_id(lab: &Lab, agent: IpAddr, peer: &str) -> anyhow::Result<u32> {
    let keys = keys(lab, "listener")?;
    talk(&lab.underlay().netns, async || {
        let mut link = Link::open(agent, &keys).await?;
        link.send(hello("listener")).await?;
        link.send(Body::Digest(Digest::default())).await?;
        let deadline = Instant::now() + PATIENCE;
        while let Some(body) = timeout_at(deadline, link.next()).await.context("in time")?? {
            let Body::Items(items) = body else { continue };
            let record =
                items.items.iter().find(|item| item.channel == "peers" && item.key == peer.as_bytes());
            if let Some(record) = record {
                return Ok(PeerRecord::decode(record.body.as_slice())?.data_id);
            }
        }
        bail!("{agent} does not tell about {peer}")
    })
}

/// TCP connections to the control port on which these bytes are said, and no more.
pub fn connections(from: &Netns, to: IpAddr, said: &[Vec<u8>]) -> anyhow::Result<Vec<TcpStream>> {
    from.run(|| {
        let connect = |bytes: &Vec<u8>| {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, PORT), PATIENCE)?;
            // An agent that has hung up already is right to.
            let _ = stream.write_all(bytes);
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        said.iter().map(connect).collect()
    })
}

/// Reads until the agent hangs up.
///
/// # Errors
/// It does not.
pub fn hung_up(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => bail!("it is still connected"),
            Err(_) => return Ok(()),
        }
    }
}

/// A socket to the data port.
pub fn datagrams(from: &Netns, to: IpAddr) -> anyhow::Result<UdpSocket> {
    from.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(SocketAddr::new(to, PORT))?;
        Ok(socket)
    })
}

/// Messages as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}

/// Control and data.
const PORT: u16 = 6783;
const PATIENCE: Duration = Duration::from_secs(15);
