//! What is kept on disk of the API server's view, for starts while it cannot be reached.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Node, Uid, board::Takeover};
use crate::types::{Endpoint, PeerName};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    pub nodes: BTreeMap<PeerName, Node>,
    /// Who shares the universe at the start.
    pub seeds: Vec<PeerName>,
    /// Where the API server itself listens, for when its Service does not work.
    pub servers: Vec<SocketAddr>,
    /// Agreed on, of nodes that we know to be gone.
    pub takeovers: Vec<Takeover>,
}

#[derive(Default, Serialize, Deserialize)]
struct CacheJson {
    #[serde(default)]
    nodes: Vec<NodeJson>,
    #[serde(default)]
    seeds: Vec<String>,
    #[serde(default)]
    servers: Vec<SocketAddr>,
    #[serde(default)]
    takeovers: Vec<Takeover>,
}

#[derive(Serialize, Deserialize)]
struct NodeJson {
    name: String,
    uid: Uid,
    endpoints: Vec<SocketAddr>,
    #[serde(default)]
    pod_cidrs: Vec<String>,
}

impl Cache {
    /// None where it cannot be read: then it is as if there were none.
    pub fn read(text: &str) -> Option<Self> {
        let CacheJson { nodes, seeds, servers, takeovers } = serde_json::from_str(text).ok()?;
        let node = |json: NodeJson| {
            let name: PeerName = json.name.parse().ok()?;
            let node = Node {
                name: name.clone(),
                uid: json.uid,
                endpoints: json.endpoints.into_iter().map(Endpoint).collect(),
                pod_cidrs: json.pod_cidrs.iter().filter_map(|text| text.parse().ok()).collect(),
                tainted: false,
                network_available: true,
            };
            Some((name, node))
        };
        let seeds = seeds.iter().map(|name| name.parse().ok());
        let (nodes, seeds) = (nodes.into_iter().filter_map(node).collect(), seeds.collect::<Option<_>>()?);
        Some(Self { nodes, seeds, servers, takeovers })
    }

    pub fn write(&self) -> String {
        let node = |node: &Node| NodeJson {
            name: node.name.to_string(),
            uid: node.uid.clone(),
            endpoints: node.endpoints.iter().map(|endpoint| endpoint.0).collect(),
            pod_cidrs: node.pod_cidrs.iter().map(ToString::to_string).collect(),
        };
        let json = CacheJson {
            nodes: self.nodes.values().map(node).collect(),
            seeds: self.seeds.iter().map(PeerName::to_string).collect(),
            servers: self.servers.clone(),
            takeovers: self.takeovers.clone(),
        };
        serde_json::to_string(&json).expect("strings and numbers are JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let name: PeerName = "a".parse().unwrap();
        let node = Node {
            name: name.clone(),
            uid: Uid("1".into()),
            endpoints: vec!["192.0.2.1:6783".parse().unwrap(), "[2001:db8::1]:6783".parse().unwrap()],
            pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
            tainted: false,
            network_available: true,
        };
        let cache = Cache {
            nodes: [(name.clone(), node)].into(),
            seeds: vec![name.clone()],
            servers: vec!["10.200.0.1:6443".parse().unwrap()],
            takeovers: vec![Takeover {
                node: "b".parse().unwrap(),
                uid: Uid("2".into()),
                epoch: 1,
                taker: name,
            }],
        };
        assert_eq!(Cache::read(&cache.write()), Some(cache));
        assert_eq!(Cache::read("{}"), Some(Cache::default()));
        assert_eq!(Cache::read("half a fi"), None);
    }
}
