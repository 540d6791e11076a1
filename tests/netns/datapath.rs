//! Two data paths in two namespaces that a veth joins.
//!
//! ```text
//!   ┌ a ──────────────────────────────────────┐   ┌ b ──────────────────────────────────────┐
//!   │ 10.32.0.1 ─ weft0 ⇄ Datapath ⇄ 192.0.2.1 ═════ 192.0.2.2 ⇄ Datapath ⇄ weft0 ─ 10.32.1.1 │
//!   └─────────────────────────────────────────┘   └─────────────────────────────────────────┘
//! ```
//!
//! The namespaces have no names: they end with the test, whichever way it ends.

use arc_swap::ArcSwap;
use etherparse::PacketBuilder;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio_tun::Tun;
use weft::{
    datapath::{
        Drop, Snapshot, handshake,
        header::{CLEAR_LEN, Envelope, Header},
        seal::Algorithm,
        session_task::{self, Handshakes},
        table::{Inputs, Owner, Peer, Table},
        task::{Config, Datapath, bind, open, spawn},
    },
    identity::data_key,
    linux::{
        netlink::{AddressFlags, BridgeOptions, Netlink, Route, VethPair},
        tun::{self, TunError},
        udp::{BATCH, Incoming, Outgoing, Socket, Target},
    },
    types::{DataId, DataSecret, Incarnation, Mac, Prefix},
};

#[test]
fn packets_cross_between_two_nodes() {
    packets_cross(&Pair::new(["192.0.2.1", "192.0.2.2"], LINK_MTU - 36));
}

#[test]
fn sealed_packets_cross_between_two_nodes() {
    packets_cross(&Pair::start(["192.0.2.1", "192.0.2.2"], LINK_MTU - 60, true));
}

fn packets_cross(pair: &Pair) {
    for (a, b) in [("10.32.0.1", "10.32.1.1"), ("fd00:0:0:0::1", "fd00:0:0:1::1")] {
        let (a, b) = (pair.a.socket(a), pair.b.socket(b));
        // No more than a few packets wait until there are keys.
        a.send_to(b"first", b.local_addr().unwrap()).unwrap();
        let mut first = [0; 10];
        assert_eq!(b.recv(&mut first).expect("the first packet within 5 s"), 5);
        for (from, to) in [(&a, &b), (&b, &a)] {
            let sent: Vec<_> = (0..200u32).flat_map(u32::to_be_bytes).collect();
            sent.chunks(4).for_each(|number| {
                from.send_to(number, to.local_addr().unwrap()).unwrap();
            });
            let mut got = Vec::new();
            let mut buffer = [0; 2000];
            while got.len() < sent.len() {
                let (len, source) = to.recv_from(&mut buffer).expect("the next packet within 5 s");
                assert_eq!(source, from.local_addr().unwrap());
                got.extend_from_slice(&buffer[..len]);
            }
            assert_eq!(got, sent, "all of them, in order");
        }
    }
    let (a, b) = (pair.a.datapath.counters(), pair.b.datapath.counters());
    assert!(a.sent.packets >= 400 && b.received.packets >= 400, "{a:?} {b:?}");
    assert_eq!(a.peers[&"b".parse().unwrap()].sent, a.sent);
    assert_eq!(b.peers[&"a".parse().unwrap()].received, b.received);
}

#[test]
fn packets_cross_an_ipv6_underlay() {
    let pair = Pair::new(["2001:db8::1", "2001:db8::2"], LINK_MTU - 56);
    let (a, b) = (pair.a.socket("10.32.0.1"), pair.b.socket("10.32.1.1"));
    let largest = vec![7; usize::from(LINK_MTU) - 56 - 28];
    a.send_to(&largest, b.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 2000];
    let (len, _) = b.recv_from(&mut buffer).expect("the packet within 5 s");
    assert_eq!(buffer[..len], largest);
}

