//! Looks at the network namespace.

use super::{
    firewall::{Family, Firewall, NAME},
    observed::Observed,
};
use crate::linux::{
    netlink::{Family as IpFamily, Netlink, NetlinkError},
    nft::{Nft, NftError},
    sysctl,
};
use anyhow::Context;

/// Links, addresses, routes, neighbours and FDB; neither sysctls nor firewall.
pub(super) async fn routing(netlink: &Netlink) -> Result<Observed, NetlinkError> {
    let links = netlink.links().await?;
    let name_of = |index| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    let mut observed = Observed { ipv6: ipv6(), ..Observed::default() };
    for address in netlink.addresses().await? {
        observed.addresses.extend(name_of(address.link).map(|name| (name, address.address)));
    }
    for family in [IpFamily::V4, IpFamily::V6] {
        if family == IpFamily::V4 || observed.ipv6 {
            let routes = netlink.routes(family).await?;
            observed.routes.extend(routes.iter().map(|route| route.with_link(route.link.and_then(name_of))));
        }
    }
    for neighbour in netlink.neighbours().await?.into_iter().filter(|neighbour| neighbour.permanent) {
        if let Some(name) = name_of(neighbour.link) {
            observed.neighbours.insert((name, neighbour.address), neighbour.mac);
        }
    }
    for entry in netlink.fdb().await?.into_iter().filter(|entry| entry.is_static) {
        observed.fdb.extend(name_of(entry.port).map(|name| (name, entry.mac)));
    }
    observed.links = links.into_iter().map(|link| (link.name.clone(), link)).collect();
    Ok(observed)
}

/// Adds the values of these sysctls, as far as there are such.
pub(super) fn sysctls<'a>(
    observed: &mut Observed,
    keys: impl IntoIterator<Item = &'a String>,
) -> anyhow::Result<()> {
    for key in keys {
        observed.sysctls.extend(sysctl::read(key)?.map(|value| (key.clone(), value)));
    }
    Ok(())
}

pub(super) async fn firewall(nft: &Nft) -> anyhow::Result<Firewall> {
    let mut firewall = Firewall::default();
    firewall.read(&nft.list_chains().await?).context("list nftables chains")?;
    for family in Family::ALL {
        match nft.list_table(&family.to_string(), NAME).await {
            Ok(json) => {
                firewall.read(&json).with_context(|| format!("list nftables table {family} {NAME}"))?
            }
            Err(NftError::Refused { stderr, .. }) if stderr.contains("No such file") => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(firewall)
}

fn ipv6() -> bool {
    matches!(sysctl::read("net/ipv6/conf/all/forwarding"), Ok(Some(_)))
}
