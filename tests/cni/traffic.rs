//! What ADD promises about packets: the pod is reached, alone with its own addresses, and inherits nothing.

use crate::harness::{Harness, Pod, eventually, gateway, inside};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt, socket,
    sockopt,
};
use serde_json::json;
use std::{
    net::{IpAddr, Ipv6Addr, SocketAddrV6, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};
use weft::{
    linux::{
        netlink::{AddressFlags, Conntrack, Family, Netlink, Route},
        netns::Netns,
        sysctl,
    },
    types::{Mac, Prefix},
};

/// A node with attached pods: the first has 10.32.0.2, and so on.
fn attached<const N: usize>() -> (Harness, [Pod; N]) {
    let h = Harness::start();
    let pods = std::array::from_fn(|n| {
        let pod = Pod::new(&format!("c{n}"));
        h.add(&pod, &h.conf()).result();
        pod
    });
    (h, pods)
}

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 32, 0, last])
}

fn bound(place: &Netns, address: IpAddr) -> UdpSocket {
    let socket = place.enter(|| UdpSocket::bind((address, PORT)).unwrap()).unwrap();
    socket.set_read_timeout(Some(WITHIN)).unwrap();
    socket
}

fn send(place: &Netns, from: IpAddr, to: IpAddr, text: &str) {
    let socket = place.enter(|| UdpSocket::bind((from, 0)).unwrap()).unwrap();
    // What the firewall drops may be told to the sender.
    let _ = socket.send_to(text.as_bytes(), (to, PORT));
}

/// The next datagram.
fn receive(socket: &UdpSocket) -> (String, IpAddr) {
    let mut buffer = [0; 64];
    let (length, from) = loop {
        match socket.recv_from(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            received => break received.expect("a datagram in time"),
        }
    };
    (String::from_utf8_lossy(&buffer[..length]).into(), from.ip())
}

fn connect(place: &Netns, to: &str) -> std::io::Result<TcpStream> {
    place.enter(|| TcpStream::connect_timeout(&to.parse().unwrap(), WITHIN)).unwrap()
}

#[test]
fn node_and_pods_of_one_node_reach_each_other() {
    let (h, [one, two]) = attached();
    let (at_one, at_two, at_node) =
        (bound(&one.netns, ip(2)), bound(&two.netns, ip(3)), bound(h.node(), gateway()));
    send(&one.netns, ip(2), ip(3), "pod to pod");
    assert_eq!(receive(&at_two), ("pod to pod".into(), ip(2)));
    send(&two.netns, ip(3), gateway(), "pod to node");
    assert_eq!(receive(&at_node), ("pod to node".into(), ip(3)));
    send(h.node(), gateway(), ip(2), "node to pod");
    assert_eq!(receive(&at_one), ("node to pod".into(), gateway()));
    send(&one.netns, ip(2), ip(2), "to itself");
    assert_eq!(receive(&at_one), ("to itself".into(), ip(2)));
}

/// The pod's own Service, and another's, as kube-proxy has them: NAT to an endpoint on this node. Where `br_netfilter` is
/// on, it is switched, else routed.
#[test]
fn services_lead_to_pods_of_the_node_and_back_to_the_pod_itself() {
    let (h, [one, two]) = attached();
    h.nft(
        "table ip service {
           chain to {
             type nat hook prerouting priority dstnat
             ip daddr 10.96.0.2 tcp dport 80 dnat to 10.32.0.2:8080
             ip daddr 10.96.0.3 tcp dport 80 dnat to 10.32.0.3:8080
           }
           chain from {
             type nat hook postrouting priority srcnat
             ip saddr 10.32.0.2 ip daddr 10.32.0.2 masquerade
           }
         }",
    );
    let listen = |pod: &Pod, to: &str| pod.netns.enter(|| TcpListener::bind(to).unwrap()).unwrap();
    let (at_one, at_two) = (listen(&one, "10.32.0.2:8080"), listen(&two, "10.32.0.3:8080"));
    let switched = h.node().enter(|| sysctl::read(BRIDGE_NF).unwrap().is_some()).unwrap();
    for on in if switched { &["1", "0"][..] } else { &["0"] } {
        if switched {
            h.node().enter(|| sysctl::write(BRIDGE_NF, on).unwrap()).unwrap();
        }
        connect(&one.netns, "10.96.0.3:80").unwrap_or_else(|error| panic!("to another pod, {on}: {error}"));
        assert_eq!(at_two.accept().unwrap().1.ip(), ip(2));
        connect(&one.netns, "10.96.0.2:80").unwrap_or_else(|error| panic!("to itself, {on}: {error}"));
        assert_eq!(at_one.accept().unwrap().1.ip(), gateway());
    }
}

