use super::*;
use crate::config::{HostAddress, HostLink, HostRoute};
use clap::Parser;
use insta::assert_snapshot;
use std::collections::BTreeSet;

#[derive(Parser)]
#[command(args_override_self = true)]
struct Agent {
    #[command(flatten)]
    args: Args,
}

/// A host at 192.0.2.1/24 and 2001:db8::1/64 on eth0, with 198.51.100.1/24 on eth1.
fn host() -> HostFacts {
    let address = |device: &str, address: &str| HostAddress {
        device: device.into(),
        address: address.parse().unwrap(),
    };
    HostFacts {
        host_name: "Node-1".into(),
        ipv6: true,
        cores: 4,
        links: [("lo", 65536), ("eth0", 1500), ("eth1", 9000)]
            .map(|(device, mtu)| HostLink { device: device.into(), mtu })
            .into(),
        addresses: vec![
            address("lo", "127.0.0.1/8"),
            address("eth0", "192.0.2.1/24"),
            address("eth0", "fe80::1/64"),
            address("eth0", "2001:db8::1/64"),
            address("eth1", "198.51.100.1/24"),
        ],
        routes: vec![
            route("::/0", "eth0", Some("fe80::ff")),
            route("0.0.0.0/0", "eth0", Some("192.0.2.254")),
            route("192.0.2.0/24", "eth0", None),
            route("198.51.100.0/24", "eth1", None),
        ],
    }
}

fn route(destination: &str, device: &str, gateway: Option<&str>) -> HostRoute {
    HostRoute {
        destination: destination.parse().unwrap(),
        device: Some(device.into()),
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        source: None,
        metric: 0,
        protocol: 2,
    }
}

fn on(host: &HostFacts, flags: &[&str]) -> Result<Config, ConfigErrors> {
    let argv = ["agent", "--ca-dir=/ca"].iter().chain(flags);
    Config::check(&Agent::try_parse_from(argv).unwrap_or_else(|e| panic!("{e}")).args, host)
}

