//! What ADD prints, in the words of each version.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{agent::Reservation, version::Version};
use serde_json::{Value, json};
use std::path::Path;

/// Interfaces in the order bridge, host's end, pod's end; IPv4 before IPv6: kubelet takes the order.
pub fn added(version: Version, reservation: &Reservation, ifname: &str, netns: &Path) -> Value {
    let Reservation { bridge, bridge_mac, host_interface, host_mac, mac, mtu, .. } = reservation;
    let mut interfaces = [
        json!({ "name": bridge, "mac": bridge_mac.to_string() }),
        json!({ "name": host_interface, "mac": host_mac.to_string() }),
        json!({ "name": ifname, "mac": mac.to_string(), "sandbox": netns }),
    ];
    if version.interfaces_have_mtu() {
        for end in &mut interfaces[1..] {
            end["mtu"] = json!(mtu);
        }
    }
    let (mut ips, mut routes) = (Vec::new(), Vec::new());
    for (address, gateway) in &reservation.addresses {
        let mut ip = json!({ "interface": POD, "address": address, "gateway": gateway });
        if version.ips_have_version() {
            ip["version"] = json!(if gateway.is_ipv4() { "4" } else { "6" });
        }
        ips.push(ip);
        let everywhere = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        routes.push(json!({ "dst": everywhere, "gw": gateway }));
    }
    let mut result = json!({
        "cniVersion": version.as_str(),
        "interfaces": interfaces,
        "ips": ips,
        "routes": routes,
    });
    if version.results_have_dns() {
        result["dns"] = json!({});
    }
    result
}

/// What VERSION prints: the caller's version, whichever it is, and ours.
pub fn versions(asked: &str) -> Value {
    json!({ "cniVersion": asked, "supportedVersions": Version::ALL.map(Version::as_str) })
}

/// The pod's end among the interfaces.
const POD: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_exist_from_their_version_on() {
        let reservation = Reservation {
            addresses: vec![
                ("10.32.0.2/32".parse().unwrap(), "10.32.0.1".parse().unwrap()),
                ("fd00::2/128".parse().unwrap(), "fd00::1".parse().unwrap()),
            ],
            mac: "02:00:00:00:00:03".parse().unwrap(),
            mtu: 1400,
            host_interface: "wf0123456789ab".into(),
            host_mac: "02:00:00:00:00:02".parse().unwrap(),
            host_alias: String::new(),
            bridge: "weft".into(),
            bridge_mac: "02:00:00:00:00:01".parse().unwrap(),
        };
        for version in Version::ALL {
            let result = added(version, &reservation, "eth0", Path::new("/run/netns/x"));
            assert_eq!(result["cniVersion"], version.as_str());
            assert_eq!(result["ips"][0].get("version").is_some(), version < Version::V1_0_0);
            assert_eq!(result.get("dns").is_some(), version < Version::V1_0_0);
            assert_eq!(result["interfaces"][2].get("mtu").is_some(), version >= Version::V1_1_0);
            assert_eq!(result["ips"][1]["address"], "fd00::2/128");
            assert_eq!(result["interfaces"][2]["sandbox"], "/run/netns/x");
            assert!(result["interfaces"][1].get("sandbox").is_none());
        }
    }
}