#[test]
fn packets_with_anothers_address_or_mac_are_dropped() {
    let (h, [one, two]) = attached();
    let (at_two, at_node) = (bound(&two.netns, ip(3)), bound(h.node(), gateway()));
    // Each spoofed packet is followed by an honest one, which must be the first to come.
    let honest = || {
        send(&one.netns, ip(2), ip(3), "honest");
        assert_eq!(receive(&at_two), ("honest".into(), ip(2)));
        send(&one.netns, ip(2), gateway(), "honest");
        assert_eq!(receive(&at_node), ("honest".into(), ip(2)));
    };
    let own_mac = one.link("eth0").unwrap().mac.unwrap();
    inside(&one.netns, async |netlink| {
        let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
        for another in [ip(9), ip(3)] {
            netlink.add_address(eth0, Prefix::from(another), AddressFlags::default()).await.unwrap();
        }
    });
    for another in [ip(9), ip(3)] {
        send(&one.netns, another, gateway(), "another's address");
        if another != ip(3) {
            send(&one.netns, another, ip(3), "another's address");
        }
    }
    inside(&one.netns, async |netlink| {
        let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
        netlink.delete_address(eth0, Prefix::from(ip(3))).await.unwrap();
    });
    honest();
    let with_mac = |mac: Mac| {
        let bridge = h.bridge_mac();
        inside(&one.netns, async move |netlink| {
            let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
            netlink.set_mac(eth0, mac).await.unwrap();
            // Or the packet would wait for ARP until the MAC is right again.
            netlink.set_neighbour(eth0, gateway(), bridge).await.unwrap();
        });
    };
    with_mac(Mac([2, 6, 6, 6, 6, 6]));
    for to in [ip(3), gateway()] {
        send(&one.netns, ip(2), to, "another's MAC");
    }
    with_mac(own_mac);
    honest();
    // Past the gateway.
    let (mac, to_two) = (two.link("eth0").unwrap().mac.unwrap(), Prefix::from(ip(3)));
    let past = inside(&one.netns, async |netlink| {
        let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
        let route = Route::on_link(to_two, eth0);
        netlink.set_neighbour(eth0, ip(3), mac).await.unwrap();
        netlink.add_route(&route).await.unwrap();
        route
    });
    send(&one.netns, ip(2), ip(3), "past the gateway");
    inside(&one.netns, async |netlink| netlink.delete_route(&past).await.unwrap());
    honest();
}

fn connections(h: &Harness, address: IpAddr) -> usize {
    h.node().enter(|| Conntrack::open().unwrap().connections(address).unwrap()).unwrap()
}

/// Sends something beyond the node, so that the kernel tracks it.
fn speak(h: &Harness, pod: &Pod) {
    eventually("the kernel tracks the connection", || {
        send(&pod.netns, ip(2), h.node.address(), "to be remembered");
        connections(h, ip(2)) > 0
    });
}

#[test]
fn connections_are_forgotten_with_the_pod() {
    let (h, [pod]) = attached();
    speak(&h, &pod);
    h.del(&pod, &h.conf()).silence();
    eventually("the kernel has forgotten them", || connections(&h, ip(2)) == 0);
}

