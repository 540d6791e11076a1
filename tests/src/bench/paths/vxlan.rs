//! VXLAN in the kernel, set up as flannel does: no learning; each node's device has a fixed MAC, a permanent neighbour
//! and a forwarding entry for the other, and the other's pods are routed over it.
use std::net::IpAddr;

use anyhow::Context;
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::{LinkVxlan, RouteMessageBuilder, packet_route::neighbour::NeighbourFlags};

use super::ground::{Ground, Side};
use crate::{bench::wires::CABLE, links::Links};

pub fn set_up(ground: &Ground<'_>) -> anyhow::Result<()> {
    ground.plug_pods(MTU)?;
    Side::BOTH.into_iter().try_for_each(|side| {
        ground.node(side).netns().links(async |links| set_up_side(links, side).await.context("VXLAN"))
    })
}

async fn set_up_side(links: &Links, side: Side) -> anyhow::Result<()> {
    let handle = links.handle();
    let device = LinkVxlan::new(DEVICE, VNI)
        .dev(links.index(CABLE).await?)
        .local(side.underlay())
        .port(PORT)
        .learning(false)
        .address(mac(side).to_vec())
        .mtu(MTU)
        .up()
        .build();
    handle.link().add(device).execute().await.context("create the device")?;
    links.address(DEVICE, IpNet::V4(Ipv4Net::new_assert(own(side), 32))).await?;

    let (index, other) = (links.index(DEVICE).await?, side.other());
    let neighbour = handle.neighbours().add(index, own(other).into()).link_layer_address(&mac(other));
    neighbour.execute().await.context("add the neighbour")?;
    let forwarding = handle
        .neighbours()
        .add_bridge(index, &mac(other))
        .flags(NeighbourFlags::Own)
        .destination(other.underlay().into());
    forwarding.execute().await.context("add the forwarding entry")?;
    let route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(other.pods().addr().into(), other.pods().prefix_len())?
        .gateway(own(other).into())?
        .output_interface(index)
        .onlink()
        .build();
    handle.route().add(route).execute().await.context("add the route")
}

/// The device's own address: the first of the node's, as flannel has it.
fn own(side: Side) -> std::net::Ipv4Addr {
    side.pods().network()
}

fn mac(side: Side) -> [u8; 6] {
    // Locally administered, unicast.
    [2, 0, 0, 0, 0, side as u8]
}

const DEVICE: &str = "vxlan";
const VNI: u32 = 1;
/// Linux' and flannel's own, from before IANA assigned one.
const PORT: u16 = 8472;
/// The cable's less IPv4 20, UDP 8, VXLAN 8 and the inner Ethernet header 14.
const MTU: u32 = 1450;
