//! What an earlier ADD answered, as the runtime hands it back.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::failure::{Failure, code};
use serde::Deserialize;
use serde_json::Value;
use std::net::IpAddr;
use weft::types::{Mac, Prefix};

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PrevResult {
    pub interfaces: Vec<Interface>,
    pub ips: Vec<Ip>,
    pub routes: Vec<RouteTo>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Interface {
    pub name: String,
    pub mac: Option<String>,
    pub mtu: Option<u32>,
    pub sandbox: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Ip {
    pub address: Prefix,
    pub interface: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RouteTo {
    pub dst: Prefix,
    #[serde(default)]
    pub gw: Option<IpAddr>,
}

impl PrevResult {
    /// # Errors
    /// Code 6.
    pub fn parse(value: &Value) -> Result<Self, Failure> {
        let bad = |why: String| Failure::new(code::DECODE, format!("prevResult is not a result: {why}"));
        let result = Self::deserialize(value).map_err(|error| bad(error.to_string()))?;
        let beyond = |ip: &&Ip| ip.interface.is_some_and(|index| index >= result.interfaces.len());
        if let Some(ip) = result.ips.iter().find(beyond) {
            return Err(bad(format!("{} is on an interface that is not listed", ip.address)));
        }
        Ok(result)
    }

    /// The pod's interface of that name, with its place in the list.
    pub fn of_pod(&self, ifname: &str) -> Option<(usize, &Interface)> {
        let ours = |interface: &Interface| {
            interface.name == ifname
                && interface.sandbox.as_deref().is_some_and(|sandbox| !sandbox.is_empty())
        };
        self.interfaces.iter().enumerate().find(|(_, interface)| ours(interface))
    }

    /// The addresses of the interface at that place.
    pub fn addresses(&self, interface: usize) -> Vec<Prefix> {
        self.ips.iter().filter(|ip| ip.interface == Some(interface)).map(|ip| ip.address).collect()
    }
}

impl Interface {
    pub fn mac(&self) -> Option<Mac> {
        self.mac.as_deref().and_then(|text| text.to_ascii_lowercase().parse().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_result_of_any_version_is_read() {
        let value = json!({"cniVersion": "0.4.0",
            "interfaces": [{"name": "weft"}, {"name": "eth0", "mac": "02:42:AC:11:00:02", "sandbox": "/x"}],
            "ips": [{"version": "4", "interface": 1, "address": "10.32.0.2/32", "gateway": "10.32.0.1"}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.32.0.1"}], "dns": {}});
        let result = PrevResult::parse(&value).unwrap();
        let (place, eth0) = result.of_pod("eth0").unwrap();
        assert_eq!((place, eth0.mac()), (1, "02:42:ac:11:00:02".parse().ok()));
        assert_eq!(result.addresses(1), ["10.32.0.2/32".parse::<Prefix>().unwrap()]);
        for bad in [
            json!("x"),
            json!({"ips": [{"address": "x"}]}),
            json!({"ips": [{"interface": 0, "address": "10.0.0.1/8"}]}),
        ] {
            assert_eq!(PrevResult::parse(&bad).unwrap_err().code, code::DECODE);
        }
    }
}