fn accepted(flags: &[&str]) -> Config {
    on(&host(), flags).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(flags: &[&str]) -> String {
    refused_on(&host(), flags)
}

fn refused_on(host: &HostFacts, flags: &[&str]) -> String {
    on(host, flags).expect_err("accepted").0.iter().map(|e| e.to_string()).collect::<Vec<_>>().join("\n")
}

#[test]
fn defaults_come_from_the_host() {
    let config = accepted(&[]);
    assert_eq!(config.name.as_str(), "node-1");
    assert_eq!(config.endpoints, ["192.0.2.1:6783".parse().unwrap()]);
    assert_eq!(config.underlay, BTreeSet::from(["eth0".into()]));
    assert_eq!(config.listen.to_string(), "[::]:6783");
    assert_eq!((config.mtu, config.data_threads.get(), config.max_links.get()), (1440, 4, 32));
    assert_eq!(config.socket(), PathBuf::from("/run/weft/weft.sock"));
    assert!(config.underlay_forwarding && config.cni_conf_dir.is_none() && config.peers.is_empty());

    let without_ipv6 = HostFacts { ipv6: false, ..host() };
    assert_eq!(on(&without_ipv6, &[]).unwrap().listen.to_string(), "0.0.0.0:6783");
}

#[test]
fn empty_values_are_the_same_as_none() {
    assert_eq!(
        accepted(&["--name=", "--peer=", "--listen=", "--ipam-seed=", "--mtu=", "--advertise="]),
        accepted(&[])
    );
}

#[test]
fn the_default_address_follows_the_best_default_route() {
    let mut host = host();
    assert_eq!(host.default_address().unwrap().to_string(), "192.0.2.1");
    host.routes[1].metric = 100;
    host.routes.push(route("0.0.0.0/0", "eth1", None));
    assert_eq!(host.default_address().unwrap().to_string(), "198.51.100.1");
    host.routes.retain(|route| route.destination.addr().is_ipv6());
    assert_eq!(host.default_address().unwrap().to_string(), "2001:db8::1");
    host.routes[0].source = Some("2001:db8::77".parse().unwrap());
    assert_eq!(host.default_address().unwrap().to_string(), "2001:db8::77");
}

#[test]
fn the_mtu_is_the_underlays_less_the_overhead() {
    let both = ["--advertise", "192.0.2.1", "--advertise", "[2001:db8::1]"];
    assert_eq!(accepted(&both).mtu, 1420);
    assert_eq!(accepted(&["--advertise", "198.51.100.1"]).mtu, 8940);
    assert_eq!(accepted(&["--mtu", "1440"]).mtu, 1440);
    assert_eq!(accepted(&["--mtu", "1464", "--encryption", "off"]).mtu, 1464);
}

#[test]
fn peers_are_kept_without_ourselves() {
    let peers = accepted(&["--peer", "node-1,node-2,192.0.2.1", "--peer", "node-2"]).peers;
    assert_eq!(peers.iter().map(PeerAddress::to_string).collect::<Vec<_>>(), ["node-2:6783"]);
    assert_snapshot!(refused(&["--peer", "NODE-1,192.0.2.1:6783,localhost"]), @r"--peer NODE-1,192.0.2.1:6783,localhost: this is only ourselves; name another node, or leave --peer out on the first one");
    assert_snapshot!(refused(&["--peer", "http://node-2,10.32.0.9"]), @r"
--peer: `http://node-2` is not host[:port] or an address; examples: node-2, 192.0.2.7:6783, [2001:db8::7]:6783
--peer 10.32.0.9: inside --universe 10.32.0.0/12; peers are called on the underlay
");
}

#[test]
fn a_universe_in_use_is_refused() {
    let mut host = host();
    host.routes.push(route("10.0.0.0/8", "eth1", None));
    host.routes.push(route("10.40.1.0/24", "docker0", None));
    host.routes.push(HostRoute { device: None, ..route("10.33.0.0/16", "-", None) });
    host.addresses.push(HostAddress { device: "dummy0".into(), address: "10.35.0.1/32".parse().unwrap() });
    assert_snapshot!(refused_on(&host, &[]), @r"
--universe 10.32.0.0/12: overlaps this host's route 10.0.0.0/8 on eth1; choose a universe that is not in use
--universe 10.32.0.0/12: overlaps this host's route 10.40.1.0/24 on docker0; choose a universe that is not in use
--universe 10.32.0.0/12: overlaps this host's route 10.33.0.0/16 (which refuses packets); choose a universe that is not in use
--universe 10.32.0.0/12: contains this host's address 10.35.0.1 on dummy0; choose a universe that is not in use
");
    let without_ipv6 = HostFacts { ipv6: false, ..self::host() };
    assert_snapshot!(refused_on(&without_ipv6, &["--universe", "fd00:77::/64"]), @r"--universe fd00:77::/64: IPv6 is off on this host");
    assert_snapshot!(refused(&["--universe", "10.32.0.1/12"]), @r"--universe: `10.32.0.1/12` is not a network address; did you mean 10.32.0.0/12?");
    assert_snapshot!(refused(&["--universe", "10.32.0.0/31"]), @r"--universe: `10.32.0.0/31` has no room for pods; the smallest universe is a /30, or a /126 for IPv6");
    assert_snapshot!(refused(&["--universe", "pods"]), @r"--universe: `pods` is not a prefix; example: 10.32.0.0/12");
}

#[test]
fn what_weft_itself_left_is_no_conflict() {
    let mut host = host();
    host.routes.push(route("10.32.0.0/12", "weft0", None));
    host.routes.push(HostRoute { device: None, protocol: 99, ..route("10.32.0.0/24", "-", None) });
    host.addresses.push(HostAddress { device: "weft".into(), address: "10.32.0.1/32".parse().unwrap() });
    assert!(on(&host, &[]).is_ok());
}

#[test]
fn an_advertised_address_is_ours_and_on_the_underlay() {
    assert_snapshot!(refused(&["--advertise", "203.0.113.9"]), @r"--advertise 203.0.113.9: not an address of this host, which has 192.0.2.1 on eth0, 2001:db8::1 on eth0, 198.51.100.1 on eth1");
    assert_snapshot!(refused(&["--advertise", "10.32.0.1"]), @r"--advertise 10.32.0.1: inside --universe 10.32.0.0/12; peers must reach this node by an address of the underlay");
    assert_snapshot!(refused(&["--advertise", "127.0.0.1"]), @r"--advertise 127.0.0.1: other hosts cannot reach such an address");
    assert_snapshot!(refused(&["--advertise", "node-1,192.0.2.1,192.0.2.1:6783"]), @r"
--advertise node-1: not an address; examples: 192.0.2.1, 192.0.2.1:6783, [2001:db8::1]:6783
--advertise 192.0.2.1:6783: given twice
");
    assert_snapshot!(refused(&["--advertise", "192.0.2.1:7000"]), @r"--advertise 192.0.2.1:7000: nobody would listen there: --listen is [::]:6783");
    assert_snapshot!(refused(&["--listen", "0.0.0.0:6783", "--advertise", "2001:db8::1"]), @r"--advertise 2001:db8::1: nobody would listen there: --listen is 0.0.0.0:6783");
    let lonely = HostFacts { routes: Vec::new(), ..host() };
    assert_snapshot!(refused_on(&lonely, &[]), @r"--advertise: not given, and there is no default route to tell it by; this host has 192.0.2.1 on eth0, 2001:db8::1 on eth0, 198.51.100.1 on eth1");
    assert_eq!(
        accepted(&["--listen", "198.51.100.1:7000"]).endpoints,
        ["198.51.100.1:7000".parse().unwrap()]
    );
}

#[test]
fn what_cannot_be_listened_on_is_refused() {
    assert_snapshot!(refused(&["--listen", "6783"]), @r"--listen 6783: not ADDR:PORT; examples: 0.0.0.0:6783, 192.0.2.1:6783, [::]:6783");
    assert_snapshot!(refused(&["--listen", "203.0.113.9:6783", "--advertise", "192.0.2.1"]), @r"
--listen 203.0.113.9:6783: not an address of this host, which has 192.0.2.1 on eth0, 2001:db8::1 on eth0, 198.51.100.1 on eth1
--advertise 192.0.2.1: nobody would listen there: --listen is 203.0.113.9:6783
");
    assert_snapshot!(refused(&["--listen", "0.0.0.0:0"]), @r"--listen 0.0.0.0:0: peers must know the port: name one, such as 6783");
    let without_ipv6 = HostFacts { ipv6: false, ..host() };
    assert_snapshot!(refused_on(&without_ipv6, &["--listen", "[::]:6783"]), @r"--listen [::]:6783: IPv6 is off on this host; use 0.0.0.0 or an IPv4 address");
    assert_snapshot!(refused(&["--metrics-addr", "127.0.0.1:6783"]), @r"--metrics-addr 127.0.0.1:6783: the same port as --listen [::]:6783");
    assert_snapshot!(refused(&["--metrics-addr", "localhost"]), @r"--metrics-addr localhost: not ADDR:PORT; examples: 0.0.0.0:6783, 192.0.2.1:6783, [::]:6783");
}

#[test]
fn an_agent_without_keys_is_refused_and_told_how_to_get_some() {
    let source = |flags: &[&str]| accepted(flags).identity;
    assert_eq!(source(&[]), Some(Source::CaDir("/ca".into())));
    assert_eq!(source(&["--ca-dir=", "--insecure"]), None);
    let files = Source::Files { ca: "/a".into(), cert: "/c".into(), key: "/k".into(), retired: None };
    assert_eq!(source(&["--ca-dir=", "--tls-ca=/a", "--tls-cert=/c", "--tls-key=/k"]), Some(files));
    assert_snapshot!(refused(&["--ca-dir="]), @r"--ca-dir: this node has no keys: it would not know its peers, nor they it. Make a CA once with `weft ca init DIR` and give every node --ca-dir DIR with a copy of it; or give each the --tls-ca, --tls-cert and --tls-key that `weft ca issue` makes; or, where nobody else can reach these ports, run all of them with --insecure");
    assert_snapshot!(refused(&["--ca-dir=", "--tls-cert=/c"]), @r"
--tls-ca: not given; --tls-ca, --tls-cert and --tls-key belong together
--tls-key: not given; --tls-ca, --tls-cert and --tls-key belong together
");
    assert_snapshot!(refused(&["--insecure"]), @"--ca-dir /ca: only one of --ca-dir, the three --tls flags, and --insecure can be in use");
    assert_snapshot!(refused(&["--ca-dir=here"]), @"--ca-dir here: not an absolute path");
}

#[test]
fn an_mtu_that_does_not_fit_is_refused() {
    assert_snapshot!(refused(&["--mtu", "500"]), @r"--mtu 500: pods need 576 bytes at least");
    assert_snapshot!(refused(&["--mtu", "1465"]), @r"--mtu 1465: eth0 carries 1500 bytes, and encryption takes 60 of them");
    assert_snapshot!(refused(&["--mtu", "1465", "--encryption", "off"]), @r"--mtu 1465: eth0 carries 1500 bytes, and encapsulation takes 36 of them");
    assert_snapshot!(refused(&["--mtu", "big"]), @r"--mtu big: not a number from 1 to 65535");
    assert_snapshot!(refused(&["--mtu", "1200", "--universe", "fd00:77::/64"]), @r"--mtu 1200: pods need 1280 bytes at least");
    let mut narrow = host();
    narrow.links[1].mtu = 600;
    let unknown = HostFacts { links: Vec::new(), ..narrow.clone() };
    assert_snapshot!(refused_on(&unknown, &[]), @r"--mtu: not given, and the underlay's is not known");
    assert_snapshot!(refused_on(&narrow, &[]), @r"--mtu: eth0 carries 600 bytes, which leaves 540 for pods: 576 are needed at least");
}

#[test]
fn a_seed_is_named_once() {
    assert_snapshot!(refused(&["--ipam-seed", "a,b,A,-"]), @r"
--ipam-seed A: named twice; each node has one share of the universe
--ipam-seed: `-` is not a node name: 1 to 253 letters, digits, `-`, `.` or `_`, beginning and ending with a letter or digit
");
}

#[test]
fn directories_are_absolute_and_apart() {
    assert_snapshot!(refused(&["--state-dir", "state", "--run-dir=", "--cni-conf-dir", "net.d"]), @r"
--state-dir state: not an absolute path
--run-dir: not an absolute path
--cni-conf-dir net.d: not an absolute path
");
    assert_snapshot!(refused(&["--state-dir", "/run/weft"]), @r"--state-dir /run/weft: the same as --run-dir; what is in one outlives a reboot, what is in the other must not");
    let long = format!("/{}", "x".repeat(98));
    assert_eq!(
        refused(&["--run-dir", &long]),
        format!("--run-dir {long}: too long: a socket's path has at most 107 bytes")
    );
}

#[test]
fn counts_prefixes_names_and_filters_are_checked() {
    assert_snapshot!(refused(&["--max-links", "1", "--data-threads", "0"]), @r"
--max-links 1: not a number from 4 to 64
--data-threads 0: not a number from 1 to 255
");
    assert_snapshot!(refused(&["--no-masquerade", "192.0.2.9/24,x"]), @r"
--no-masquerade 192.0.2.9/24: not a network address; did you mean 192.0.2.0/24?
--no-masquerade x: not a prefix; example: 192.0.2.0/24
");
    assert_eq!(accepted(&["--no-masquerade", "192.0.2.9"]).no_masquerade, ["192.0.2.9/32".parse().unwrap()]);
    assert_snapshot!(refused(&["--name=-x"]), @r"--name: `-x` is not a node name: 1 to 253 letters, digits, `-`, `.` or `_`, beginning and ending with a letter or digit");
    assert_snapshot!(refused_on(&HostFacts { host_name: "(none)".into(), ..host() }, &[]), @r"--name: the host name `(none)` is not a node name: 1 to 253 letters, digits, `-`, `.` or `_`, beginning and ending with a letter or digit; give this node a name");
    assert_snapshot!(refused(&["--log", "weft=loud"]), @r#"--log weft=loud: error parsing level filter: expected one of "off", "error", "warn", "info", "debug", "trace", or a number 0-5; examples: info, debug, info,weft::mesh=debug"#);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let errors =
        on(&host(), &["--universe", "10.32.0.1/12", "--mtu", "1", "--state-dir", "x", "--ipam-seed", "a,a"]);
    assert_snapshot!(errors.unwrap_err(), @r"
this configuration cannot be used; nothing was changed
  --universe: `10.32.0.1/12` is not a network address; did you mean 10.32.0.0/12?
  --ipam-seed a: named twice; each node has one share of the universe
  --mtu 1: pods need 576 bytes at least
  --state-dir x: not an absolute path
");
}

#[test]
fn in_a_cluster_the_nodes_name_counts_and_keys_come_from_the_secret() {
    let cluster = |flags: &[&str]| {
        let argv = ["agent", "--kubernetes"].iter().chain(flags);
        Config::check(&Agent::try_parse_from(argv).unwrap_or_else(|e| panic!("{e}")).args, &host())
    };
    let config = cluster(&["--node-name=worker-1", "--run-dir=/r"]).unwrap();
    assert_eq!((config.name.as_str(), config.ipam), ("worker-1", Ipam::Ring));
    assert_eq!(config.identity, Some(Source::CaDir("/r/ca".into())));
    assert_eq!(config.cluster_keys(), Some("/r/ca".into()));
    let kubernetes = Kubernetes { namespace: "kube-system".into(), kubeconfig: None };
    assert_eq!(config.kubernetes, Some(kubernetes));
    let own_keys = cluster(&["--node-name=worker-1", "--ca-dir=/ca"]).unwrap();
    assert_eq!(own_keys.cluster_keys(), None);
    assert_eq!(cluster(&["--node-name=worker-1", "--insecure"]).unwrap().identity, None);

    let refused = |flags: &[&str]| cluster(flags).expect_err("accepted").0[0].to_string();
    assert_snapshot!(refused(&[]), @"--node-name: not given; --kubernetes needs the name of the Node (fieldRef spec.nodeName)");
    assert_snapshot!(refused(&["--node-name=a", "--name=b"]), @"--name b: not the name of the Node, a; leave it out");
    assert_snapshot!(refused(&["--node-name=a", "--pod-namespace=A b"]), @"--pod-namespace A b: not the name of a namespace");
}

#[test]
fn pod_cidrs_are_for_clusters() {
    assert_snapshot!(refused(&["--ipam=podcidr"]), @"--ipam podcidr: only with --kubernetes: Nodes have such ranges");
}

#[test]
fn a_host_that_has_moved_is_where_its_default_route_leads_from_unless_a_flag_says_where() {
    let mut host = host();
    let config = accepted(&[]);
    assert_eq!(config.endpoints_now(&config.endpoints, &host), config.endpoints);
    let (pinned, bound) = (accepted(&["--advertise=192.0.2.1"]), accepted(&["--listen=192.0.2.1:6783"]));
    host.addresses[1].address = "192.0.2.7/24".parse().unwrap();
    let moved = ["192.0.2.7:6783".parse().unwrap()];
    assert_eq!(config.endpoints_now(&config.endpoints, &host), moved);
    assert_eq!(config.endpoints_now(&moved, &host), moved);
    for pinned in [pinned, bound] {
        assert_eq!(pinned.endpoints_now(&pinned.endpoints, &host), pinned.endpoints);
    }
    host.addresses[1].address = "10.32.0.7/24".parse().unwrap();
    assert_eq!(config.endpoints_now(&moved, &host), moved, "not into the universe");
    host.addresses.retain(|address| address.device != "eth0");
    assert_eq!(config.endpoints_now(&moved, &host), moved, "better than nothing");
}
