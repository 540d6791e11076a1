//! The routes of the main table.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Change, Desired, Observed, devices::standing_pods, host_prefix};
use crate::{
    linux::netlink::{LinkKind, RTPROT_WEFT, Route},
    types::Prefix,
};
use std::collections::BTreeMap;

pub(super) fn plan(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let wanted = wanted(desired, observed);
    let mut found: BTreeMap<Prefix, Vec<&Route<String>>> = BTreeMap::new();
    for route in observed.own_routes() {
        found.entry(route.destination).or_default().push(route);
    }
    let mut fresh = Vec::new();
    for (destination, route) in &wanted {
        let of_key = found.remove(destination).unwrap_or_default();
        let others: Vec<_> = of_key.iter().filter(|found| **found != route).collect();
        match others[..] {
            _ if others.len() < of_key.len() => {}
            // Somebody's route is in the place: his is not touched, and ours waits until it is gone.
            _ if foreign_twin(route, observed).is_some() => {}
            [only] if only.metric == route.metric => {
                fresh.push(Change::ReplaceRoute(route.clone()));
                continue;
            }
            _ => fresh.push(Change::AddRoute(route.clone())),
        }
        changes.extend(others.into_iter().map(|found| Change::DeleteRoute((*found).clone())));
    }
    changes.extend(found.into_values().flatten().cloned().map(Change::DeleteRoute));
    changes.extend(fresh);
}

/// Somebody else's route that the kernel takes for the same as `route`: equal destination and metric.
pub(in crate::links) fn foreign_twin<'a>(
    route: &Route<String>,
    observed: &'a Observed,
) -> Option<&'a Route<String>> {
    observed.routes.iter().find(|found| {
        found.protocol != RTPROT_WEFT
            && found.destination == route.destination
            && found.metric == route.metric
    })
}

/// The longest match wins: a pod here or held elsewhere, then nothing in an own range, then a narrow path, then the TUN.
pub(in crate::links) fn wanted(desired: &Desired, observed: &Observed) -> BTreeMap<Prefix, Route<String>> {
    let mut routes = BTreeMap::new();
    let tun = observed.link(&desired.tun.name, LinkKind::Tun);
    if let (Some(tun), Some(source)) = (tun, desired.source()) {
        let through = |range: Prefix, mtu| {
            let route = Route::on_link(range, tun.name.clone());
            (range, Route { source: Some(source), mtu, ..route })
        };
        routes.extend([through(desired.universe.prefix(), None)]);
        routes.extend(desired.narrow_ranges.iter().map(|(range, mtu)| through(range.trunc(), Some(*mtu))));
    }
    routes.extend(desired.own_ranges.iter().map(|range| (range.trunc(), Route::unreachable(*range))));
    let has_bridge =
        observed.links.get(&desired.bridge.name).is_none_or(|link| link.kind == LinkKind::Bridge);
    let pods = standing_pods(desired, observed).filter(|_| has_bridge).map(|port| &desired.pods[&port.name]);
    for address in pods.flat_map(|pod| &pod.addresses).map(|address| host_prefix(*address)) {
        routes.insert(address, Route::on_link(address, desired.bridge.name.clone()));
    }
    routes
}
