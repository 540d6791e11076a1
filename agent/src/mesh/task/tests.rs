//! The task on real sockets.

use super::*;
use crate::{
    identity::{
        Ca, Identity, Issued, Trust,
        task::{Current, State},
    },
    mesh::dial::Target,
    types::{Endpoint, Incarnation},
};
use std::{sync::LazyLock, time::SystemTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

struct Agent {
    handle: Handle,
    incoming: mpsc::Receiver<Incoming>,
    address: SocketAddr,
}

/// The CA of all agents that are not told otherwise.
static CA: LazyLock<Issued> = LazyLock::new(|| Ca::create(SystemTime::now()).unwrap());

/// A node's keys of one CA, which believes the CAs of a bundle.
fn keys(name: &str, ca: &Issued, bundle: &str) -> State {
    let issuer = Ca::load(ca.cert.as_bytes(), ca.key.as_bytes()).unwrap();
    let name: PeerName = name.parse().unwrap();
    let leaf = issuer.issue(&name, DEADLINE * 10, SystemTime::now()).unwrap();
    let (cert, key) = (leaf.cert.as_bytes(), leaf.key.as_bytes());
    let trust = Trust::from_pem(bundle.as_bytes(), None).unwrap();
    let identity = Identity::new(name, trust, cert, key, SystemTime::now()).unwrap();
    State { identity: Arc::new(identity), trouble: None }
}

fn agent(name: &str, incarnation: u64, bootstrap: &[SocketAddr]) -> Agent {
    let (_, current) = watch::channel(keys(name, &CA, &CA.cert));
    agent_with(name, incarnation, bootstrap, Some(current))
}

fn agent_with(name: &str, incarnation: u64, bootstrap: &[SocketAddr], identity: Option<Current>) -> Agent {
    // An address of its own: a port that it frees is then not taken by another test.
    static AGENTS: AtomicUsize = AtomicUsize::new(0);
    let [.., high, low] = AGENTS.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let listener = TcpListener::bind(SocketAddr::from(([127, 78, high, low], 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let mut record = PeerRecord::new(name.parse().unwrap(), Incarnation(incarnation));
    record.endpoints = vec![Endpoint(address)];
    let config = Config {
        record,
        universe: "10.32.0.0/12".parse().unwrap(),
        identity,
        seeds: Vec::new(),
        bootstrap: bootstrap.iter().map(|address| address.to_string().parse().unwrap()).collect(),
        max_links: 64,
        items: Vec::new(),
        gossipers: Vec::new(),
        seed: incarnation,
    };
    let (handle, incoming) = spawn(config, vec![listener]).unwrap();
    Agent { handle, incoming, address }
}

impl Agent {
    async fn peers(&self, what: &str, holds: impl FnMut(&Arc<PeerSet>) -> bool) -> Arc<PeerSet> {
        let mut peers = self.handle.peers();
        let found = timeout(DEADLINE, peers.wait_for(holds)).await.unwrap_or_else(|_| panic!("{what}"));
        found.unwrap().clone()
    }

    async fn knows(&self, count: usize) {
        self.peers("not all peers are known", |peers| peers.others().count() == count).await;
    }

    async fn next(&mut self) -> Incoming {
        timeout(DEADLINE, self.incoming.recv())
            .await
            .expect("nothing comes in")
            .expect("the mesh has stopped")
    }
}

async fn three() -> [Agent; 3] {
    let a = agent("a", 1, &[]);
    let b = agent("b", 2, &[a.address]);
    let c = agent("c", 3, &[a.address]);
    let agents = [a, b, c];
    for agent in &agents {
        agent.knows(2).await;
    }
    agents
}

#[tokio::test]
async fn three_agents_with_one_bootstrap_address_know_each_other() {
    let mut agents = three().await;
    for agent in &mut agents {
        assert_eq!(agent.next().await, Incoming::Joined);
        assert_eq!(agent.next().await, Incoming::Contact);
    }
    let [a, b, mut c] = agents;
    assert_eq!(a.handle.items().await.unwrap().len(), 3);
    b.handle.update_record(|record| record.mtu = 1400).await.unwrap();
    let b_name: PeerName = "b".parse().unwrap();
    c.peers("the change arrives", |peers| peers.get(&b_name).is_some_and(|b| b.mtu == 1400)).await;
    b.handle.unicast("c".parse().unwrap(), "test", vec![7]).await.unwrap();
    let expected = Incoming::Unicast { from: b_name.clone(), channel: "test".into(), body: vec![7] };
    assert_eq!(c.next().await, expected);
    b.handle.leave().await;
    a.peers("b is known to have left", |peers| peers.get(&b_name).is_none()).await;
}

#[tokio::test]
async fn garbage_on_the_port_harms_nobody() {
    let [a, ..] = three().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[preface.as_slice(), &[0xff; 4096]].concat()]
    {
        let mut stream = TcpStream::connect(a.address).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        // The agent hangs up, sooner or later; it may say something first.
        let _ = timeout(DEADLINE, stream.read_to_end(&mut Vec::new())).await.expect("it hangs up");
    }
    let silent = TcpStream::connect(a.address).await.unwrap();
    let late = agent("late", 9, &[a.address]);
    late.knows(3).await;
    drop(silent);
}

#[tokio::test]
async fn frames_that_make_no_sense_end_their_link_only() {
    let [a, ..] = three().await;
    let (events, _events) = mpsc::channel(1);
    let (_, current) = watch::channel(keys("x", &CA, &CA.cert));
    let wires =
        Wires { identity: Some(current), events, progress: Arc::default(), next_link: Arc::default() };
    let address = [a.address.to_string().parse().unwrap()];
    let mut opened = transport::call(Target::Twin, &address, &[], &wires).await.unwrap();
    opened.outgoing.send(Frame { body: None }).await.unwrap();
    while let Ok(Ok(Some(_))) = timeout(DEADLINE, opened.frames.message()).await {}
    assert_eq!(a.handle.status().await.unwrap().counters.links_garbage, 1);
    let late = agent("late", 9, &[a.address]);
    late.knows(3).await;
}

/// Waits until an agent's status has something.
async fn status<T>(agent: &Agent, what: &str, find: impl Fn(Status) -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = find(agent.handle.status().await.unwrap()) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, found).await.unwrap_or_else(|_| panic!("{what}"))
}

/// Why `a` has turned somebody away, and why `b` does not reach whom it calls.
async fn reasons(a: &Agent, b: &Agent) -> (String, String) {
    let turned_away =
        status(a, "nobody is turned away", |status| Some(status.refusals.first()?.1.clone())).await;
    let trouble = status(b, "all is well", |status| {
        status
            .troubles
            .iter()
            .map(|trouble| trouble.reason.clone())
            .find(|reason| reason.contains("certificate"))
    });
    (turned_away, trouble.await)
}

#[tokio::test]
async fn an_agent_of_another_ca_is_turned_away_and_told_why() {
    let other = Ca::create(SystemTime::now()).unwrap();
    let a = agent("a", 1, &[]);
    // It believes a's CA too: so it is a that does not believe b.
    let (_, current) = watch::channel(keys("b", &other, &format!("{}{}", other.cert, CA.cert)));
    let b = agent_with("b", 2, &[a.address], Some(current));
    let (turned_away, trouble) = reasons(&a, &b).await;
    assert!(turned_away.contains("of no CA that this node believes"), "{turned_away}");
    assert!(trouble.contains("does not accept this node's certificate: it is of no CA"), "{trouble}");
    // And here it is b that does not believe a.
    let (_, current) = watch::channel(keys("c", &other, &other.cert));
    let c = agent_with("c", 3, &[a.address], Some(current));
    let trouble =
        status(&c, "c has no trouble", |status| Some(status.troubles.first()?.reason.clone())).await;
    assert!(trouble.contains("of no CA that this node believes"), "{trouble}");
    assert_eq!(a.handle.status().await.unwrap().links, []);
    assert!(a.handle.status().await.unwrap().counters.links_refused["identity"] >= 1);
}

#[tokio::test]
async fn an_expired_certificate_is_turned_away_and_told_why() {
    let a = agent("a", 1, &[]);
    // Made in time, used too late.
    let issuer = Ca::load(CA.cert.as_bytes(), CA.key.as_bytes()).unwrap();
    let (name, past) = ("b".parse::<PeerName>().unwrap(), SystemTime::now() - DEADLINE);
    let leaf = issuer.issue(&name, DEADLINE / 2, past).unwrap();
    let identity = Identity::new(
        name,
        Trust::from_pem(CA.cert.as_bytes(), None).unwrap(),
        leaf.cert.as_bytes(),
        leaf.key.as_bytes(),
        past,
    )
    .unwrap();
    let state = State { identity: Arc::new(identity), trouble: None };
    let (shown, now) = (state.warnings(SystemTime::now()), SystemTime::now() - Duration::from_secs(1800));
    assert!(shown[0].contains("has expired"), "{shown:?}");
    assert_eq!(state.warnings(now - Duration::from_secs(1800)), Vec::<String>::new());
    let b = agent_with("b", 2, &[a.address], Some(watch::channel(state).1));
    let (turned_away, trouble) = reasons(&a, &b).await;
    assert!(turned_away.contains("has expired"), "{turned_away}");
    assert!(trouble.contains("does not accept this node's certificate: it has expired"), "{trouble}");
}

#[tokio::test]
async fn an_agent_whose_certificate_names_another_is_refused_and_told_why() {
    let a = agent("a", 1, &[]);
    let (_, current) = watch::channel(keys("mallory", &CA, &CA.cert));
    let b = agent_with("b", 2, &[a.address], Some(current));
    let (turned_away, trouble) = reasons(&a, &b).await;
    for reason in [turned_away, trouble] {
        assert!(reason.contains("says that it is b, but its certificate names mallory"), "{reason}");
    }
    assert_eq!(a.handle.peers().borrow().others().count(), 0);
}

#[tokio::test]
async fn an_agent_without_keys_gets_no_link() {
    let a = agent("a", 1, &[]);
    let b = agent_with("b", 2, &[a.address], None);
    let trouble =
        status(&b, "b has no trouble", |status| Some(status.troubles.first()?.reason.clone())).await;
    assert!(trouble.contains("--insecure"), "{trouble}");
    let c = agent("c", 3, &[b.address]);
    let trouble =
        status(&c, "c has no trouble", |status| Some(status.troubles.first()?.reason.clone())).await;
    assert!(trouble.contains("--insecure"), "{trouble}");
}

#[tokio::test]
async fn a_ca_is_replaced_without_losing_a_link() {
    let new = Ca::create(SystemTime::now()).unwrap();
    let both = format!("{}{}", CA.cert, new.cert);
    let (a_keys, current) = watch::channel(keys("a", &CA, &CA.cert));
    let a = agent_with("a", 1, &[], Some(current));
    let (b_keys, current) = watch::channel(keys("b", &CA, &CA.cert));
    let b = agent_with("b", 2, &[a.address], Some(current));
    a.knows(1).await;
    b.knows(1).await;
    let link =
        status(&a, "no link", |status| Some((status.links.len() == 1).then_some(status.links)?[0].id)).await;
    // The new CA is believed beside the old one, then issues, then is believed alone: always one node before the other.
    for (step, issuer, bundle) in [("believed", &*CA, &both), ("issues", &new, &both)] {
        for (keys_of, name, of) in [(&a_keys, "a", &a), (&b_keys, "b", &b)] {
            keys_of.send_replace(keys(name, issuer, bundle));
            assert_eq!(of.handle.status().await.unwrap().links.len(), 1, "{step} at {name}");
        }
        assert_eq!(a.handle.status().await.unwrap().links[0].id, link, "{step}: it is the same link");
        let newcomer = agent_with("c", 3, &[a.address], Some(watch::channel(keys("c", issuer, bundle)).1));
        newcomer.knows(2).await;
        newcomer.handle.leave().await;
        for agent in [&a, &b] {
            status(agent, "c is still linked", |status| (status.links.len() == 1).then_some(())).await;
        }
    }
    // Links of the time before end now, as their certificates are of a CA that is gone; new ones take their place.
    a_keys.send_replace(keys("a", &new, &new.cert));
    b_keys.send_replace(keys("b", &new, &new.cert));
    status(&a, "no new link", |status| {
        status.links.iter().any(|other| other.peer.is_some() && other.id != link).then_some(())
    })
    .await;
    let (_, current) = watch::channel(keys("old", &CA, &both));
    let old = agent_with("old", 9, &[a.address], Some(current));
    let (turned_away, _) = reasons(&a, &old).await;
    assert!(turned_away.contains("of no CA"), "{turned_away}");
}

#[tokio::test]
async fn a_stopped_agent_frees_its_port_and_is_missed() {
    let [a, b, c] = three().await;
    let address = b.address;
    b.handle.stop().await;
    assert!(b.handle.status().await.is_err());
    drop(std::net::TcpListener::bind(address).expect("the port is free"));
    for other in [&a, &c] {
        let unlinked = async {
            while other
                .handle
                .status()
                .await
                .unwrap()
                .links
                .iter()
                .any(|link| link.peer.as_ref().is_some_and(|(name, _)| name.as_str() == "b"))
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, unlinked).await.expect("the link is down");
    }
}

#[tokio::test]
async fn the_later_of_two_with_one_name_is_told_who_was_first() {
    let [a, b, _c] = three().await;
    let mut twin = agent("b", 100, &[a.address]);
    let Incoming::Fatal(reason) = twin.next().await else { panic!("it joined") };
    assert!(reason.contains(&b.address.to_string()) && reason.contains("--name"), "{reason}");
    let linked = b.handle.status().await.unwrap().links.into_iter().filter_map(|link| link.peer);
    assert_eq!(linked.map(|(name, _)| name.to_string()).collect::<Vec<_>>(), ["a", "c"]);
}

#[tokio::test]
async fn who_cannot_be_reached_is_shown_with_the_reason() {
    // A port that is taken, but on which nobody listens.
    let taken = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    taken.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let taken_at = taken.local_addr().unwrap().as_socket().unwrap();
    let mut alone = agent("alone", 1, &[taken_at]);
    assert_eq!(alone.next().await, Incoming::Joined);
    let troubles = alone.handle.status().await.unwrap().troubles;
    assert!(troubles[0].reason.contains("refused"), "{troubles:?}");
}

const DEADLINE: Duration = Duration::from_secs(10);