#[test]
fn sockets_serve_ipv4_where_ipv6_is_off() {
    within(&namespace(), || {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        netlink(async |netlink| netlink.set_up(index(&netlink, "lo").await, true).await.unwrap());
        let sockets = bind("[::]:6783".parse().unwrap(), 2).unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], 6783));
        assert!(sockets[0][0].path_mtu(to).unwrap() > 1500);
        let (mut outgoing, mut incoming) = (Outgoing::new(), Incoming::new());
        outgoing.push(Target { peer: 0, to, lane: 1 }, 9, 9);
        outgoing.send(&sockets[0], |report| assert_eq!(report.result, Ok(())));
        let got = soon("the first of the two has it", || incoming.receive(&sockets[0][0], BATCH).ok());
        assert_eq!((got, incoming.message(0).segment), (1, 9));
    });
}

#[test]
fn what_a_peer_may_not_send_is_dropped_and_counted() {
    let pair = Pair::new(["192.0.2.1", "192.0.2.2"], LINK_MTU - 36);
    let receiver = pair.a.socket("10.32.0.1");
    let attacker = within(&pair.b.netns, || UdpSocket::bind("192.0.2.2:0").unwrap());
    let send = |bytes: &[u8]| attacker.send_to(bytes, "192.0.2.1:6783").unwrap();
    let udp = |source: [u8; 4], destination: [u8; 4]| {
        let mut bytes = Vec::new();
        let port = receiver.local_addr().unwrap().port();
        PacketBuilder::ipv4(source, destination, 64).udp(1, port).write(&mut bytes, b"evil").unwrap();
        bytes
    };
    let datagram = |sender: u32, packet: &[u8]| {
        let mut datagram = [&[0; CLEAR_LEN], packet].concat();
        let envelope = Envelope::Clear { sender: DataId(sender) };
        Header { partial: false, flow: 0, envelope }.write(&mut datagram);
        datagram
    };
    let good = udp([10, 32, 1, 9], [10, 32, 0, 1]);
    send(&datagram(99, &good));
    send(&datagram(2, &udp([10, 32, 0, 1], [10, 32, 0, 1])));
    send(&datagram(2, &udp([8, 8, 8, 8], [10, 32, 0, 1])));
    send(&datagram(2, &udp([10, 32, 1, 9], [10, 32, 0, 77])));
    send(&datagram(2, &udp([10, 32, 1, 9], [10, 32, 1, 1])));
    send(&datagram(2, &good[..20]));
    send(&datagram(2, b"garbage"));
    send(b"");
    send(&[0; 100]);
    send(&[0x1f; 100]);
    send(&[0xff; 1400]);
    let want = [
        (Drop::UnknownPeer, 1),
        (Drop::SpoofedSource, 2),
        (Drop::NotLocal, 2),
        (Drop::Malformed, 3),
        (Drop::UnknownVersion, 2),
        (Drop::UnknownKind, 1),
    ];
    let drops = pair.a.counted(|counters| want.iter().all(|(drop, n)| counters.drops[drop] >= *n)).drops;
    assert!(want.iter().all(|(drop, n)| drops[drop] == *n), "{drops:?}");
    // What b really sends still arrives, and before it nothing did.
    let sender = pair.b.socket("10.32.1.1");
    sender.send_to(b"good", receiver.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 100];
    let (len, source) = receiver.recv_from(&mut buffer).expect("the good packet within 5 s");
    assert_eq!((&buffer[..len], source), (&b"good"[..], sender.local_addr().unwrap()));
}

#[test]
fn packets_for_nobody_are_answered_with_host_unreachable() {
    let pair = Pair::new(["192.0.2.1", "192.0.2.2"], LINK_MTU - 36);
    let nobodys = [("10.32.0.1", "10.32.9.9:1"), ("fd00:0:0:0::1", "[fd00:0:0:9::9]:1")];
    for (from, to) in nobodys {
        let socket = pair.a.socket(from);
        let error = soon(&format!("{to} is unreachable"), || {
            // The error of one packet is told to whatever is asked of the socket next.
            socket.send_to(b"anybody?", to).err().or(socket.take_error().unwrap())
        });
        assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{to}");
    }
    let counters = pair.a.datapath.counters();
    assert!(counters.drops[&Drop::NoRoute] >= 2 && counters.icmp_errors >= 2, "{counters:?}");
}

