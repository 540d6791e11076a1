//! The task on real sockets.

use super::*;
use crate::types::{Endpoint, Incarnation};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

struct Agent {
    handle: Handle,
    incoming: mpsc::Receiver<Incoming>,
    address: SocketAddr,
}

fn agent(name: &str, incarnation: u64, bootstrap: &[SocketAddr]) -> Agent {
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
        seed_hash: Vec::new(),
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
    let channel = format!("http://{}", a.address);
    let channel = tonic::transport::Endpoint::from_shared(channel).unwrap().connect().await.unwrap();
    let mut client = crate::mesh::wire::mesh_client::MeshClient::new(channel);
    let nonsense = vec![Frame { body: None }, Frame { body: None }];
    let mut frames = client.link(tokio_stream::iter(nonsense)).await.unwrap().into_inner();
    while let Ok(Ok(Some(_))) = timeout(DEADLINE, frames.message()).await {}
    assert_eq!(a.handle.status().await.unwrap().counters.links_garbage, 1);
    let late = agent("late", 9, &[a.address]);
    late.knows(3).await;
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
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut alone = agent("alone", 1, &[free]);
    assert_eq!(alone.next().await, Incoming::Joined);
    let troubles = alone.handle.status().await.unwrap().troubles;
    assert!(troubles[0].reason.contains("refused"), "{troubles:?}");
}

const DEADLINE: Duration = Duration::from_secs(10);
