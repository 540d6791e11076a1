//! "ADD".

use crate::harness::{Harness, MTU, Pod, cable, foreign_route, gateway, inside};
use serde_json::json;
use weft::{
    linux::netlink::{Address, Family, Neighbour},
    types::{Mac, Prefix},
};

#[test]
fn the_pods_side_is_set_up() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let address: Prefix = added.result()["ips"][0]["address"].as_str().unwrap().parse().unwrap();
    assert_eq!(address.prefix_len(), 32);
    let eth0 = pod.link("eth0").expect("the interface has its name");
    assert!(eth0.up && pod.link("lo").unwrap().up);
    assert_eq!(eth0.mtu, u32::from(MTU));
    let (addresses, routes, neighbours) = inside(&pod.netns, async |netlink| {
        let routes = netlink.routes(Family::V4).await.unwrap();
        (netlink.addresses().await.unwrap(), routes, netlink.neighbours().await.unwrap())
    });
    assert!(addresses.contains(&Address { link: eth0.index, address }));
    let shown: Vec<_> = routes.iter().map(ToString::to_string).collect();
    let dev = eth0.index;
    assert!(shown.contains(&format!("10.32.0.1/32 dev {dev} proto 99")), "{shown:?}");
    assert!(shown.contains(&format!("0.0.0.0/0 via 10.32.0.1 dev {dev} proto 99")), "{shown:?}");
    let gateway = Neighbour { link: dev, address: gateway(), mac: h.bridge_mac(), permanent: true };
    assert!(neighbours.contains(&gateway), "{neighbours:?}");
}

#[test]
fn duplicate_address_detection_is_off_arp_notify_on_and_router_advertisements_are_refused() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    h.add(&pod, &h.conf()).result();
    assert_eq!(pod.sysctl("net/ipv4/conf/eth0/arp_notify").as_deref(), Some("1"));
    for key in ["accept_dad", "accept_ra", "autoconf"] {
        let value = pod.sysctl(&format!("net/ipv6/conf/eth0/{key}"));
        assert!(matches!(value.as_deref(), None | Some("0")), "{key}: {value:?}");
    }
}

#[test]
fn the_hosts_side_is_a_port_that_says_whose_it_is() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let args = "K8S_POD_UID=u-7;K8S_POD_NAME=web;IgnoreUnknown=1;X=y;K8S_POD_NAMESPACE=default";
    let added = h.call_for("ADD", &pod, &h.conf()).env("CNI_ARGS", args).run(h.node());
    let veths = h.veths();
    assert_eq!(veths.len(), 1);
    assert_eq!(veths[0].name, pod.key().host_interface());
    assert_eq!(added.result()["interfaces"][1]["name"], veths[0].name.as_str());
    assert_eq!(veths[0].alias.as_deref(), Some("weft c1 eth0 10.32.0.2 u-7 default web"));
    assert!(veths[0].master.is_some());
    let known = h.pods();
    assert_eq!(known.len(), 1);
    let told = ["uid", "namespace", "name", "container_id", "ifname", "state"].map(|key| &known[0][key]);
    assert_eq!(told, ["u-7", "default", "web", "c1", "eth0", "active"]);
    assert_eq!(known[0]["addresses"], json!(["10.32.0.2"]));
}

#[test]
fn ids_and_names_follow_their_pattern() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    for id in ["-x", ".x", "a/b", "a b", "a:b", "ä"] {
        h.call_for("ADD", &pod, &h.conf()).env("CNI_CONTAINERID", id).run(h.node()).fails_with(4);
    }
    for name in [".", "..", "a/b", "a:b", "a%b", "a b", "a\tb", "all", "default", "sixteen-letters-"] {
        h.call_for("ADD", &pod, &h.conf()).env("CNI_IFNAME", name).run(h.node()).fails_with(4);
    }
    h.is_clean();
    let id = format!("A0_.-{}", "f".repeat(59));
    let call = h.call_for("ADD", &pod, &h.conf()).env("CNI_CONTAINERID", &id);
    call.env("CNI_IFNAME", "fifteen-letters").run(h.node()).result();
    assert!(h.veths()[0].name.len() <= 15, "hashed before it is used in a name");
}

