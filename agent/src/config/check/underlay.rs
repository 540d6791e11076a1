//! What the underlay has to fit: the universe, the endpoints, the MTU.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Check, given, items};
use crate::{
    config::{Encryption, HostFacts, host::is_global},
    types::{
        CLEAR_OVERHEAD, CONTROL_PORT, Endpoint, IPV6_EXTRA, LEAST_MTU, Prefix, SEALED_OVERHEAD, Universe,
    },
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

impl Check<'_> {
    pub(super) fn universe(&mut self) -> Option<Universe> {
        let text = &self.args.universe;
        let universe: Universe = self.parse("--universe", text)?;
        if universe.prefix().addr().is_ipv6() && !self.host.ipv6 {
            self.refuse("--universe", text, "IPv6 is off on this host");
        }
        let overlaps = |prefix: &Prefix| {
            let universe = universe.prefix();
            universe.contains(&prefix.addr()) || prefix.contains(&universe.addr())
        };
        let mut seen = BTreeSet::new();
        for route in self.host.routes.iter().filter(|r| !r.is_ours() && r.destination.prefix_len() != 0) {
            let device = route.device.as_deref();
            if overlaps(&route.destination) && seen.insert((route.destination, device)) {
                let via = device.map_or("(which refuses packets)".into(), |device| format!("on {device}"));
                let conflict = format!(
                    "overlaps this host's route {} {via}; choose a universe that is not in use",
                    route.destination
                );
                self.refuse("--universe", text, conflict);
            }
        }
        for address in self.host.addresses.iter().filter(|a| !a.is_ours() && universe.contains(a.ip())) {
            let routed = seen
                .iter()
                .any(|(prefix, device)| *device == Some(&address.device) && prefix.contains(&address.ip()));
            if !routed {
                let conflict = format!(
                    "contains this host's address {} on {}; choose a universe that is not in use",
                    address.ip(),
                    address.device
                );
                self.refuse("--universe", text, conflict);
            }
        }
        Some(universe)
    }

    pub(super) fn endpoints(
        &mut self,
        listen: Option<SocketAddr>,
        universe: Option<Universe>,
    ) -> Vec<Endpoint> {
        let port = listen.map_or(CONTROL_PORT, |listen| listen.port());
        let texts: Vec<_> = items(&self.args.advertise).collect();
        if texts.is_empty() {
            // An address to listen on that is not all of them is the one to be reached at.
            let single = listen.map(|l| l.ip()).filter(|ip| is_global(*ip));
            let default = single.or_else(|| self.host.default_address());
            // In a cluster the Node says it, as soon as it has been asked.
            let any =
                self.host.addresses.iter().filter(|a| self.args.kubernetes && !a.is_ours()).map(|a| a.ip());
            let Some(ip) = default.or_else(|| any.clone().find(|ip| is_global(*ip))) else {
                let conflict = format!(
                    "not given, and there is no default route to tell it by; this host has {}",
                    self.own_addresses()
                );
                self.refuse("--advertise", "", conflict);
                return Vec::new();
            };
            self.endpoint(&ip.to_string(), Endpoint(SocketAddr::new(ip, port)), listen, universe);
            return vec![Endpoint(SocketAddr::new(ip, port))];
        }
        let mut endpoints = Vec::new();
        for text in texts {
            let bare = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
            let endpoint = match (bare, text.parse::<Endpoint>()) {
                (Ok(ip), _) => Endpoint(SocketAddr::new(ip, port)),
                (Err(_), Ok(endpoint)) => endpoint,
                (Err(_), Err(_)) => {
                    let conflict = "not an address; examples: 192.0.2.1, 192.0.2.1:6783, [2001:db8::1]:6783";
                    self.refuse("--advertise", text, conflict);
                    continue;
                }
            };
            if endpoints.contains(&endpoint) {
                self.refuse("--advertise", text, "given twice");
                continue;
            }
            self.endpoint(text, endpoint, listen, universe);
            endpoints.push(endpoint);
        }
        endpoints
    }

    fn endpoint(
        &mut self,
        text: &str,
        endpoint: Endpoint,
        listen: Option<SocketAddr>,
        universe: Option<Universe>,
    ) {
        let ip = endpoint.0.ip();
        if let Some(universe) = universe.filter(|universe| universe.contains(ip)) {
            let conflict = format!(
                "inside --universe {universe}; peers must reach this node by an address of the underlay"
            );
            return self.refuse("--advertise", text, conflict);
        }
        if !is_global(ip) {
            return self.refuse("--advertise", text, "other hosts cannot reach such an address");
        }
        if self.host.device_of(ip).is_none() {
            let conflict = format!("not an address of this host, which has {}", self.own_addresses());
            return self.refuse("--advertise", text, conflict);
        }
        let Some(listen) = listen else { return };
        let heard = match listen.ip() {
            IpAddr::V6(any) if any.is_unspecified() => true,
            IpAddr::V4(any) if any.is_unspecified() => ip.is_ipv4(),
            one => one == ip,
        };
        if !heard || listen.port() != endpoint.0.port() {
            self.refuse("--advertise", text, format!("nobody would listen there: --listen is {listen}"));
        }
    }

    pub(super) fn mtu(&mut self, endpoints: &[Endpoint], universe: Option<Universe>) -> Option<u16> {
        let least = universe.map_or(LEAST_MTU, |universe| universe.least_mtu());
        let extra = if endpoints.iter().any(|endpoint| endpoint.0.is_ipv6()) { IPV6_EXTRA } else { 0 };
        let devices = devices(self.host, endpoints);
        let smallest = devices.iter().filter_map(|device| Some((self.host.mtu_of(device)?, device))).min();
        let underlay = smallest.map(|(mtu, device)| (u16::try_from(mtu).unwrap_or(u16::MAX), device));
        let Some(text) = given(&self.args.mtu) else {
            let Some((carries, device)) = underlay else {
                // An address that is not of this host has been refused already.
                if self.errors.is_empty() {
                    self.refuse("--mtu", "", "not given, and the underlay's is not known");
                }
                return None;
            };
            let mtu = carries.saturating_sub(SEALED_OVERHEAD + extra);
            if mtu < least {
                let conflict = format!(
                    "{device} carries {carries} bytes, which leaves {mtu} for pods: {least} are needed at least"
                );
                self.refuse("--mtu", "", conflict);
            }
            return Some(mtu);
        };
        let mtu = usize::from(self.count("--mtu", text, 1..=usize::from(u16::MAX))?);
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        if mtu < least {
            self.refuse("--mtu", text, format!("pods need {least} bytes at least"));
        }
        let (overhead, how) = match self.args.encryption {
            Encryption::Required => (SEALED_OVERHEAD + extra, "encryption"),
            Encryption::Off => (CLEAR_OVERHEAD + extra, "encapsulation"),
        };
        if let Some((carries, device)) = underlay
            && mtu > carries.saturating_sub(overhead)
        {
            let conflict = format!("{device} carries {carries} bytes, and {how} takes {overhead} of them");
            self.refuse("--mtu", text, conflict);
        }
        Some(mtu)
    }
}

/// The interfaces that carry the endpoints.
pub(super) fn devices(host: &HostFacts, endpoints: &[Endpoint]) -> BTreeSet<String> {
    endpoints.iter().filter_map(|endpoint| host.device_of(endpoint.0.ip())).map(Into::into).collect()
}