#[test]
fn a_pod_inherits_no_connections_with_its_address() {
    let (h, [pod]) = attached();
    speak(&h, &pod);
    // The agent that comes back has never seen this pod.
    h.kill_agent();
    h.del(&pod, &h.conf()).silence();
    h.start_agent();
    eventually("the tombstone is worked off", || h.tombstones().is_empty());
    let mut conf = h.conf();
    conf["runtimeConfig"] = json!({"ips": ["10.32.0.2"]});
    h.add(&Pod::new("c9"), &conf).result();
    assert_eq!(connections(&h, ip(2)), 0);
}

#[test]
fn router_advertisements_do_not_change_the_pod() {
    let (h, [pod]) = attached();
    let eth0 = pod.link("eth0").unwrap();
    let addresses = |netlink: Netlink| async move {
        let addresses = netlink.addresses().await.unwrap().into_iter().filter(|held| held.link == eth0.index);
        addresses.map(|held| held.address.addr()).collect::<Vec<_>>()
    };
    let link_local = |address: &IpAddr| matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local());
    eventually("it has a link-local address", || inside(&pod.netns, addresses).iter().any(link_local));
    let before = inside(&pod.netns, addresses);
    let Some(IpAddr::V6(to)) = before.iter().copied().find(link_local) else { unreachable!("just seen") };

    let veth = h.veths()[0].clone();
    inside(h.node(), async |netlink| {
        let router: Prefix = "fe80::99/64".parse().unwrap();
        let flags = AddressFlags { no_dad: true, no_prefix_route: false };
        netlink.add_address(veth.index, router, flags).await.unwrap();
        netlink.set_neighbour(veth.index, to.into(), eth0.mac.unwrap()).await.unwrap();
    });
    let advertise = || h.node().enter(|| advertise(&veth.name, veth.index, to)).unwrap();
    eventually("an advertisement arrives", || {
        advertise();
        advertisements(&pod) > 0
    });
    let default = || {
        let routes = inside(&pod.netns, async |netlink| netlink.routes(Family::V6).await.unwrap());
        routes.iter().any(Route::is_default)
    };
    assert!(!default() && inside(&pod.netns, addresses) == before);
    // That is not because it could not have worked.
    pod.netns.enter(|| ["accept_ra", "autoconf"].map(allow)).unwrap();
    eventually("a pod that allows it follows the advertisement", || {
        advertise();
        default() && inside(&pod.netns, addresses).len() > before.len()
    });
}

fn allow(key: &str) {
    sysctl::write(&format!("net/ipv6/conf/eth0/{key}"), "1").unwrap();
}

/// Sends a router advertisement (RFC 4861, 4.2) with a prefix (4.6.2), straight onto the veth.
fn advertise(device: &str, index: u32, to: Ipv6Addr) {
    let prefix: Ipv6Addr = "2001:db8:1::".parse().unwrap();
    let router = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    let option = [3, 4, 64, 0xc0, 0, 0, 0x07, 0x08, 0, 0, 0x07, 0x08, 0, 0, 0, 0];
    let message = [&router[..], &option, &prefix.octets()].concat();
    let raw =
        socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6).unwrap();
    setsockopt(&raw, sockopt::BindToDevice, &device.into()).unwrap();
    setsockopt(&raw, sockopt::Ipv6Ttl, &255).unwrap();
    let to = SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, index));
    sendto(raw.as_raw_fd(), &message, &to, MsgFlags::empty()).unwrap();
}

/// How many have come to the pod.
fn advertisements(pod: &Pod) -> u64 {
    let read = || std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap();
    let counters = pod.netns.enter(read).unwrap();
    let line = counters.lines().find_map(|line| line.strip_prefix("Icmp6InRouterAdvertisements"));
    line.expect("the kernel counts them").trim().parse().unwrap()
}

/// Has bridged packets pass the hooks of routed ones.
const BRIDGE_NF: &str = "net/bridge/bridge-nf-call-iptables";
const PORT: u16 = 9999;
const WITHIN: Duration = Duration::from_secs(5);