/// The paths that a symbolic link names may change after the check: what was checked is what is used.
#[test]
fn the_namespace_may_be_named_by_a_symbolic_link() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let link = h.run_dir().join("netns");
    std::os::unix::fs::symlink(pod.path(), &link).unwrap();
    let added = h.call_for("ADD", &pod, &h.conf()).env("CNI_NETNS", link.to_str().unwrap()).run(h.node());
    assert_eq!(added.result()["interfaces"][2]["sandbox"], link.to_str().unwrap());
    assert!(pod.link("eth0").is_some());
}

#[test]
fn a_second_add_is_an_error_and_the_address_stays() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let before = h.pods();
    h.add(&pod, &h.conf()).fails_with(102);
    assert_eq!(h.pods(), before);
    assert_eq!(h.veths().len(), 1);
    h.check(&pod, &h.conf(), added.result()).silence();
}

#[test]
fn the_same_attachment_gets_the_same_address() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    h.add(&Pod::new("c0"), &h.conf()).result();
    let first = h.add(&pod, &h.conf());
    // Its namespace was lost, and the runtime makes it anew without a DEL.
    let again = Pod::new("c1");
    h.add(&Pod::new("c2"), &h.conf()).result();
    let second = h.add(&again, &h.conf());
    assert_eq!(first.result()["ips"], second.result()["ips"]);
    assert_eq!(first.result()["interfaces"][2]["mac"], second.result()["interfaces"][2]["mac"]);
}

#[test]
fn what_a_killed_shim_left_on_the_host_gives_way() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let name = pod.key().host_interface();
    cable(h.node(), &name);
    h.add(&pod, &h.conf()).result();
    assert_eq!(h.veths().len(), 1);
    h.del(&pod, &h.conf()).silence();
    h.is_clean();
}

#[test]
fn a_failure_after_the_reservation_is_undone() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    // The first address's place in the routing table is taken.
    let lo = inside(h.node(), async |netlink| netlink.link_by_name("lo").await.unwrap().index);
    let route = foreign_route("10.32.0.2/32", lo);
    inside(h.node(), async |netlink| netlink.add_route(&route).await.unwrap());
    let message = h.add(&pod, &h.conf()).fails_with(104);
    assert!(message.contains("10.32.0.2/32"), "{message}");
    h.is_clean();
    assert!(pod.link("eth0").is_none());
    inside(h.node(), async |netlink| netlink.delete_route(&route).await.unwrap());
    h.add(&pod, &h.conf()).result();
}

#[test]
fn a_refusal_does_not_touch_what_the_same_attachment_has() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let elsewhere = Pod::new("c1");
    let mut conf = h.conf();
    for (ip, code) in [("10.32.0.300", 2), ("192.0.2.7", 2), ("10.32.0.9", 101)] {
        conf["runtimeConfig"] = json!({"ips": [ip]});
        h.add(&elsewhere, &conf).fails_with(code);
        h.check(&pod, &h.conf(), added.result()).silence();
    }
}

#[test]
fn the_results_version_is_the_requests_and_its_fields_are_that_versions() {
    let h = Harness::start();
    for (n, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].iter().enumerate() {
        let pod = Pod::new(&format!("c{n}"));
        let added = h.add(&pod, &h.conf_of(version));
        let result = added.result();
        assert_eq!(result["cniVersion"], *version);
        assert_eq!(result["ips"][0].get("version"), (n < 2).then(|| json!("4")).as_ref());
        assert_eq!(result["interfaces"][2].get("mtu"), (n == 3).then(|| json!(MTU)).as_ref());
        for route in result["routes"].as_array().unwrap() {
            let only_in_1_1_0 =
                ["mtu", "priority", "table", "scope"].iter().any(|key| route.get(*key).is_some());
            assert!(n == 3 || !only_in_1_1_0, "{route}");
        }
    }
}

