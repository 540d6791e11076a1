//! What somebody else changes.

use super::*;

#[test]
fn drift_is_repaired_within_a_second() {
    in_a_node(|| async {
        let node = Node::new().await;
        let pod = Namespace::new();
        let port = node.plug(&pod, 2).await;
        let mut full = desired();
        full.pods.insert(port.host_interface.clone(), port.clone());
        let handle = node.spawn(full.clone()).await;
        assert_eq!(handle.status().error, None);
        let (netlink, nft) = (&node.netlink, Nft::find().unwrap());
        let (weft, weft0, wf) =
            (node.index("weft").await, node.index("weft0").await, node.index(&port.host_interface).await);
        for drift in [
            "a route",
            "a bad route",
            "bridge down",
            "TUN down",
            "ruleset",
            "a rule",
            "an element",
            "address",
            "TUN's address",
            "port",
            "port flags",
            "FDB",
            "neighbour",
            "MTU",
            "MAC",
            "sysctl",
            "bridge gone",
        ] {
            let repairs = handle.status().repairs;
            match drift {
                "a route" => {
                    let route = Route::on_link(Prefix::from(pod_ip(2)), weft);
                    netlink.delete_route(&route).await.unwrap();
                }
                "a bad route" => {
                    let route = Route::on_link("10.34.0.0/24".parse().unwrap(), weft);
                    netlink.add_route(&route).await.unwrap();
                }
                "bridge down" => netlink.set_up(weft, false).await.unwrap(),
                "TUN down" => netlink.set_up(weft0, false).await.unwrap(),
                "ruleset" => nft.run("flush ruleset", |_| {}).await.unwrap(),
                "a rule" => nft.run("flush chain inet weft postrouting", |_| {}).await.unwrap(),
                "an element" => nft.run("flush set bridge weft pods4", |_| {}).await.unwrap(),
                "address" => netlink.delete_address(weft, Prefix::from(gateway())).await.unwrap(),
                "TUN's address" => netlink.delete_address(weft0, Prefix::from(gateway())).await.unwrap(),
                "port" => netlink.set_master(wf, None).await.unwrap(),
                "port flags" => netlink.set_port(wf, Default::default()).await.unwrap(),
                "FDB" => netlink.delete_fdb(wf, port.mac).await.unwrap(),
                "neighbour" => netlink.delete_neighbour(weft, pod_ip(2)).await.unwrap(),
                "MTU" => netlink.set_mtu(weft, 1280).await.unwrap(),
                "MAC" => netlink.set_mac(weft, Mac([2, 1, 1, 1, 1, 1])).await.unwrap(),
                "sysctl" => sysctl::write("net/ipv4/conf/weft/forwarding", "0").unwrap(),
                _ => netlink.delete_link(weft).await.unwrap(),
            }
            let begun = Instant::now();
            while handle.status().repairs == repairs || !node.to_do(&full).await.is_empty() {
                let left = node.to_do(&full).await;
                assert!(begun.elapsed() < Duration::from_secs(1), "{drift}: still to do after 1 s: {left:?}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            eprintln!("{drift}: repaired in {:?}", begun.elapsed());
        }
        assert_eq!(handle.status().error, None);
    });
}
