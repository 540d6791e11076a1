//! The host as it is found: what the configuration is checked against.

use crate::{
    config::{HostAddress, HostFacts, HostLink, HostRoute},
    linux::{
        netlink::{Family, Netlink, RouteKind},
        nft::Nft,
    },
};
use anyhow::{Context, bail};
use std::{collections::BTreeMap, fs, net::UdpSocket, num::NonZero, thread};

/// Asks the kernel once. In a network namespace these are the namespace's links, addresses and routes.
pub async fn facts() -> anyhow::Result<HostFacts> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let devices: BTreeMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let device = |index: u32| devices.get(&index).map(|name| name.to_string());

    let mut routes = Vec::new();
    for family in [Family::V4, Family::V6] {
        routes.extend(netlink.routes(family).await?);
    }
    let routes = routes.into_iter().map(|route| HostRoute {
        destination: route.destination,
        device: route.link.filter(|_| route.kind == RouteKind::Unicast).and_then(device),
        gateway: route.gateway,
        source: route.source,
        metric: route.metric,
        protocol: route.protocol,
    });
    let addresses =
        netlink.addresses().await?.into_iter().filter_map(|address| {
            Some(HostAddress { device: device(address.link)?, address: address.address })
        });
    let host_name = nix::unistd::gethostname().context("read the host name")?;
    Ok(HostFacts {
        host_name: host_name.to_string_lossy().into_owned(),
        ipv6: UdpSocket::bind("[::]:0").is_ok(),
        cores: thread::available_parallelism().map_or(1, NonZero::get),
        addresses: addresses.collect(),
        routes: routes.collect(),
        links: links.iter().map(|link| HostLink { device: link.name.clone(), mtu: link.mtu }).collect(),
    })
}

/// What no agent can do without, before it begins anything: the right to change the network, and `nft`.
pub fn check_means() -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    if !may_change_the_network(&status) {
        bail!(
            "the agent sets up links, routes and nftables: it must run as root, or have the capability NET_ADMIN \
             (systemd: AmbientCapabilities=CAP_NET_ADMIN; containers: capabilities.add NET_ADMIN)"
        );
    }
    Nft::find()?;
    Ok(())
}

/// By the effective capabilities in `/proc/self/status`; a kernel that does not show them has the last word later.
fn may_change_the_network(status: &str) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    effective.is_none_or(|set| set & NET_ADMIN != 0)
}

/// `CAP_NET_ADMIN` in a set of capabilities (capabilities(7), linux/capability.h).
const NET_ADMIN: u64 = 1 << 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_read_from_the_status() {
        let with = |set: &str| may_change_the_network(&format!("Name:\tweft\nCapEff:\t{set}\nCapBnd:\t0\n"));
        assert!(with("000001ffffffffff") && with("0000000000001000"));
        assert!(!with("000001ffffffefff") && !with("0000000000000000"));
        assert!(may_change_the_network("Name:\tweft\n"));
    }
}
