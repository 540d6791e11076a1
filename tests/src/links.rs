//! Links, addresses and routes over netlink, so that the lab needs no `ip` command.
use std::{net::IpAddr, os::fd::AsRawFd};

use anyhow::Context;
use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoVeth, LinkAttribute},
        route::{RouteAttribute, RouteMessage},
    },
};

use crate::namespace::Netns;

/// A netlink connection into one network namespace.
pub struct Links(Handle);

/// Works on the network namespace that the calling thread is in.
pub fn here<T>(work: impl AsyncFnOnce(&Links) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        let connection = tokio::spawn(connection);
        let done = work(&Links(handle)).await;
        connection.abort();
        done
    })
}

impl Links {
    /// A bridge whose MTU stays, whatever its ports' are.
    pub async fn bridge(&self, name: &str) -> anyhow::Result<()> {
        let add = self.0.link().add(LinkBridge::new(name).build());
        add.execute().await.with_context(|| format!("create bridge {name}"))?;
        self.mtu(name, 1500).await
    }

    /// A pair of interfaces, one here and one in another namespace, both up.
    pub async fn veth(&self, here: &str, there: &str, other: &Netns) -> anyhow::Result<()> {
        let target = other.try_clone()?;
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(there)
            .append_extra_attribute(LinkAttribute::NetNsFd(target.as_raw_fd()))
            .build();
        let pair = LinkVeth::new(here, there).set_info_data(InfoData::Veth(InfoVeth::Peer(peer))).build();
        let add = self.0.link().add(pair);
        add.execute().await.with_context(|| format!("create veth {here} to {there} in {}", other.name()))?;
        // Not before both ends are there: an end can't be set up alone.
        self.up(here).await?;
        other.links(async |links| links.up(there).await)
    }

    pub async fn plug(&self, name: &str, bridge: &str) -> anyhow::Result<()> {
        let port = LinkUnspec::new_with_index(self.index(name).await?).controller(self.index(bridge).await?);
        self.change(port).await.with_context(|| format!("plug {name} into {bridge}"))
    }

    pub async fn up(&self, name: &str) -> anyhow::Result<()> {
        let link = LinkUnspec::new_with_index(self.index(name).await?).up();
        self.change(link).await.with_context(|| format!("set {name} up"))
    }

    pub async fn down(&self, name: &str) -> anyhow::Result<()> {
        let link = LinkUnspec::new_with_index(self.index(name).await?).down();
        self.change(link).await.with_context(|| format!("set {name} down"))
    }

    pub async fn mtu(&self, name: &str, mtu: u32) -> anyhow::Result<()> {
        let link = LinkUnspec::new_with_index(self.index(name).await?).mtu(mtu);
        self.change(link).await.with_context(|| format!("set the MTU of {name} to {mtu}"))
    }

    pub async fn address(&self, name: &str, address: IpNet) -> anyhow::Result<()> {
        let add = self.0.address().add(self.index(name).await?, address.addr(), address.prefix_len());
        add.execute().await.with_context(|| format!("give {name} the address {address}"))
    }

    pub async fn remove_address(&self, address: IpAddr) -> anyhow::Result<()> {
        let what = || format!("remove the address {address}");
        let mut found = self.0.address().get().set_address_filter(address).execute();
        let message = found.try_next().await.with_context(what)?.with_context(what)?;
        self.0.address().del(message).execute().await.with_context(what)
    }

    pub async fn default_route(&self, via: IpAddr) -> anyhow::Result<()> {
        let unspecified = if via.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        self.route(unspecified.parse().expect("a prefix"), via).await
    }

    pub async fn route(&self, to: IpNet, via: IpAddr) -> anyhow::Result<()> {
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to.addr(), to.prefix_len())?
            .gateway(via)?
            .build();
        self.0.route().add(route).execute().await.with_context(|| format!("add route {to} via {via}"))
    }

    /// Has an address on that link resolved for good.
    pub async fn neighbour(&self, name: &str, address: IpAddr, hardware: &[u8]) -> anyhow::Result<()> {
        let add = self.0.neighbours().add(self.index(name).await?, address).link_layer_address(hardware);
        add.execute().await.with_context(|| format!("tell {name} where {address} is"))
    }

    pub async fn hardware_address(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let mut found = self.0.link().get().match_name(name).execute();
        let link = found.try_next().await.with_context(|| format!("look for {name}"))?;
        let address = |attribute| match attribute {
            LinkAttribute::Address(address) => Some(address),
            _ => None,
        };
        link.and_then(|link| link.attributes.into_iter().find_map(address))
            .with_context(|| format!("{name} has no hardware address"))
    }

    /// Names of all links.
    pub async fn names(&self) -> anyhow::Result<Vec<String>> {
        let links: Vec<_> = self.0.link().get().execute().try_collect().await.context("list links")?;
        let name = |attribute: LinkAttribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        };
        Ok(links.into_iter().filter_map(|link| link.attributes.into_iter().find_map(name)).collect())
    }

    /// The MTU of a link, in bytes.
    pub async fn mtu_of(&self, name: &str) -> anyhow::Result<u32> {
        let mut found = self.0.link().get().match_name(name).execute();
        let link = found.try_next().await.with_context(|| format!("look for {name}"))?;
        let mtu = |attribute: &LinkAttribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        };
        link.and_then(|link| link.attributes.iter().find_map(mtu))
            .with_context(|| format!("{name} has no MTU"))
    }

    /// All routes of both families as text, with the number of the protocol that made each.
    pub async fn routes(&self) -> anyhow::Result<Vec<(u8, String)>> {
        let mut routes = Vec::new();
        for any in [RouteMessageBuilder::<IpAddr>::new().build(), v6_routes()] {
            let list: Vec<_> =
                self.0.route().get(any).execute().try_collect().await.context("list routes")?;
            routes.extend(list.iter().map(|route| (u8::from(route.header.protocol), describe(route))));
        }
        Ok(routes)
    }

    /// For requests that only one caller makes.
    pub(crate) fn handle(&self) -> Handle {
        self.0.clone()
    }

    async fn change(&self, link: LinkMessageBuilder<LinkUnspec>) -> Result<(), rtnetlink::Error> {
        self.0.link().change(link.build()).execute().await
    }

    pub(crate) async fn index(&self, name: &str) -> anyhow::Result<u32> {
        let mut found = self.0.link().get().match_name(name).execute();
        let link = found.try_next().await.with_context(|| format!("look for {name}"))?;
        Ok(link.with_context(|| format!("there is no link {name}"))?.header.index)
    }
}

fn v6_routes() -> RouteMessage {
    RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()
}

fn describe(route: &RouteMessage) -> String {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(to) => Some(format!("{to:?}")),
        _ => None,
    });
    format!("{}/{}", destination.as_deref().unwrap_or("default"), route.header.destination_prefix_length)
}
