//! The sysctls that routing between bridge, TUN and underlay needs.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Change, Desired, Observed};
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn plan(desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let mut wanted: Vec<_> = wanted(desired, observed).into_iter().collect();
    // As soon as all forward, a link that still takes advertisements only as a host does loses its routes.
    wanted.sort_by_key(|(key, _)| key == IPV6_FORWARDING);
    for (key, value) in wanted {
        // What cannot be read belongs to a bridge that this very plan makes.
        if observed.sysctls.get(&key).is_none_or(|current| current != value) {
            changes.push(Change::SetSysctl { key, value: value.into() });
        }
    }
}

/// By path. Forwarding is checked on the link that a packet comes in by, so the way back of masqueraded traffic needs
/// it on the underlay; `send_redirects` holds if it is on for the link *or* for `all`; of `rp_filter` the greater of
/// the link's and `all`'s holds, and 2 asks only for *some* route back; `accept_local` lets packets in that the
/// agent injects with the bridge's address as their source. Where the universe is IPv4, bridge and TUN have no IPv6: they
/// would only send router solicitations to nobody. Where it is IPv6, all links forward or none; those of the underlay
/// whose routes come from advertisements must be told to go on with them (2).
pub(in crate::links) fn wanted(desired: &Desired, observed: &Observed) -> BTreeMap<String, &'static str> {
    let mut wanted = BTreeMap::from([("net/ipv4/conf/all/send_redirects".to_string(), "0")]);
    let mut set = |family: &str, link: &str, name: &str, value| {
        wanted.insert(format!("net/{family}/conf/{link}/{name}"), value);
    };
    let tun = observed.links.get(&desired.tun.name).map(|tun| &tun.name);
    for link in [Some(&desired.bridge.name), tun].into_iter().flatten() {
        set("ipv4", link, "forwarding", "1");
        set("ipv4", link, "send_redirects", "0");
        set("ipv4", link, "rp_filter", "2");
        if observed.ipv6 && desired.bridge.mtu >= IPV6_MIN_MTU {
            let only_v4 = desired.universe.prefix().addr().is_ipv4();
            set("ipv6", link, "accept_ra", "0");
            set("ipv6", link, "disable_ipv6", if only_v4 { "1" } else { "0" });
        }
    }
    if let Some(tun) = tun {
        set("ipv4", tun, "accept_local", "1");
    }
    if desired.underlay_forwarding {
        for link in underlay(desired, observed) {
            set("ipv4", link, "forwarding", "1");
        }
    }
    if observed.ipv6 && desired.universe.prefix().addr().is_ipv6() {
        for link in underlay(desired, observed) {
            let key = format!("net/ipv6/conf/{link}/accept_ra");
            let off = observed.sysctls.get(&key).is_some_and(|current| current == "0");
            wanted.insert(key, if off { "0" } else { "2" });
        }
        wanted.insert(IPV6_FORWARDING.into(), "1");
    }
    wanted
}

/// A link's own sysctls go with it; all others must be put back when Weft leaves.
pub(in crate::links) fn outlives_us(key: &str, bridge: &str, tun: &str) -> bool {
    !key.split('/').any(|part| part == bridge || part == tun)
}

fn underlay<'a>(desired: &Desired, observed: &'a Observed) -> BTreeSet<&'a String> {
    let ours = |name: &&String| **name != desired.bridge.name && **name != desired.tun.name;
    let endpoints =
        observed.addresses.iter().filter(|(_, address)| desired.underlay.contains(&address.addr()));
    let defaults = observed.routes.iter().filter(|route| route.is_default());
    let links = endpoints.map(|(link, _)| link).chain(defaults.filter_map(|route| route.link.as_ref()));
    links.filter(ours).filter(|link| observed.links.contains_key(*link)).collect()
}

const IPV6_FORWARDING: &str = "net/ipv6/conf/all/forwarding";
/// A link with a smaller MTU has no IPv6, in bytes (RFC 8200, section 5).
const IPV6_MIN_MTU: u32 = 1280;
