//! The host as it is found: what the configuration is checked against.

use crate::{
    config::{HostAddress, HostFacts, HostLink, HostRoute},
    linux::{
        netlink::{Family, Netlink, RouteKind},
        nft::Nft,
        privileges,
    },
};
use anyhow::{Context, bail};
use std::{collections::BTreeMap, net::UdpSocket, num::NonZero, thread};

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
    if !privileges::has_net_admin()? {
        bail!(
            "the agent sets up links, routes and nftables: it must run as root, or have the capability NET_ADMIN \
             (systemd: AmbientCapabilities=CAP_NET_ADMIN; containers: capabilities.add NET_ADMIN)"
        );
    }
    Nft::find()?;
    Ok(())
}
