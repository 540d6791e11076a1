//! Nodes that come from another network, by the commands of the pages in `deploy`.
use std::{fs, path::Path, process::Command, sync::Arc};

use weft_lab::{Lab, namespace::Netns, node::Node, pod::Pod, tools, traffic, wait};

use crate::harness::{SHORT, SOON, START, attached};

#[test]
fn beside_flannel_all_pods_reach_each_other_until_it_is_gone() {
    let lab = Lab::builder().nodes(2).without_agents().start().unwrap();
    let nodes = lab.nodes();
    let conf = tempfile::tempdir().unwrap();
    let flannels = [flannel(&nodes[0], 1, &nodes[1]), flannel(&nodes[1], 2, &nodes[0])];
    let theirs = ["10.244.1.5", "10.244.2.5"].map(|address| address.parse().unwrap());
    fs::write(conf.path().join("10-flannel.conflist"), "{}").unwrap();
    reach(&flannels[0], theirs[1]);

    nodes[0].configure(|settings| settings.universe = Some("10.244.0.0/16".into()));
    nodes[0].start_agent().unwrap();
    assert!(!nodes[0].wait_agent_end(START).unwrap().success());
    assert!(nodes[0].log().contains("overlaps this host's route"), "{}", nodes[0].log());
    for node in &nodes {
        node.configure(|settings| {
            settings.universe = None;
            settings.more.extend(["--cni-conf-dir".into(), conf.path().display().to_string()]);
        });
        node.start_agent().unwrap();
    }
    nodes.iter().for_each(|node| node.wait_ready(START).unwrap());
    nodes[0].wait_warning("10-flannel.conflist", SOON).unwrap();
    run_page(&nodes[0], "migrate-flannel.md", "3. ", conf.path());
    assert!(!conf.path().join("10-flannel.conflist").exists());

    let ours: Vec<Arc<Pod>> = nodes.iter().map(|node| attached(&lab, node)).collect();
    let all = theirs.into_iter().chain(ours.iter().map(|pod| pod.address().unwrap()));
    for to in all {
        flannels.iter().chain(ours.iter().map(|pod| pod.netns())).for_each(|from| reach(from, to));
    }

    drop(flannels);
    for node in &nodes {
        run_page(node, "migrate-flannel.md", "4. ", conf.path());
        let left = sh(node, "ip link; ip route; iptables-save; nft list tables");
        assert!(!left.contains("flannel") && !left.contains("FLANNEL") && !left.contains("cni0"), "{left}");
    }
    reach(ours[0].netns(), ours[1].address().unwrap());
    reach(ours[1].netns(), ours[0].address().unwrap());
}

#[test]
fn what_weave_leaves_keeps_the_agent_from_starting_until_it_is_gone() {
    let lab = Lab::builder().nodes(1).without_agents().start().unwrap();
    let node = &lab.nodes()[0];
    let conf = tempfile::tempdir().unwrap();
    fs::write(conf.path().join("10-weave.conflist"), "{}").unwrap();
    node.configure(|settings| {
        settings.more.extend(["--cni-conf-dir".into(), conf.path().display().to_string()]);
    });
    sh(node, WEAVE);
    node.start_agent().unwrap();
    assert!(!node.wait_agent_end(START).unwrap().success());
    assert!(node.log().contains("overlaps this host's route 10.32.0.0/12 on weave"), "{}", node.log());

    run_page(node, "migrate-weave.md", "4. ", conf.path());
    let left = sh(node, "ip link; ip route; iptables-save");
    assert!(!left.contains("weave") && !left.contains("WEAVE"), "{left}");
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    assert_eq!(fs::read_dir(conf.path()).unwrap().count(), 1, "Weft's alone");
    let pods = [(); 2].map(|()| attached(&lab, node));
    reach(pods[0].netns(), pods[1].address().unwrap());
}

/// Makes a node what flannel makes it, with VXLAN; returns a pod of it.
fn flannel(node: &Node, number: u8, other: &Node) -> Netns {
    let pod = Netns::create(node.netns().sandbox(), &format!("flannel-{number}")).unwrap();
    let script = FLANNEL
        .replace("POD", pod.name())
        .replace("OTHER", &other.address().to_string())
        .replace("HOST", &node.address().to_string())
        .replace("$N", &number.to_string())
        .replace("$M", &(3 - number).to_string());
    sh(node, &script);
    pod
}

fn reach(from: &Netns, to: std::net::IpAddr) {
    wait::until(&format!("{} reaches {to}", from.name()), SOON, || traffic::ping(from, to, SHORT)).unwrap();
}

/// Runs the commands that a page has for the node itself after some words, where its directories are others.
fn run_page(node: &Node, page: &str, after: &str, conf_dir: &Path) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(page);
    let text = fs::read_to_string(page).unwrap();
    let step = text.split_once(after).unwrap().1;
    let of_node = step.split_once("On the node").unwrap().1;
    let commands = of_node.split("```").nth(1).unwrap().strip_prefix("sh\n").unwrap();
    let elsewhere = conf_dir.join("none").display().to_string();
    let commands = commands
        .replace("/etc/cni/net.d", &conf_dir.display().to_string())
        .replace("/run/flannel", &elsewhere)
        .replace("/var/lib/", &format!("{elsewhere}/"))
        .replace("/opt/cni/bin", &elsewhere);
    sh(node, &commands);
}

fn sh(node: &Node, script: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-euc", script]).env("PATH", tools::path_variable());
    let output = node.exec(command).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

const FLANNEL: &str = "
echo 1 > /proc/sys/net/ipv4/ip_forward
ip link add cni0 type bridge
ip address add 10.244.$N.1/24 dev cni0
ip link set cni0 up
ip link add flannel.1 address 02:00:00:00:00:0$N type vxlan id 1 local HOST dstport 8472 nolearning
ip address add 10.244.$N.0/32 dev flannel.1
ip link set flannel.1 up
bridge fdb add 02:00:00:00:00:0$M dev flannel.1 dst OTHER
ip neighbour add 10.244.$M.0 lladdr 02:00:00:00:00:0$M dev flannel.1
ip route add 10.244.$M.0/24 via 10.244.$M.0 dev flannel.1 onlink
iptables -t nat -N FLANNEL-POSTRTG
iptables -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG
iptables -t nat -A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN
iptables -t nat -A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
iptables -t nat -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE --random-fully
iptables -N FLANNEL-FWD
iptables -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD
iptables -A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT
iptables -A FLANNEL-FWD -d 10.244.0.0/16 -j ACCEPT
nft add table ip flannel-ipv4
ip link add flannel-pod type veth peer name eth0 netns POD
ip link set flannel-pod master cni0 up
ip -n POD address add 10.244.$N.5/24 dev eth0
ip -n POD link set eth0 up
ip -n POD route add default via 10.244.$N.1
";

const WEAVE: &str = "
ip link add weave type bridge
ip address add 10.32.0.1/12 dev weave
ip link set weave up
ip link add datapath type bridge
ip link add vxlan-6784 type vxlan id 1 dstport 6784
ip link add vethwe-datapath type veth peer name vethwe-bridge
iptables -t nat -N WEAVE
iptables -t nat -A POSTROUTING -j WEAVE
iptables -t nat -A WEAVE -s 10.32.0.0/12 ! -d 10.32.0.0/12 -j MASQUERADE
iptables -N WEAVE-NPC
iptables -A FORWARD -o weave -j WEAVE-NPC
iptables -A FORWARD -o weave -j DROP
";