#[test]
fn too_big_packets_are_answered_with_the_mtu() {
    // The table knows better than the underlay; then the other way round.
    for (told, found) in [(1300, 1300), (9000, LINK_MTU - 36)] {
        let pair = Pair::new(["192.0.2.1", "192.0.2.2"], told);
        for (from, to) in [("10.32.0.1", "10.32.1.1:9"), ("fd00:0:0:0::1", "[fd00:0:0:1::1]:9")] {
            let socket = pair.a.socket(from);
            socket.connect(to).unwrap();
            let learned = soon(&format!("{from} learns the MTU of {to}"), || {
                let _ = socket.send(&[0; 2000]);
                let mtu = within(&pair.a.netns, || path_mtu(to.parse().unwrap()));
                (mtu != TUN_MTU as usize).then_some(mtu)
            });
            assert_eq!(learned, usize::from(found), "{from} to {to}");
        }
        assert!(pair.a.datapath.counters().drops[&Drop::TooBig] >= 2);
    }
}

#[test]
fn a_new_table_holds_for_the_next_packet() {
    let pair = Pair::new(["192.0.2.1", "192.0.2.2"], LINK_MTU - 36);
    let (a, b) = (pair.a.socket("10.32.0.1"), pair.b.socket("10.32.1.1"));
    pair.a.tables.store(Arc::default());
    a.send_to(b"lost", b.local_addr().unwrap()).unwrap();
    pair.a.counted(|counters| counters.drops[&Drop::NoRoute] >= 1);
    pair.a.tables.store(Arc::new(table(0, ["192.0.2.1", "192.0.2.2"], LINK_MTU - 36)));
    a.send_to(b"found", b.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 100];
    let len = b.recv(&mut buffer).expect("a packet within 5 s");
    assert_eq!(&buffer[..len], b"found");
}

#[test]
fn the_device_outlives_its_process_and_is_held_by_one() {
    let netns = namespace();
    within(&netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _entered = runtime.enter();
        assert!(!tun::remove("weft0").unwrap(), "there is none");
        let (queues, _) = tun::open("weft0", 1).unwrap();
        assert_eq!(queues.len(), 1);
        let busy = |held: &[tun::Queue]| {
            let error = tun::open("weft0", 2).unwrap_err();
            assert!(matches!(error, TunError::Busy(_)), "{} held: {error}", held.len());
        };
        busy(&queues);
        drop(queues);
        let (queues, _) = tun::open("weft0", 3).unwrap();
        busy(&queues);
        drop(queues);
        assert!(exists("weft0"), "it is persistent");
        assert!(tun::remove("weft0").unwrap());
        assert!(!exists("weft0"));
        let bridge = || {
            netlink(async |netlink| {
                let options = BridgeOptions::default();
                netlink.create_bridge("weft0", Mac([2, 0, 0, 0, 0, 1]), 1500, options).await.unwrap();
            });
        };
        let tap = || drop(Tun::builder().name("weft0").tap().persist().build().unwrap());
        let tun = || drop(Tun::builder().name("weft0").persist().build().unwrap());
        for (what, make) in
            [("a bridge", &bridge as &dyn Fn()), ("a TAP", &tap), ("a TUN of one queue", &tun)]
        {
            make();
            for error in [tun::open("weft0", 2).unwrap_err(), tun::remove("weft0").unwrap_err()] {
                assert!(matches!(error, TunError::NotOurs { .. }), "{what}: {error}");
            }
            delete("weft0");
        }
        assert!(matches!(tun::open("a-name-that-is-too-long", 2), Err(TunError::Name(_))));
    });
}

