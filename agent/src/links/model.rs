//! A kernel in memory, and the laws of planning that it proves.

use super::{
    desired::{Desired, PodPort},
    firewall::{self, Element, Family, Firewall, Rule},
    observed::Observed,
    plan::{BRIDGE_OPTIONS, Change, PORT_OPTIONS, host_prefix, plan, sysctls, teardown},
};
use crate::{
    linux::netlink::{BridgeOptions, Link, LinkKind, PortOptions, RTPROT_WEFT, Route},
    types::{Mac, Prefix},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Does to what was observed what the kernel would do.
fn apply(kernel: &mut Observed, change: &Change) -> Result<(), String> {
    let known = |kernel: &Observed, link: &str| match kernel.links.contains_key(link) {
        true => Ok(()),
        false => Err(format!("{change}: no such link")),
    };
    let link = |kernel: &'_ mut Observed, name: &str, set: &dyn Fn(&mut Link)| {
        kernel.links.get_mut(name).map(set).ok_or(format!("{change}: no such link"))
    };
    match change {
        Change::LoadTable(_) | Change::DropTable(_) | Change::AddElement(_) | Change::DeleteElement(_) => {
            kernel.firewall = firewall::after(std::mem::take(&mut kernel.firewall), [change]);
        }
        Change::CreateBridge { name, mac, mtu } => {
            let index = 1 + kernel.links.values().map(|link| link.index).max().unwrap_or(0);
            let mut bridge = made(index, name, LinkKind::Bridge);
            (bridge.mac, bridge.mtu, bridge.bridge) = (Some(*mac), *mtu, Some(BRIDGE_OPTIONS));
            kernel.links.insert(name.clone(), bridge);
        }
        Change::DeleteLink { link } => {
            kernel.links.remove(link).ok_or("no such link")?;
            kernel.routes.retain(|route| route.link.as_ref() != Some(link));
            kernel.addresses.retain(|(of, _)| of != link);
            kernel.neighbours.retain(|(of, _), _| of != link);
            kernel.fdb.retain(|(of, _)| of != link);
        }
        Change::SetBridge { link: name } => link(kernel, name, &|l| l.bridge = Some(BRIDGE_OPTIONS))?,
        Change::SetMac { link: name, mac } => link(kernel, name, &|l| l.mac = Some(*mac))?,
        Change::SetMtu { link: name, mtu } => link(kernel, name, &|l| l.mtu = *mtu)?,
        Change::SetUp { link: name } => link(kernel, name, &|l| l.up = true)?,
        Change::Enslave { port, bridge } => {
            let bridge = kernel.links.get(bridge).ok_or("no such bridge")?.index;
            link(kernel, port, &|l| {
                (l.master, l.port) = (Some(bridge), Some(PortOptions { learning: true, ..PORT_OPTIONS }))
            })?;
        }
        Change::SetPort { port } => {
            if kernel.links.get(port).and_then(|link| link.master).is_none() {
                return Err(format!("{change}: not a port"));
            }
            link(kernel, port, &|l| l.port = Some(PORT_OPTIONS))?;
        }
        Change::SetSysctl { key, value } => {
            kernel.sysctls.insert(key.clone(), value.clone());
        }
        Change::AddAddress { link, address } => {
            known(kernel, link)?;
            kernel.addresses.insert((link.clone(), *address));
        }
        Change::DeleteAddress { link, address } => {
            kernel.addresses.remove(&(link.clone(), *address));
            let gone = kernel.addresses.iter().all(|(_, other)| other.addr() != address.addr());
            kernel.routes.retain(|route| !(gone && route.source == Some(address.addr())));
        }
        Change::SetFdb { port, mac } => {
            if kernel.links.get(port).and_then(|link| link.master).is_none() {
                return Err(format!("{change}: not a port"));
            }
            kernel.fdb.retain(|(_, other)| other != mac);
            kernel.fdb.insert((port.clone(), *mac));
        }
        Change::DeleteFdb { port, mac } => {
            kernel.fdb.remove(&(port.clone(), *mac));
        }
        Change::SetNeighbour { link, address, mac } => {
            known(kernel, link)?;
            kernel.neighbours.insert((link.clone(), *address), *mac);
        }
        Change::DeleteNeighbour { link, address } => {
            kernel.neighbours.remove(&(link.clone(), *address));
        }
        Change::AddRoute(route) => {
            usable(kernel, route)?;
            if kernel.routes.iter().any(|found| key(found) == key(route)) {
                return Err(format!("{change}: exists"));
            }
            kernel.routes.insert(route.clone());
        }
        Change::ReplaceRoute(route) => {
            usable(kernel, route)?;
            let first = kernel.routes.iter().find(|found| key(found) == key(route)).cloned();
            first.map(|first| kernel.routes.remove(&first));
            kernel.routes.insert(route.clone());
        }
        Change::DeleteRoute(route) => {
            kernel.routes.remove(route);
        }
    }
    Ok(())
}

