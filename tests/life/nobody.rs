//! Packets that have nowhere to go, or may not go there.
use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    sync::Arc,
};

use weft_lab::{Lab, node::Node, pod::Pod, traffic, wait};

use crate::{
    harness::{SHORT, SOON, START, attached, device_packets, icmp_about, lab, metric, reaches},
    kernel::Kernel,
};

#[test]
fn a_packet_for_nobody_is_answered_and_goes_nowhere() {
    let lab = Lab::builder().nodes(2).without_agents().start().unwrap();
    let node = lab.node("n1").unwrap();
    for node in lab.nodes() {
        // A third of the universe is a node's that never came.
        node.configure(|settings| settings.seed = Some("n1,n2,n9".into()));
        node.start_agent().unwrap();
    }
    lab.nodes().iter().for_each(|node| node.wait_ready(START).unwrap());
    let pod = attached(&lab, &node);
    let ipam = node.weft_json("ipam").unwrap();
    let of = |owner: &str| -> Ipv4Addr {
        let range = ipam["ranges"].as_array().unwrap().iter().find(|range| range["owner"] == owner).unwrap();
        let prefix: ipnet::Ipv4Net = range["prefix"].as_str().unwrap().parse().unwrap();
        Ipv4Addr::from(u32::from(prefix.network()) + 99)
    };

    let dropped = metric(&node, NO_ROUTE).unwrap();
    let error = icmp_about(pod.netns(), of("n9"), 3, SOON).unwrap();
    assert_eq!((error.kind, error.code), (DESTINATION_UNREACHABLE, HOST_UNREACHABLE), "{error:?}");
    assert!(metric(&node, NO_ROUTE).unwrap() > dropped);

    // Of its own node: the kernel answers, and the packet never reaches the TUN.
    let before = device_packets(&node, "weft0").unwrap();
    let error = icmp_about(pod.netns(), of("n1"), PACKETS, SOON).unwrap();
    assert_eq!(error.kind, DESTINATION_UNREACHABLE, "{error:?}");
    assert!(error.ttl >= 63, "it went round: {error:?}");
    let through = device_packets(&node, "weft0").unwrap() - before;
    assert!(through < PACKETS as u64 / 2, "{through} packets went over weft0");

    // Of another node, which has no such pod: that node answers, or says nothing; nothing comes back over and over.
    let elsewhere = lab.node("n2").unwrap();
    let bridge: IpAddr = elsewhere.status().unwrap()["bridge_address"].as_str().unwrap().parse().unwrap();
    wait::until("the nodes have keys for each other", SOON, || pod.ping(bridge, SHORT)).unwrap();
    let before = device_packets(&elsewhere, "weft0").unwrap();
    let sent = metric(&node, "weft_packets_total{direction=\"sent\"}").unwrap();
    let _ = icmp_about(pod.netns(), of("n2"), PACKETS, SHORT);
    wait::until("they arrive", SOON, || {
        let sent = metric(&node, "weft_packets_total{direction=\"sent\"}")? - sent;
        anyhow::ensure!(sent >= PACKETS as f64, "{sent}");
        Ok(())
    })
    .unwrap();
    let through = device_packets(&elsewhere, "weft0").unwrap() - before;
    assert!(through <= 2 * PACKETS as u64, "{through} packets went over weft0");
    let sent = metric(&node, "weft_packets_total{direction=\"sent\"}").unwrap() - sent;
    assert!(sent <= 2.0 * PACKETS as f64, "{sent} packets were sent");
}

#[test]
fn a_pod_cannot_speak_with_anothers_address() {
    let lab = lab(2, 2);
    let (pod, other) = (lab.pod("n1/p1").unwrap(), lab.pod("n1/p2").unwrap());
    let target = lab.pod("n2/p1").unwrap();
    reaches(&pod, &target);
    let IpAddr::V4(stolen) = other.address().unwrap() else { panic!("IPv4") };
    let stolen_net = ipnet::IpNet::new(stolen.into(), 32).unwrap();
    pod.netns().links(async |links| links.address("eth0", stolen_net).await).unwrap();

    let to = target.address().unwrap();
    let server = target.netns().run(|| Ok(UdpSocket::bind((to, 7000))?)).unwrap();
    let send = |from: IpAddr, what: &[u8]| {
        let sent = pod.netns().run(|| {
            let socket = UdpSocket::bind((from, 0))?;
            Ok(socket.send_to(what, (to, 7000))?)
        });
        sent.unwrap();
    };
    let dropped = frames_dropped(&pod);
    send(stolen.into(), b"stolen");
    send(pod.address().unwrap(), b"own");
    // They take the same way, one after the other.
    server.set_read_timeout(Some(SOON)).unwrap();
    let mut buffer = [0; 100];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"own"[..], pod.address().unwrap()));
    assert!(frames_dropped(&pod) > dropped);
    reaches(&other, &target);
}

#[test]
fn underlay_forwarding_and_masquerade_are_left_alone_where_asked() {
    let lab = Lab::builder().nodes(1).without_agents().start().unwrap();
    let node = lab.node("n1").unwrap();
    let forwarding = |value: &str| Kernel::of(&node).shows(&format!("conf/eth0/forwarding = {value}"));
    node.netns().sysctl("net/ipv4/conf/eth0/forwarding", "0").unwrap();
    let ipv4 = |value: u8| format!("/proc/sys/net/ipv4/conf/eth0/forwarding = {value}");
    let (underlay, outside) = (lab.underlay(), lab.underlay().outside_address());

    node.configure(|settings| {
        let more = ["--underlay-forwarding", "off", "--no-masquerade", "198.51.100.0/24"];
        settings.more.extend(more.map(String::from));
    });
    start(&node);
    assert!(Kernel::of(&node).shows(&ipv4(0)), "forwarding was turned on");
    let pod = attached(&lab, &node);

    node.netns().sysctl("net/ipv4/conf/eth0/forwarding", "1").unwrap();
    let back =
        async |links: &weft_lab::links::Links| links.route("10.32.0.0/12".parse()?, node.address()).await;
    underlay.netns.links(back).unwrap();
    let seen = traffic::seen_as(pod.netns(), &underlay.outside, outside, SOON).unwrap();
    assert_eq!(seen, pod.address().unwrap());

    node.stop_agent().unwrap();
    node.netns().sysctl("net/ipv4/conf/eth0/forwarding", "0").unwrap();
    node.configure(|settings| settings.more.clear());
    start(&node);
    assert!(forwarding("1") && Kernel::of(&node).shows(&ipv4(1)), "forwarding is off");
    let seen = traffic::seen_as(pod.netns(), &underlay.outside, outside, SOON).unwrap();
    assert_eq!(seen, node.address());
}

fn start(node: &Arc<Node>) {
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
}

/// What the bridge's table has dropped on the pod's node.
fn frames_dropped(pod: &Pod) -> u64 {
    let nft = weft_lab::tools::find("nft").unwrap();
    let mut list = std::process::Command::new(nft);
    list.args(["list", "table", "bridge", "weft"]);
    let text = String::from_utf8(pod.node().exec(list).unwrap().stdout).unwrap();
    let counters = text.split("counter packets ").skip(1);
    counters.map(|after| after.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

const NO_ROUTE: &str = "weft_drops_total{reason=\"no_route\"}";
const DESTINATION_UNREACHABLE: u8 = 3;
const HOST_UNREACHABLE: u8 = 1;
const PACKETS: usize = 20;
