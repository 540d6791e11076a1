//! "CHECK".

use crate::harness::{Harness, Pod, eventually, foreign_route, gateway, inside};
use serde_json::{Value, json};
use weft::{
    linux::netlink::{AddressFlags, Family, Netlink, Route},
    types::Prefix,
};

/// Attaches a pod, lets `change` do its work on the pod's and the node's side, and returns what CHECK finds.
fn after(change: impl AsyncFnOnce(Netlink, u32) + Send, host: impl FnOnce(&Harness, &Pod)) -> String {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    h.check(&pod, &h.conf(), added.result()).silence();
    let link = pod.link("eth0").unwrap().index;
    inside(&pod.netns, async move |netlink| change(netlink, link).await);
    host(&h, &pod);
    let answer = h.check(&pod, &h.conf(), added.result());
    answer.fails_with(103);
    answer.details()
}

async fn nothing(_: Netlink, _: u32) {}

#[track_caller]
fn has(details: &str, word: &str) {
    assert!(details.contains(word), "{details}");
}

#[test]
fn check_prints_nothing_when_all_is_well_in_every_version() {
    let h = Harness::start();
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        let pod = Pod::new(version);
        let added = h.add(&pod, &h.conf_of(version));
        h.check(&pod, &h.conf_of(version), added.result()).silence();
    }
}

#[test]
fn check_verifies_the_interface() {
    has(&after(async |netlink, link| netlink.delete_link(link).await.unwrap(), |_, _| {}), "gone");
    has(&after(async |netlink, link| netlink.set_up(link, false).await.unwrap(), |_, _| {}), "eth0 is down");
}

#[test]
fn check_verifies_the_mac() {
    let mac = "02:42:ac:11:00:02".parse().unwrap();
    let details = after(async move |netlink, link| netlink.set_mac(link, mac).await.unwrap(), |_, _| {});
    has(&details, "02:42:ac:11:00:02");
}

#[test]
fn check_verifies_the_mtu() {
    has(&after(async |netlink, link| netlink.set_mtu(link, 1300).await.unwrap(), |_, _| {}), "MTU 1300");
}

#[test]
fn check_verifies_the_addresses() {
    let address: Prefix = "10.32.0.2/32".parse().unwrap();
    let change = async move |netlink: Netlink, link| netlink.delete_address(link, address).await.unwrap();
    has(&after(change, |_, _| {}), "lacks address 10.32.0.2/32");
}

#[test]
fn check_verifies_the_routes() {
    let change = async |netlink: Netlink, _| {
        let routes = netlink.routes(Family::V4).await.unwrap();
        let default = routes.into_iter().find(Route::is_default).unwrap();
        netlink.delete_route(&default).await.unwrap();
    };
    has(&after(change, |_, _| {}), "lacks a route to 0.0.0.0/0 via 10.32.0.1");
}

#[test]
fn check_verifies_that_the_veths_peer_is_ours() {
    let swapped = async |netlink: Netlink, link| {
        let mac = netlink.link_by_index(link).await.unwrap().mac.unwrap();
        netlink.rename(link, "old0").await.unwrap();
        netlink.create_veth(&crate::harness::local("eth0")).await.unwrap();
        let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
        netlink.set_mac(eth0, mac).await.unwrap();
    };
    has(&after(swapped, |_, _| {}), "the other end of eth0");
    let renamed = |h: &Harness, _: &Pod| {
        let index = h.veths()[0].index;
        inside(h.node(), async |netlink| netlink.rename(index, "mine0").await.unwrap());
    };
    has(&after(nothing, renamed), "is gone");
}

/// The agent would put right what is only taken away: another's route keeps it from that.
#[test]
fn check_verifies_the_host_route() {
    let stolen = |h: &Harness, _: &Pod| {
        inside(h.node(), async |netlink| {
            let lo = netlink.link_by_name("lo").await.unwrap().index;
            netlink.replace_route(&foreign_route("10.32.0.2/32", lo)).await.unwrap();
        });
    };
    has(&after(nothing, stolen), "no route to 10.32.0.2/32");
}

#[test]
fn what_is_taken_away_on_the_host_is_put_right_or_told() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let check = || h.check(&pod, &h.conf(), added.result());
    let veth = h.veths()[0].clone();
    let route = h.pod_routes()[0];
    let damages: [&dyn Fn(); 3] = [
        &|| inside(h.node(), async |netlink| netlink.delete_route(&route).await.unwrap()),
        &|| inside(h.node(), async |netlink| netlink.set_master(veth.index, None).await.unwrap()),
        &|| inside(h.node(), async |netlink| netlink.set_up(veth.index, false).await.unwrap()),
    ];
    let whole = || {
        let now = h.veths();
        now[0].master == veth.master && now[0].up && h.pod_routes() == [route]
    };
    for damage in damages {
        damage();
        let answer = check();
        // Silence means that all is as it was.
        assert!(answer.code == Some(1) || whole(), "{answer:?}");
        if answer.code == Some(1) {
            answer.fails_with(103);
        }
        eventually("the agent has put it right", whole);
        check().silence();
    }
}

#[test]
fn check_verifies_the_allocation() {
    let h = Harness::start();
    let (pod, never) = (Pod::new("c1"), Pod::new("c9"));
    let added = h.add(&pod, &h.conf());
    // Its address has become another's, as when a state file of another time is put back.
    h.rewrite(|_, allocation| allocation.owner = weft::ipam::Owner::Pod(never.key()));
    let answer = h.check(&pod, &h.conf(), added.result());
    answer.fails_with(103);
    has(&answer.details(), "no allocation");
    h.del(&pod, &h.conf()).silence();
    h.check(&pod, &h.conf(), added.result()).fails_with(3);
}

#[test]
fn check_verifies_what_prev_result_says() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf()).result().clone();
    let changed = |path: &str, value: Value| {
        let mut prev = added.clone();
        *prev.pointer_mut(path).unwrap() = value;
        let answer = h.check(&pod, &h.conf(), &prev);
        answer.fails_with(103);
        answer.details()
    };
    has(&changed("/ips/0/address", json!("10.32.0.3/32")), "10.32.0.2");
    has(&changed("/interfaces/2/mac", json!("02:00:00:00:00:09")), "02:00:00:00:00:09");
    has(&changed("/interfaces/2/name", json!("eth9")), "no interface eth0");
    has(&changed("/routes/0/gw", json!("10.32.0.9")), "via 10.32.0.9");
}

#[test]
fn more_addresses_and_routes_than_ours_are_fine() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let link = pod.link("eth0").unwrap().index;
    inside(&pod.netns, async |netlink| {
        let more: Prefix = "192.0.2.7/32".parse().unwrap();
        netlink.add_address(link, more, AddressFlags::default()).await.unwrap();
        let via = Route::via("192.0.2.0/24".parse().unwrap(), gateway(), link);
        netlink.add_route(&via).await.unwrap();
    });
    h.check(&pod, &h.conf(), added.result()).silence();
}