fn key(route: &Route<String>) -> (Prefix, u32) {
    (route.destination, route.metric)
}

fn usable(kernel: &Observed, route: &Route<String>) -> Result<(), String> {
    if let Some(name) = &route.link
        && !kernel.links.get(name).is_some_and(|link| link.up)
    {
        return Err(format!("route {route}: the link is down or missing"));
    }
    match route.source {
        Some(source) if !kernel.addresses.iter().any(|(_, address)| address.addr() == source) => {
            Err(format!("route {route}: nobody has the source address"))
        }
        _ => Ok(()),
    }
}

fn made(index: u32, name: &str, kind: LinkKind) -> Link {
    Link {
        index,
        name: name.into(),
        kind,
        up: false,
        carrier: false,
        running: false,
        mac: None,
        mtu: 1500,
        master: None,
        alias: None,
        peer: None,
        peer_netns: None,
        bridge: None,
        port: None,
        forwarding: false,
    }
}

fn address() -> impl Strategy<Value = IpAddr> {
    (0..8u8).prop_map(|n| IpAddr::from([10, 32, 0, n]))
}

fn range() -> impl Strategy<Value = Prefix> {
    (0..4u8, prop_oneof![Just(24u8), Just(12)])
        .prop_map(|(n, len)| Prefix::new(IpAddr::from([10, 32, n, 0]), len).unwrap().trunc())
}

fn mac() -> impl Strategy<Value = Mac> {
    (0..6u8).prop_map(|n| Mac([2, 0, 0, 0, 0, n]))
}

fn port() -> impl Strategy<Value = String> {
    (0..4u8).prop_map(|n| format!("wf{n:012x}"))
}

fn link_name() -> impl Strategy<Value = String> {
    prop_oneof![Just("weft".to_string()), Just("weft0".into()), Just("eth0".into()), port()]
}

fn desired() -> impl Strategy<Value = Desired> {
    let pods = proptest::collection::btree_map(port(), (address(), mac()), 0..4);
    let ranges = proptest::collection::btree_set(range(), 0..3);
    let narrow = proptest::collection::btree_map(range(), 1280..1400u32, 0..3);
    let gateway = proptest::option::of(address());
    (pods, ranges, narrow, gateway, any::<bool>(), any::<bool>()).prop_map(
        |(pods, own_ranges, narrow_ranges, gateway, underlay_forwarding, exception)| {
            let mut desired = Desired::new("10.32.0.0/12".parse().unwrap(), Mac([2, 9, 9, 9, 9, 9]), 1440);
            desired.gateways = gateway.into_iter().collect();
            desired.own_ranges = own_ranges;
            desired.narrow_ranges = narrow_ranges;
            desired.underlay = BTreeSet::from([IpAddr::from([192, 0, 2, 1])]);
            desired.underlay_forwarding = underlay_forwarding;
            desired.no_masquerade.extend(exception.then(|| "198.51.100.0/24".parse::<Prefix>().unwrap()));
            let (mut addresses, mut macs) = (desired.gateways.clone(), BTreeSet::new());
            for (host_interface, (address, mac)) in pods {
                if addresses.insert(address) && macs.insert(mac) {
                    let addresses = BTreeSet::from([address]);
                    desired.pods.insert(host_interface.clone(), PodPort { host_interface, addresses, mac });
                }
            }
            desired
        },
    )
}

/// A route of ours or of somebody else's, sensible or not.
fn route() -> impl Strategy<Value = Route<String>> {
    let destination =
        prop_oneof![address().prop_map(host_prefix), range(), Just("0.0.0.0/0".parse().unwrap())];
    let protocol = prop_oneof![Just(RTPROT_WEFT), Just(4)];
    (destination, proptest::option::of(link_name()), protocol, proptest::option::of(1300..1302u32), 0..2u32)
        .prop_map(|(destination, link, protocol, mtu, metric)| {
            let route =
                link.map_or(Route::unreachable(destination), |link| Route::on_link(destination, link));
            Route { protocol, mtu, metric, ..route }
        })
}