#[test]
fn a_removed_device_is_reported_and_the_rest_stops() {
    let pair = Pair::new(["192.0.2.1", "192.0.2.2"], LINK_MTU - 36);
    within(&pair.a.netns, || delete("weft0"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let why = runtime.block_on(async {
        tokio::time::timeout(DEADLINE, pair.a.datapath.failed()).await.expect("a report within 5 s")
    });
    assert!(why.contains("TUN device is gone"), "{why}");
    let begin = Instant::now();
    pair.a.datapath.stop();
    assert!(begin.elapsed() < Duration::from_secs(1), "it stops at once");
}

struct Pair {
    a: Node,
    b: Node,
}

struct Node {
    datapath: Datapath,
    tables: Arc<ArcSwap<Table>>,
    netns: File,
    _handshakes: Option<Handshakes>,
    _runtime: tokio::runtime::Runtime,
}

impl Pair {
    /// Each believes that the way to the other takes inner packets of `mtu` bytes; in clear.
    fn new(underlay: [&str; 2], mtu: u16) -> Self {
        Self::start(underlay, mtu, false)
    }

    fn start(underlay: [&str; 2], mtu: u16, sealed: bool) -> Self {
        let (a, b) = (namespace(), namespace());
        within(&a, || {
            netlink(async |netlink| {
                let peer_netns = Some(b.as_fd());
                let (mac, peer_mac, mtu) = (None, None, LINK_MTU.into());
                let pair = VethPair {
                    name: "u",
                    mac,
                    peer_name: "u",
                    peer_mac,
                    peer_netns,
                    mtu,
                    peer_max_segments: None,
                };
                netlink.create_veth(&pair).await.unwrap();
            });
        });
        let [a, b] = [(0, a), (1, b)].map(|(side, netns)| Node::new(side, netns, underlay, mtu, sealed));
        Self { a, b }
    }
}

impl Node {
    fn new(side: usize, netns: File, underlay: [&str; 2], mtu: u16, sealed: bool) -> Self {
        let tables = Arc::new(ArcSwap::from_pointee(table(side, underlay, mtu)));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (datapath, handshakes) = within(&netns, || {
            let _entered = runtime.enter();
            let (queues, offloads) = open("weft0", 2).unwrap();
            let long = if underlay[side].contains(':') { 64 } else { 24 };
            for setting in ["conf/weft0/accept_local", "conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), "1").unwrap();
            }
            netlink(async |netlink| {
                let (u, tun) = (index(&netlink, "u").await, index(&netlink, "weft0").await);
                netlink.set_mtu(tun, TUN_MTU as u32).await.unwrap();
                let inner = [format!("10.32.{side}.1"), format!("fd00:0:0:{side}::1")];
                let inner = inner.map(|address| address.parse::<IpAddr>().unwrap());
                let outer = Prefix::new(underlay[side].parse().unwrap(), long).unwrap();
                let flags = AddressFlags { no_dad: true, no_prefix_route: false };
                for (link, address) in [(u, outer), (tun, inner[0].into()), (tun, inner[1].into())] {
                    netlink.add_address(link, address, flags).await.unwrap();
                }
                for link in [index(&netlink, "lo").await, u, tun] {
                    netlink.set_up(link, true).await.unwrap();
                }
                for (to, source) in [("10.32.0.0/12", inner[0]), ("fd00::/16", inner[1])] {
                    let route = Route::on_link(to.parse().unwrap(), tun);
                    netlink.add_route(&Route { source: Some(source), ..route }).await.unwrap();
                }
            });
            let sockets = bind("[::]:6783".parse().unwrap(), 2).unwrap();
            let handshakes = sealed.then(|| handshakes(side, underlay, &sockets));
            let sealing = handshakes.as_ref().map(|handshakes| handshakes.sealing().clone());
            let config = Config { tun: "weft0".into(), queues, offloads, sockets, linger: LINGER, sealing };
            (spawn(config, tables.clone()).unwrap(), handshakes)
        });
        Self { datapath, tables, netns, _handshakes: handshakes, _runtime: runtime }
    }

    /// A UDP socket on one of this node's addresses that hears of ICMP errors and sends nothing in fragments.
    fn socket(&self, address: &str) -> UdpSocket {
        let address: IpAddr = address.parse().unwrap();
        within(&self.netns, || {
            let socket = UdpSocket::bind(SocketAddr::new(address, 0)).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            match address {
                IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap(),
                IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap(),
            }
            socket
        })
    }

    fn counted(&self, enough: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let mut last = Snapshot::default();
        soon("the counters show it", || {
            last = self.datapath.counters();
            enough(&last).then(|| last.clone())
        })
    }
}

/// The view of one side: data ids 1 and 2, 10.32.0.0/24 and 10.32.1.0/24.
fn table(side: usize, underlay: [&str; 2], mtu: u16) -> Table {
    let other = 1 - side;
    let peer = Peer {
        name: ["a", "b"][other].parse().unwrap(),
        data_id: DataId(other as u32 + 1),
        endpoint: Some(SocketAddr::new(underlay[other].parse().unwrap(), 6783)),
        relay: None,
        mtu,
    };
    let ranges = [(side, Owner::Me), (other, Owner::Peer(0))].into_iter().flat_map(|(number, owner)| {
        let prefixes = [format!("10.32.{number}.0/24"), format!("fd00:0:0:{number}::/64")];
        prefixes.map(|prefix| (prefix.parse().unwrap(), owner))
    });
    Table::new(Inputs {
        me: DataId(side as u32 + 1),
        peers: [peer].into(),
        ranges: ranges.collect(),
        held: vec![],
        bridge: [format!("10.32.{side}.1"), format!("fd00:0:0:{side}::1")]
            .iter()
            .map(|address| address.parse().unwrap())
            .collect(),
        pods: vec![],
    })
}

/// Agrees on keys with the other side.
fn handshakes(side: usize, underlay: [&str; 2], sockets: &[Vec<Socket>]) -> Handshakes {
    let other = 1 - side;
    let name = |side: usize| ["a", "b"][side].parse().unwrap();
    let secret = |side: usize| DataSecret::new([side as u8 + 1; 32]);
    let config = handshake::Config {
        name: name(side),
        secret: secret(side),
        key: data_key(&secret(side)),
        incarnation: Incarnation(1),
        algorithm: Algorithm::preferred(),
        lanes: sockets.iter().map(Vec::len).sum::<usize>() as u8,
        random: session_task::random(),
    };
    let peer = handshake::Peer {
        name: name(other),
        key: data_key(&secret(other)),
        incarnation: Incarnation(1),
        endpoint: Some(SocketAddr::new(underlay[other].parse().unwrap(), 6783)),
    };
    let (_, peers) = tokio::sync::watch::channel(vec![peer]);
    session_task::spawn(config, &sockets[0][0], peers, sockets.len(), Arc::default(), None).unwrap()
}

fn namespace() -> File {
    assert!(nix::unistd::geteuid().is_root(), "the netns tests make network namespaces: run them as root");
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace");
        File::open("/proc/thread-self/ns/net").expect("open it")
    });
    made.join().unwrap()
}

/// Runs `work` in a thread inside the namespace; what it opens there stays there.
fn within<T: Send>(netns: &File, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs netlink calls in the calling thread's namespace.
fn netlink<T>(work: impl AsyncFnOnce(Netlink) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { work(Netlink::open().unwrap()).await })
}

async fn index(netlink: &Netlink, name: &str) -> u32 {
    netlink.link_by_name(name).await.unwrap().index
}

fn exists(name: &str) -> bool {
    netlink(async |netlink| netlink.link_by_name(name).await.is_ok())
}

fn delete(name: &str) {
    netlink(async |netlink| netlink.delete_link(index(&netlink, name).await).await.unwrap());
}

/// What the kernel knows of the way there, in bytes.
fn path_mtu(to: SocketAddr) -> usize {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    Socket::bind_workers(any.parse().unwrap(), 1, 1, 0).unwrap()[0][0].path_mtu(to).unwrap()
}

/// Asks again until there is an answer.
fn soon<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

const DEADLINE: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_micros(100);
const LINK_MTU: u16 = 1500;
const TUN_MTU: i32 = 9000;
