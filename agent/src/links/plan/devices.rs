//! Bridge, TUN and ports: their settings, addresses, static MACs and neighbours.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{BRIDGE_OPTIONS, Change, Desired, Observed, PORT_OPTIONS, host_prefix, sysctls};
use crate::{
    linux::netlink::{Link, LinkKind},
    types::Mac,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Appends what is needed now; returns what may only go after the routes have changed.
pub(super) fn plan(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) -> Vec<Change> {
    let mut leaving = Vec::new();
    let has_bridge = bridge(desired, observed, changes);
    let tun = observed.link(&desired.tun.name, LinkKind::Tun);
    if let Some(tun) = tun {
        if tun.mtu != desired.tun.mtu {
            changes.push(Change::SetMtu { link: tun.name.clone(), mtu: desired.tun.mtu });
        }
        set_up(tun, changes);
    }
    if has_bridge {
        ports(desired, observed, changes);
    }
    sysctls::plan(desired, observed, changes);
    let ours = [has_bridge.then_some(&desired.bridge.name), tun.map(|tun| &tun.name)];
    for link in ours.into_iter().flatten() {
        addresses(link, desired, observed, changes, &mut leaving);
    }
    if has_bridge {
        macs(desired, observed, changes);
        neighbours(desired, observed, changes);
    }
    leaving
}

pub(super) fn teardown(bridge: &str, tun: &str, observed: &Observed, changes: &mut Vec<Change>) {
    let veths = observed.veths().into_iter().map(|veth| veth.host_interface);
    let kinds = [(tun, LinkKind::Tun), (bridge, LinkKind::Bridge)];
    let ours =
        kinds.into_iter().filter_map(|(name, kind)| observed.link(name, kind)).map(|link| link.name.clone());
    changes.extend(veths.chain(ours).map(|link| Change::DeleteLink { link }));
}

/// Whether there is a bridge, or will be. Another kind of link of its name is not ours to replace.
fn bridge(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) -> bool {
    let wanted = &desired.bridge;
    let link = || wanted.name.clone();
    let Some(found) = observed.links.get(&wanted.name) else {
        changes.push(Change::CreateBridge { name: link(), mac: wanted.mac, mtu: wanted.mtu });
        changes.push(Change::SetUp { link: link() });
        return true;
    };
    if found.kind != LinkKind::Bridge {
        return false;
    }
    if found.bridge != Some(BRIDGE_OPTIONS) {
        changes.push(Change::SetBridge { link: link() });
    }
    if found.mac != Some(wanted.mac) {
        changes.push(Change::SetMac { link: link(), mac: wanted.mac });
    }
    if found.mtu != wanted.mtu {
        changes.push(Change::SetMtu { link: link(), mtu: wanted.mtu });
    }
    set_up(found, changes);
    true
}

fn ports(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let bridge = observed.links.get(&desired.bridge.name).map(|link| link.index);
    for port in standing_pods(desired, observed) {
        if bridge.is_none() || port.master != bridge {
            changes.push(Change::Enslave { port: port.name.clone(), bridge: desired.bridge.name.clone() });
        }
        if bridge.is_none() || port.master != bridge || port.port != Some(PORT_OPTIONS) {
            changes.push(Change::SetPort { port: port.name.clone() });
        }
        set_up(port, changes);
    }
}

fn addresses(
    link: &str,
    desired: &Desired,
    observed: &Observed,
    changes: &mut Vec<Change>,
    leaving: &mut Vec<Change>,
) {
    let wanted: BTreeSet<_> = desired.gateways.iter().map(|gateway| host_prefix(*gateway)).collect();
    let of_link = observed.addresses.iter().filter(|(of, _)| of == link).map(|(_, address)| *address);
    let found: BTreeSet<_> = of_link.collect();
    for address in wanted.difference(&found) {
        changes.push(Change::AddAddress { link: link.into(), address: *address });
    }
    // The kernel gives each link an IPv6 address of its own.
    let own = |address: IpAddr| matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local());
    for address in found.difference(&wanted).filter(|address| !own(address.addr())) {
        leaving.push(Change::DeleteAddress { link: link.into(), address: *address });
    }
}

fn macs(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let wanted: BTreeSet<(String, Mac)> = standing_pods(desired, observed)
        .map(|port| (port.name.clone(), desired.pods[&port.name].mac))
        .collect();
    let ours = |(port, _): &&(String, Mac)| desired.pods.contains_key(port);
    for (port, mac) in observed.fdb.difference(&wanted).filter(ours) {
        changes.push(Change::DeleteFdb { port: port.clone(), mac: *mac });
    }
    for (port, mac) in wanted.difference(&observed.fdb) {
        changes.push(Change::SetFdb { port: port.clone(), mac: *mac });
    }
}

fn neighbours(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let bridge = &desired.bridge.name;
    let wanted: BTreeMap<IpAddr, Mac> = standing_pods(desired, observed)
        .map(|port| &desired.pods[&port.name])
        .flat_map(|pod| pod.addresses.iter().map(|address| (*address, pod.mac)))
        .collect();
    let found: BTreeMap<IpAddr, Mac> = observed
        .neighbours
        .iter()
        .filter(|((link, _), _)| link == bridge)
        .map(|((_, address), mac)| (*address, *mac))
        .collect();
    for address in found.keys().filter(|address| !wanted.contains_key(address)) {
        changes.push(Change::DeleteNeighbour { link: bridge.clone(), address: *address });
    }
    for (address, mac) in wanted.into_iter().filter(|(address, mac)| found.get(address) != Some(mac)) {
        changes.push(Change::SetNeighbour { link: bridge.clone(), address, mac });
    }
}

/// The host ends of desired pods that exist.
pub(super) fn standing_pods<'a>(
    desired: &'a Desired,
    observed: &'a Observed,
) -> impl Iterator<Item = &'a Link> {
    desired.pods.keys().filter_map(|name| observed.link(name, LinkKind::Veth))
}

fn set_up(link: &Link, changes: &mut Vec<Change>) {
    if !link.up {
        changes.push(Change::SetUp { link: link.name.clone() });
    }
}