/// Whatever a node may look like: links of ours down, missing or of another kind, stale and foreign things of all sorts.
fn mess() -> impl Strategy<Value = Observed> {
    let kind = prop_oneof![
        8 => Just(None),
        1 => Just(Some(LinkKind::Other)),
        1 => Just(Some(LinkKind::Veth)),
    ];
    let links = proptest::collection::btree_map(link_name(), (kind, any::<[bool; 4]>(), mac()), 0..7);
    let pairs = (
        proptest::collection::btree_set((link_name(), address()), 0..6),
        proptest::collection::btree_map((link_name(), address()), mac(), 0..6),
        proptest::collection::btree_set((port(), mac()), 0..6),
    );
    let routes = proptest::collection::vec(route(), 0..8);
    let elements = proptest::collection::btree_set((port(), mac(), address()), 0..5);
    let firewall = (any::<[bool; 4]>(), elements);
    (links, pairs, routes, firewall, any::<[bool; 3]>()).prop_map(
        |(links, (addresses, neighbours, fdb), routes, (tables, elements), [ipv6, redirects, alias])| {
            let mut kernel = Observed { ipv6, ..Observed::default() };
            let bridge = links.keys().position(|name| name == "weft").map(|at| at as u32 + 1);
            for (at, (name, (kind, [up, port, options, isolated], mac))) in links.into_iter().enumerate() {
                let usual = match name.as_str() {
                    "weft" => LinkKind::Bridge,
                    "weft0" => LinkKind::Tun,
                    "eth0" => LinkKind::Other,
                    _ => LinkKind::Veth,
                };
                let mut link = made(at as u32 + 1, &name, kind.unwrap_or(usual));
                (link.up, link.mac) = (up, Some(mac));
                if link.kind == LinkKind::Bridge {
                    link.bridge = Some(BridgeOptions { stp: options, ..BRIDGE_OPTIONS });
                }
                if link.kind == LinkKind::Veth && port && bridge.is_some() {
                    link.master = bridge;
                    link.port = Some(PortOptions { isolated, ..PORT_OPTIONS });
                    link.alias = alias.then(|| format!("weft 4f3c {name} - - - -"));
                }
                kernel.links.insert(name, link);
            }
            let standing = |name: &str| kernel.links.contains_key(name);
            let address = |address| host_prefix(address);
            kernel.addresses =
                addresses.into_iter().filter(|(l, _)| standing(l)).map(|(l, a)| (l, address(a))).collect();
            kernel.neighbours = neighbours.into_iter().filter(|((l, _), _)| standing(l)).collect();
            let is_port = |name: &str| kernel.links.get(name).is_some_and(|link| link.master.is_some());
            let mut macs = BTreeSet::new();
            kernel.fdb = fdb.into_iter().filter(|(p, mac)| is_port(p) && macs.insert(*mac)).collect();
            let mut keys = BTreeSet::new();
            kernel.routes = routes
                .into_iter()
                .filter(|route| route.link.as_deref().is_none_or(standing) && keys.insert(key(route)))
                .collect();
            kernel.sysctls.insert("net/ipv4/conf/all/send_redirects".into(), u8::from(redirects).to_string());
            kernel.firewall = half_right(tables, elements);
            kernel
        },
    )
}

/// Tables that are there or not, with a rule changed or not, and stale elements.
fn half_right(
    [inet, bridge, changed, foreign]: [bool; 4],
    elements: BTreeSet<(String, Mac, IpAddr)>,
) -> Firewall {
    let some = Desired::new("10.32.0.0/12".parse().unwrap(), Mac([2, 9, 9, 9, 9, 9]), 1440);
    let mut firewall = Firewall::default();
    for (table, is_there) in
        firewall::tables(&some).into_iter().zip([inet, bridge]).filter(|(_, there)| *there)
    {
        assert!(is_there);
        firewall.tables.insert(table.family, table);
    }
    if let Some(table) = firewall.tables.get_mut(&Family::Bridge) {
        let elements = elements.into_iter().map(|(port, mac, address)| Element { port, mac, address });
        table.sets.insert("pods4".into(), elements.collect());
        if changed {
            let rule = Rule { comment: String::new(), text: String::new() };
            table.chains.values_mut().for_each(|chain| chain.rules.push(rule.clone()));
        }
    }
    firewall.dropping.extend(foreign.then(|| "ip filter FORWARD".to_string()));
    firewall
}

fn foreign(kernel: &Observed) -> (Vec<&Route<String>>, Vec<&Link>) {
    let routes = kernel.routes.iter().filter(|route| route.protocol != RTPROT_WEFT);
    let links = kernel.links.values().filter(|link| link.name == "eth0");
    (routes.collect(), links.collect())
}