#[test]
fn interfaces_come_in_the_order_bridge_host_pod() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let added = h.add(&pod, &h.conf());
    let result = added.result();
    let names: Vec<_> = (0..3).map(|n| result["interfaces"][n]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["weft", &pod.key().host_interface(), "eth0"]);
    assert_eq!(result["interfaces"][0]["mac"], h.bridge_mac().to_string());
    assert_eq!(result["interfaces"][2]["mac"], pod.link("eth0").unwrap().mac.unwrap().to_string());
    assert_eq!(result["interfaces"][2]["sandbox"], pod.path());
    assert!(result["interfaces"][1].get("sandbox").is_none());
    assert_eq!(
        (&result["ips"][0]["interface"], &result["ips"][0]["gateway"]),
        (&json!(2), &json!("10.32.0.1"))
    );
    assert_eq!(result["routes"], json!([{"dst": "0.0.0.0/0", "gw": "10.32.0.1"}]));
}

#[test]
fn capabilities_and_unknown_keys_on_stdin_are_ignored() {
    let h = Harness::start();
    let mut conf = h.conf();
    conf["capabilities"] = json!({"portMappings": true, "frob": true});
    conf["runtimeConfig"] = json!({"frob": [1], "PortMappings": [{"HostPort": 8080, "ContainerPort": 80}],
        "bandwidth": {"IngressRate": 1}, "dns": {"Servers": ["10.96.0.10"]}, "ips": null, "mac": ""});
    conf["frob"] = json!({"a": 1});
    conf["ipam"] = json!({});
    h.add(&Pod::new("c1"), &conf).result();
}

#[test]
fn wished_addresses_ranges_and_macs_are_honoured() {
    let h = Harness::start();
    let mut pods = 0;
    let mut add = |key: &str, value: serde_json::Value, args: &str| {
        pods += 1;
        let pod = Pod::new(&format!("c{pods}"));
        let mut conf = h.conf();
        conf[key] = value;
        let added = h.call_for("ADD", &pod, &conf).env("CNI_ARGS", args).run(h.node());
        let result = added.result().clone();
        let mac = pod.link("eth0").unwrap().mac.unwrap();
        assert_eq!(result["interfaces"][2]["mac"], mac.to_string());
        (result["ips"][0]["address"].as_str().unwrap().to_string(), mac)
    };
    assert_eq!(add("runtimeConfig", json!({"ips": ["10.32.0.20/26"]}), "").0, "10.32.0.20/32");
    assert_eq!(add("runtimeConfig", json!({"IPs": ["10.32.0.21"]}), "").0, "10.32.0.21/32");
    assert_eq!(add("args", json!({"cni": {"ips": ["10.32.0.22"]}}), "").0, "10.32.0.22/32");
    assert_eq!(add("frob", json!(1), "IP=10.32.0.23").0, "10.32.0.23/32");
    let mac: Mac = "02:42:ac:11:00:02".parse().unwrap();
    assert_eq!(add("runtimeConfig", json!({"Mac": mac.to_string()}), "").1, mac);
    let range = json!({"ipRanges": [[{"subnet": "10.32.0.0/26", "rangeStart": "10.32.0.40", "rangeEnd": "10.32.0.47"}]]});
    assert_eq!(add("runtimeConfig", range, "").0, "10.32.0.40/32");
}

#[test]
fn a_smaller_mtu_is_honoured() {
    let h = Harness::start();
    let pod = Pod::new("c1");
    let mut conf = h.conf_of("1.1.0");
    conf["mtu"] = json!(1280);
    let added = h.add(&pod, &conf);
    assert_eq!(added.result()["interfaces"][2]["mtu"], 1280);
    assert_eq!(pod.link("eth0").unwrap().mtu, 1280);
    h.check(&pod, &conf, added.result()).silence();
}

#[test]
fn a_late_add_for_an_old_pod_is_refused() {
    let h = Harness::start();
    let add = |id: &str, uid: &str| {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID={uid}");
        let pod = Pod::new(id);
        let answer = h.call_for("ADD", &pod, &h.conf()).env("CNI_ARGS", args).run(h.node());
        (pod, answer)
    };
    let (_old, first) = add("c1", "old");
    first.result();
    let (_new, second) = add("c2", "new");
    second.result();
    let (_late, third) = add("c3", "old");
    assert!(third.fails_with(4).contains("new has taken its place"));
}
