//! A node with a certificate of the network's CA and a data key of its own, that does as it likes with them.
use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use prost::Message;
use tokio::sync::watch;
use weft::{
    datapath::{
        handshake::{self, Machine, Peer},
        header::{Envelope, Header, SEALED_LEN},
        seal::{Algorithm, TAG_LEN},
        session_task,
        sessions::Sessions,
    },
    identity::{Identity, Sealer, data_key, task::State},
    ipam::{span::Layout, token::Token},
    mesh::{gossip::Item, peers::PeerRecord},
    types::{DataId, DataKey, DataSecret, Endpoint, Incarnation, PeerName},
};
use weft_lab::{Lab, keys, node::Node, wait};
use weft_proto::mesh::{self as wire, frame::Body};

use crate::stranger::{Link, hello, talk};

/// Its victim knows its record, and has agreed with it on keys if [`Insider::agree`] was called.
pub struct Insider {
    pub node: Arc<Node>,
    pub sealer: Sealer,
    /// What the victim has told: its own record, and everybody's ranges.
    pub victim: PeerRecord,
    pub tokens: Vec<Token>,
    identity: Arc<Identity>,
    machine: Machine,
    sessions: Option<Sessions>,
    socket: UdpSocket,
    to: SocketAddr,
}

impl Insider {
    /// On a new node without an agent; it introduces itself to the victim.
    pub fn new(lab: &Lab, victim: &Node) -> anyhow::Result<Self> {
        let node = lab.add_node()?;
        let identity = Arc::new(keys::identity(lab.ca_dir(), node.name())?);
        let sealer = Sealer::new(watch::channel(State { identity: identity.clone(), trouble: None }).1);
        let name: PeerName = node.name().parse()?;
        let own = SocketAddr::new(node.address(), PORT);
        let socket = node.netns().run(|| Ok(UdpSocket::bind(own)?))?;
        socket.set_read_timeout(Some(TICK))?;
        let secret = DataSecret::new([0x5a; 32]);
        let key = data_key(&secret);
        let record = PeerRecord {
            endpoints: vec![Endpoint(own)],
            data_key: Some(key),
            data_id: DataId(0x5a5a_5a5a),
            mtu: 1400,
            ..PeerRecord::new(name.clone(), Incarnation(1))
        };
        let told = talk(node.netns(), async || {
            let mut link = Link::open(victim.address(), identity.tls()).await?;
            link.send(hello(name.as_str())).await?;
            let told = listen(&mut link, victim.name()).await?;
            say(link, name.as_str(), vec![record.to_sealed(Some(&sealer))]).await?;
            Ok(told)
        });
        let (victim, tokens) = told.context("introduce an insider")?;
        let to = victim.endpoints.first().context("the victim has no endpoint")?.0;
        let config = handshake::Config {
            name,
            secret,
            key,
            incarnation: Incarnation(1),
            algorithm: Algorithm::preferred(),
            lanes: 1,
            random: session_task::random(),
        };
        let mut machine = Machine::new(config, Instant::now());
        let victims_key = victim.data_key.context("the victim has no data key")?;
        machine.set_peers(vec![peer(&victim, victims_key, to)], Instant::now());
        Ok(Self { node, sealer, victim, tokens, identity, machine, sessions: None, socket, to })
    }

    /// Has the victim's agent hear items.
    pub fn tell(&self, items: Vec<Item>) -> anyhow::Result<()> {
        let Self { node, identity, victim, to, .. } = self;
        talk(node.netns(), async || {
            let mut link = Link::open(to.ip(), identity.tls()).await?;
            link.send(hello(node.name())).await?;
            listen(&mut link, victim.name.as_str()).await?;
            say(link, node.name(), items).await
        })
    }

    /// The first message of a handshake with the victim.
    pub fn initiation(&mut self) -> anyhow::Result<Vec<u8>> {
        self.machine.wanted(&self.victim.name, Instant::now());
        Ok(self.machine.poll_datagram().context("there is no initiation")?.bytes)
    }