/// Reads back what a round reads.
fn look(desired: &Desired, kernel: &mut Observed) {
    for (key, _) in sysctls::wanted(desired, kernel) {
        let fresh = if kernel.links.contains_key("weft") { "0" } else { return };
        kernel.sysctls.entry(key).or_insert(fresh.into());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn one_plan_sets_any_mess_right_and_the_next_is_empty(desired in desired(), mess in mess()) {
        let mut kernel = mess.clone();
        look(&desired, &mut kernel);
        for change in plan(&desired, &kernel) {
            prop_assert_eq!(apply(&mut kernel, &change), Ok(()));
        }
        prop_assert_eq!(plan(&desired, &kernel), []);
        prop_assert_eq!(foreign(&kernel), foreign(&mess));
    }

    #[test]
    fn tear_down_leaves_nothing_of_ours_and_all_of_others(desired in desired(), mess in mess()) {
        let mut kernel = mess.clone();
        look(&desired, &mut kernel);
        let found = kernel.sysctls.clone();
        for change in plan(&desired, &kernel) {
            apply(&mut kernel, &change).unwrap();
        }
        for change in teardown("weft", "weft0", &kernel, &found) {
            prop_assert_eq!(apply(&mut kernel, &change), Ok(()));
        }
        prop_assert_eq!(teardown("weft", "weft0", &kernel, &found), []);
        prop_assert_eq!(kernel.own_routes().count(), 0);
        prop_assert!(kernel.firewall.tables.is_empty());
        prop_assert!(kernel.veths().is_empty());
        let changed = |(key, value): &(&String, &String)| kernel.sysctls.get(*key) != Some(value);
        prop_assert_eq!(found.iter().find(changed), None);
        let (others, links) = foreign(&mess);
        let ours = |route: &&Route<String>| route.link.as_ref().is_none_or(|link| kernel.links.contains_key(link));
        prop_assert_eq!(foreign(&kernel), (others.into_iter().filter(ours).collect(), links));
    }
}

#[test]
fn only_the_underlay_and_our_links_forward() {
    let mut desired = Desired::new("10.32.0.0/12".parse().unwrap(), Mac([2, 9, 9, 9, 9, 9]), 1440);
    desired.underlay.insert("192.0.2.1".parse().unwrap());
    let mut observed = Observed::default();
    for name in ["weft0", "eth0", "eth1", "eth2"] {
        observed.links.insert(name.into(), made(1, name, LinkKind::Other));
    }
    observed.addresses.insert(("eth0".into(), "192.0.2.1/24".parse().unwrap()));
    observed.routes.insert(Route::via("0.0.0.0/0".parse().unwrap(), [192, 0, 3, 1].into(), "eth1".into()));
    let forwarding = |desired: &Desired| -> Vec<String> {
        let wanted: BTreeMap<_, _> = sysctls::wanted(desired, &observed);
        wanted
            .into_keys()
            .filter(|key| key.ends_with("/forwarding"))
            .map(|k| k.split('/').nth(3).unwrap().into())
            .collect()
    };
    assert_eq!(forwarding(&desired), ["eth0", "eth1", "weft", "weft0"]);
    desired.underlay_forwarding = false;
    assert_eq!(forwarding(&desired), ["weft", "weft0"]);
}

#[test]
fn with_a_universe_of_ipv6_all_links_forward_and_keep_the_routes_that_routers_gave_them() {
    let mut desired = Desired::new("fd00:77::/64".parse().unwrap(), Mac([2, 9, 9, 9, 9, 9]), 1440);
    desired.underlay.insert("192.0.2.1".parse().unwrap());
    let mut observed = Observed { ipv6: true, ..Observed::default() };
    observed.links.insert("eth0".into(), made(1, "eth0", LinkKind::Other));
    observed.addresses.insert(("eth0".into(), "192.0.2.1/24".parse().unwrap()));
    let changes = |observed: &Observed| -> Vec<String> {
        let set = plan(&desired, observed).into_iter().filter_map(|change| match change {
            Change::SetSysctl { key, value } => Some(format!("{key}={value}")),
            _ => None,
        });
        set.filter(|change| change.contains("ipv6") && !change.contains("/weft/")).collect()
    };
    let (keep, all) = ("net/ipv6/conf/eth0/accept_ra=2", "net/ipv6/conf/all/forwarding=1");
    observed.sysctls.insert("net/ipv6/conf/eth0/accept_ra".into(), "1".into());
    assert_eq!(changes(&observed), [keep, all]);
    observed.sysctls.insert("net/ipv6/conf/eth0/accept_ra".into(), "0".into());
    assert_eq!(changes(&observed), [all], "who takes none goes on so");
}
