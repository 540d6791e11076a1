//! What others change of ours is put right within a second.
use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use weft::linux::netlink::{Family, Netlink};
use weft_lab::{fault, node::Node, wait};

use crate::{
    harness::{lab, metric, reaches},
    kernel::{Kernel, meddle},
};

/// What somebody else does to a node.
type Deed = fn(&Arc<Node>);

#[test]
fn what_others_change_is_put_right_within_a_second() {
    let lab = lab(2, 1);
    let node = lab.node("n1").unwrap();
    let (here, there) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    reaches(&here, &there);
    let whole = Kernel::of(&node).without_handles();

    let deeds: [(&str, Deed); 5] = [
        ("the universe's route is deleted", |node| {
            meddle(node, async |netlink| delete_route(netlink, "10.32.0.0/12").await);
        }),
        ("a pod's route is deleted", |node| {
            meddle(node, async |netlink| delete_route(netlink, "10.32.0.2/32").await);
        }),
        ("the bridge is set down", |node| {
            meddle(node, async |netlink| {
                let bridge = netlink.link_by_name("weft").await?;
                Ok(netlink.set_up(bridge.index, false).await?)
            });
        }),
        ("nftables is flushed", |node| fault::nft(node.netns(), "flush ruleset").unwrap()),
        ("the TUN loses its address", |node| {
            meddle(node, async |netlink| {
                let tun = netlink.link_by_name("weft0").await?;
                let addresses = netlink.addresses().await?;
                let address = addresses.iter().find(|a| a.link == tun.index && a.address.addr().is_ipv4());
                Ok(netlink.delete_address(tun.index, address.context("no address")?.address).await?)
            });
        }),
    ];
    for (what, deed) in deeds {
        let repairs = metric(&node, "weft_links_repairs_total").unwrap();
        deed(&node);
        wait::until(&format!("{what}: put right"), Duration::from_secs(1), || {
            Kernel::of(&node).without_handles().check(&whole)
        })
        .unwrap();
        reaches(&here, &there);
        reaches(&there, &here);
        wait::until(&format!("{what}: counted"), Duration::from_secs(1), || {
            let now = metric(&node, "weft_links_repairs_total")?;
            ensure!(now > repairs, "{now} repairs");
            Ok(())
        })
        .unwrap();
    }
}

async fn delete_route(netlink: &Netlink, destination: &str) -> anyhow::Result<()> {
    let routes = netlink.routes(Family::V4).await?;
    let route = routes.iter().find(|route| route.destination.to_string() == destination);
    Ok(netlink.delete_route(route.with_context(|| format!("no route {destination}"))?).await?)
}