    /// Agrees on keys, as an agent does.
    pub fn agree(&mut self) -> anyhow::Result<()> {
        let mut buffer = [0; 2048];
        wait::until("the insider has keys", SOON, || {
            self.machine.wanted(&self.victim.name, Instant::now());
            self.machine.wake(Instant::now());
            if let Ok((length, from)) = self.socket.recv_from(&mut buffer) {
                // What is of no use is not what it waits for.
                let _ = self.machine.datagram(from, &buffer[..length], Instant::now());
            }
            while let Some(datagram) = self.machine.poll_datagram() {
                self.socket.send_to(&datagram.bytes, datagram.to)?;
            }
            self.sessions = self.machine.poll_sessions().or(self.sessions.take());
            let agreed = self.sessions.as_ref().is_some_and(|it| it.sending(&self.victim.name).is_some());
            ensure!(agreed, "not yet");
            Ok(())
        })
    }

    /// Sends an inner packet to the victim, sealed as it should be.
    pub fn send(&self, inner: &[u8]) -> anyhow::Result<()> {
        let sessions = self.sessions.as_ref().context("there are no keys")?;
        let sending = sessions.sending(&self.victim.name).context("there are no keys")?;
        let counter = u64::from_be_bytes(sending.take(0, 1)?.encode());
        let mut datagram = [&[0; SEALED_LEN][..], inner, &[0; TAG_LEN]].concat();
        let envelope = Envelope::Sealed { index: sending.index(), counter };
        Header { partial: false, flow: 0, envelope }.write(&mut datagram);
        let (header, rest) = datagram.split_first_chunk_mut().expect("room for a header");
        let (inner, tag) = rest.split_last_chunk_mut().expect("room for a tag");
        sending.key().seal(header, inner, tag);
        self.socket.send_to(&datagram, self.to)?;
        Ok(())
    }
}

fn peer(record: &PeerRecord, key: DataKey, at: SocketAddr) -> Peer {
    Peer { name: record.name.clone(), key, incarnation: record.incarnation, endpoint: Some(at) }
}

/// The record of that name and all tokens, as an agent tells them who joins and has nothing.
async fn listen(link: &mut Link, name: &str) -> anyhow::Result<(PeerRecord, Vec<Token>)> {
    link.send(Body::Digest(wire::Digest::default())).await?;
    let layout = Layout::new(UNIVERSE.parse()?);
    let (mut record, mut tokens) = (None, Vec::new());
    while let Some(body) = link.next().await? {
        let Body::Items(items) = body else { continue };
        for item in items.items {
            let item = Item {
                channel: item.channel,
                key: item.key,
                rank: item.rank,
                body: item.body,
                signature: item.signature,
            };
            match item.channel.as_str() {
                "peers" if item.key == name.as_bytes() => record = Some(PeerRecord::from_item(&item)?),
                "ring" => tokens.push(Token::from_item(&item, &layout)?),
                _ => {}
            }
        }
        if items.complete
            && let Some(record) = record.take()
        {
            return Ok((record, tokens));
        }
    }
    bail!("the link has ended before {name} was told")
}

/// Says items, and waits until the agent has read them: then comes a second hello, for which it ends the link.
async fn say(link: Link, name: &str, items: Vec<Item>) -> anyhow::Result<()> {
    let items = items.into_iter().map(Into::into).collect();
    link.send(Body::Items(wire::Items { items, complete: true })).await?;
    link.send(hello(name)).await?;
    link.ended().await
}

/// Seals a token with a deed of one's choice.
pub fn sealed_token(sealer: &Sealer, token: Token, grants: Vec<wire::Grant>) -> anyhow::Result<Item> {
    let layout = Layout::new(UNIVERSE.parse()?);
    let seal = Some(sealer.seal("token", &token.to_body(&layout)));
    Ok(Token { signature: wire::Deed { grants, seal }.encode_to_vec(), ..token }.to_item(&layout))
}

/// The grants that lead to a token's owner.
pub fn grants(token: &Token) -> anyhow::Result<Vec<wire::Grant>> {
    Ok(wire::Deed::decode(token.signature.as_slice())?.grants)
}

const UNIVERSE: &str = "10.32.0.0/12";
const PORT: u16 = 6783;
const TICK: Duration = Duration::from_millis(10);
const SOON: Duration = Duration::from_secs(10);
