//! Services over the overlay, by rules of the form that kube-proxy's nftables mode writes on every node.
//!
//! ```text
//!   n1  client, both      Service web  10.96.0.80:80, node port 30080 ─▶ n2/p1     from anywhere
//!   n2  server            Service near 10.96.0.81:80, node port 30081 ─▶ n2/p1     externalTrafficPolicy Local
//!   n3  another DNS       Service self 10.96.0.82:80                  ─▶ n1/p1     leads back
//!                         Service dns  10.96.0.53:53                  ─▶ n2/p2, n3/p1
//!                         Service api  10.96.0.1:443                  ─▶ n1 itself, as the API server's
//! ```
use std::{
    fmt::Write,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use weft_lab::{Lab, fault, namespace::Netns, node::Node, pod::Pod, wait};

use crate::cluster::SOON;

struct Cluster {
    lab: Lab,
    client: Arc<Pod>,
    server: Arc<Pod>,
}

impl Cluster {
    fn start() -> Self {
        Self::with_proxies_for(UNIVERSE)
    }

    /// The proxies take that range for the pods'.
    fn with_proxies_for(range: &str) -> Self {
        let lab = Lab::builder().nodes(3).pods(2).start().unwrap();
        let (client, server) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
        let services = [
            Service::new("web", 80, "tcp", 80, &[&server]).node_port(30080),
            Service { local: true, ..Service::new("near", 81, "tcp", 80, &[&server]).node_port(30081) },
            Service::new("self", 82, "tcp", 80, &[&client]),
            Service::new("dns", 53, "udp", 53, &[&lab.pod("n2/p2").unwrap(), &lab.pod("n3/p1").unwrap()]),
            Service::api(&lab.node("n1").unwrap()),
        ];
        for node in lab.nodes() {
            fault::nft(node.netns(), &rules(&node, &services, range)).unwrap();
        }
        Self { lab, client, server }
    }

    fn node(&self, name: &str) -> Arc<Node> {
        self.lab.node(name).unwrap()
    }

    /// Whom the server pod sees when `from` connects to the target.
    fn seen(&self, from: &Netns, target: impl Into<SocketAddr>) -> IpAddr {
        seen(from, &self.server, target.into()).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Whom a process of the node's own sees there.
    fn seen_by_host(&self, from: &Netns, node: &Node, target: impl Into<SocketAddr>) -> IpAddr {
        let listen = (node.address(), API_PORT).into();
        seen_at(from, node.netns(), listen, target.into()).unwrap_or_else(|error| panic!("{error:#}"))
    }
}

#[test]
fn pods_and_nodes_reach_services_and_pods_are_seen_as_themselves() {
    let cluster = Cluster::start();
    let (client, server) = (&cluster.client, &cluster.server);
    let own = client.address().unwrap();
    assert_eq!(cluster.seen(client.netns(), (WEB, 80)), own, "to a pod of another node");
    let neighbour = cluster.lab.pod("n2/p2").unwrap();
    assert_eq!(cluster.seen(neighbour.netns(), (WEB, 80)), neighbour.address().unwrap(), "of the same node");
    // Behind a Service that leads back, a pod can't see its own address: it would not answer over the network.
    seen(client.netns(), client, (LOOP, 80).into()).unwrap();

    // A host's process, as the API server that calls a webhook: to its own node's pod, and to another's.
    for node in ["n2", "n1"].map(|name| cluster.node(name)) {
        let whom = cluster.seen(node.netns(), (WEB, 80));
        let bridge: IpAddr = node.status().unwrap()["bridge_address"].as_str().unwrap().parse().unwrap();
        assert!(whom == bridge || whom == node.address(), "{} is seen as {whom}", node.name());
    }
    cluster.seen(server.netns(), (WEB, 80));
    cluster.lab.finish().unwrap();
}

#[test]
fn pods_reach_the_api_server_and_their_own_node() {
    let cluster = Cluster::start();
    let server = cluster.node("n1");
    for pod in ["n1/p1", "n2/p1", "n3/p1"].map(|name| cluster.lab.pod(name).unwrap()) {
        let node = pod.node();
        let whom = cluster.seen_by_host(pod.netns(), &server, (API, 443));
        let known_as = if node.name() == "n1" { pod.address().unwrap() } else { node.address() };
        assert_eq!(whom, known_as, "{} at the API server", pod.full_name());
        let whom = cluster.seen_by_host(pod.netns(), node, (node.address(), API_PORT));
        assert_eq!(whom, pod.address().unwrap(), "{} at its own node", pod.full_name());
        cluster.seen_by_host(node.netns(), &server, (API, 443));
    }
    cluster.lab.finish().unwrap();
}

#[test]
fn a_proxy_that_knows_another_range_cuts_nobody_off() {
    let cluster = Cluster::with_proxies_for("10.244.0.0/16");
    let (client, neighbour) = (&cluster.client, cluster.lab.pod("n2/p2").unwrap());
    let hosts = ["n1", "n2", "n3"].map(|name| cluster.node(name));
    let pods = [client.netns(), cluster.server.netns(), neighbour.netns()];
    for from in pods.into_iter().chain(hosts.iter().map(|node| node.netns())) {
        cluster.seen(from, (WEB, 80));
        cluster.seen_by_host(from, &hosts[0], (API, 443));
        hosts.iter().for_each(|node| _ = cluster.seen(from, (node.address(), 30080)));
    }
    seen(client.netns(), client, (LOOP, 80).into()).unwrap();
    cluster.lab.finish().unwrap();
}

#[test]
fn node_ports_work_on_every_node_and_keep_the_client_where_the_policy_is_local() {
    let cluster = Cluster::start();
    let outside = &cluster.lab.underlay().outside;
    for node in ["n1", "n2", "n3"].map(|name| cluster.node(name)) {
        cluster.seen(outside, (node.address(), 30080));
        cluster.seen(cluster.client.netns(), (node.address(), 30080));
    }
    let (with, without) = (cluster.node("n2").address(), cluster.node("n3").address());
    assert_eq!(cluster.seen(outside, (with, 30081)), cluster.lab.underlay().outside_address());
    let connect =
        || Ok(TcpStream::connect_timeout(&(without, 30081).into(), Duration::from_millis(300)).is_err());
    assert!(outside.run(connect).unwrap(), "a node without an endpoint does not answer");
    let near = cluster.lab.pod("n3/p2").unwrap();
    let whom = cluster.seen(near.netns(), (without, 30081));
    assert_eq!(whom, near.address().unwrap(), "its own pods get to the endpoint all the same");
    cluster.lab.finish().unwrap();
}

#[test]
fn of_two_hundred_parallel_lookups_none_waits_for_a_second_try() {
    let cluster = Cluster::start();
    let servers = ["n2/p2", "n3/p1"].map(|name| Resolver::start(&cluster.lab.pod(name).unwrap()));
    let ask = |from: &Netns| {
        // Once, so that sessions and neighbours are there.
        wait::until("the resolver answers", SOON, || from.run(lookup)).unwrap();
        let slowest = thread::scope(|scope| {
            let threads: Vec<_> = (0..LOOKUPS).map(|_| scope.spawn(|| from.run(lookup).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        });
        assert!(
            slowest < RETRY / 2,
            "the slowest of {LOOKUPS} lookups from {} took {slowest:?}",
            from.name()
        );
    };
    ask(cluster.client.netns());
    ask(cluster.lab.pod("n3/p2").unwrap().netns());
    ask(cluster.node("n1").netns());
    drop(servers);
    cluster.lab.finish().unwrap();
}

/// One name, as the C library asks for it: both families at once, from one socket.
fn lookup() -> anyhow::Result<Duration> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((DNS, 53))?;
    socket.set_read_timeout(Some(RETRY))?;
    let start = Instant::now();
    for id in [1, 2] {
        socket.send(&question(id))?;
    }
    let mut missing = vec![1, 2];
    while !missing.is_empty() {
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).context("no answer")?;
        ensure!(length > 12 && answer[2] & 0x80 != 0, "that is no answer");
        missing.retain(|id| *id != answer[1]);
    }
    Ok(start.elapsed())
}

/// RFC 1035: a header that asks for recursion, then `a.` of class IN, type A or AAAA.
fn question(id: u8) -> Vec<u8> {
    let kind = if id == 1 { 1 } else { 28 };
    [&[0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[1, b'a', 0, 0, kind, 0, 1]].concat()
}

/// Answers that there is no such name, as most answers in a cluster are.
struct Resolver {
    done: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Resolver {
    fn start(pod: &Pod) -> Self {
        let socket = pod.netns().run(|| Ok(UdpSocket::bind((pod.address()?, 53))?)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let done = Arc::clone(&done);
            move || {
                let mut packet = [0; 512];
                while !done.load(Ordering::Relaxed) {
                    match socket.recv_from(&mut packet) {
                        Ok((length, client)) => {
                            (packet[2], packet[3]) = (0x81, 0x83);
                            socket.send_to(&packet[..length], client).unwrap();
                        }
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
            }
        });
        Self { done, thread: Some(thread) }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn seen(from: &Netns, server: &Pod, target: SocketAddr) -> anyhow::Result<IpAddr> {
    seen_at(from, server.netns(), (server.address()?, 80).into(), target)
}

fn seen_at(from: &Netns, server: &Netns, listen: SocketAddr, target: SocketAddr) -> anyhow::Result<IpAddr> {
    let what = format!("from {} to {target}", from.name());
    // Of the listener before, a process that is just being started may still have a copy.
    let listener = wait::until(&what, SOON, || server.run(|| Ok(TcpListener::bind(listen)?)))?;
    listener.set_nonblocking(true)?;
    let _connection = wait::until(&what, SOON, || {
        from.run(|| Ok(TcpStream::connect_timeout(&target, Duration::from_secs(2))?))
    })?;
    let accept = || match listener.accept() {
        Ok((_, client)) => Ok(client.ip()),
        Err(error) => bail!("{error}"),
    };
    wait::until(&what, SOON, accept)
}

struct Service {
    name: &'static str,
    address: Ipv4Addr,
    port: u16,
    node_port: Option<u16>,
    protocol: &'static str,
    /// `externalTrafficPolicy: Local`.
    local: bool,
    /// Address, port, node.
    endpoints: Vec<(IpAddr, u16, String)>,
}

impl Service {
    fn new(name: &'static str, host: u8, protocol: &'static str, port: u16, pods: &[&Arc<Pod>]) -> Self {
        let endpoint = |pod: &&Arc<Pod>| (pod.address().unwrap(), port, pod.node().name().to_string());
        let endpoints = pods.iter().map(endpoint).collect();
        let address = Ipv4Addr::new(10, 96, 0, host);
        Self { name, address, port, node_port: None, protocol, local: false, endpoints }
    }

    /// Its endpoint is no pod.
    fn api(node: &Node) -> Self {
        let endpoints = vec![(node.address(), API_PORT, node.name().to_string())];
        Self { endpoints, ..Self::new("api", 1, "tcp", 443, &[]) }
    }

    fn node_port(self, port: u16) -> Self {
        Self { node_port: Some(port), ..self }
    }
}

/// The table that the proxy of that node would keep.
fn rules(node: &Node, services: &[Service], range: &str) -> String {
    let (mut chains, mut cluster_ips, mut node_ports) = (String::new(), Vec::new(), Vec::new());
    for service in services {
        let Service { name, address, port, protocol, .. } = service;
        cluster_ips.push(format!("{address} . {protocol} . {port} : goto service-{name}"));
        for (number, (pod, target, _)) in service.endpoints.iter().enumerate() {
            writeln!(
                chains,
                "chain endpoint-{name}-{number} {{ ip saddr {pod} jump mark-for-masquerade
                 meta l4proto {protocol} dnat to {pod}:{target}; }}"
            )
            .unwrap();
        }
        let among = |endpoints: &[usize]| {
            let verdict = |(at, number): (usize, &usize)| format!("{at} : goto endpoint-{name}-{number}");
            let verdicts: Vec<_> = endpoints.iter().enumerate().map(verdict).collect();
            match endpoints.len() {
                0 => "drop".to_string(),
                count => format!("numgen random mod {count} vmap {{ {} }}", verdicts.join(", ")),
            }
        };
        let all: Vec<usize> = (0..service.endpoints.len()).collect();
        writeln!(
            chains,
            "chain service-{name} {{ ip daddr {address} ip saddr != {range} jump mark-for-masquerade
             {}; }}",
            among(&all)
        )
        .unwrap();
        if let Some(node_port) = service.node_port {
            node_ports.push(format!("{protocol} . {node_port} : goto external-{name}"));
            let here: Vec<usize> =
                all.iter().copied().filter(|at| service.endpoints[*at].2 == node.name()).collect();
            let external = match service.local {
                false => format!("jump mark-for-masquerade\ngoto service-{name}"),
                true => format!(
                    "ip saddr {range} goto service-{name}
                     fib saddr type local jump mark-for-masquerade
                     fib saddr type local goto service-{name}
                     {}",
                    among(&here)
                ),
            };
            writeln!(chains, "chain external-{name} {{ {external}; }}").unwrap();
        }
    }
    format!(
        "table ip kube-proxy {{
           chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
           {chains}
           map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {} }}; }}
           map service-nodeports {{ type inet_proto . inet_service : verdict; elements = {{ {} }}; }}
           chain services {{
             ip daddr . meta l4proto . th dport vmap @service-ips
             ip daddr {} meta l4proto . th dport vmap @service-nodeports
           }}
           chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
           chain nat-output {{ type nat hook output priority -100; jump services; }}
           chain nat-postrouting {{
             type nat hook postrouting priority srcnat
             meta mark & 0x4000 == 0 return
             meta mark set meta mark ^ 0x4000
             masquerade fully-random
           }}
         }}",
        cluster_ips.join(", "),
        node_ports.join(", "),
        node.address(),
    )
}

const API: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const API_PORT: u16 = 6443;
const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
const LOOP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 82);
const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 53);
const UNIVERSE: &str = "10.32.0.0/12";
const LOOKUPS: usize = 200;
/// After which the C library asks again.
const RETRY: Duration = Duration::from_secs(5);
