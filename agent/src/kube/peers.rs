//! Whom to call of all the cluster's nodes.
//!
//! Those whose records are known are found by the mesh itself. Of the others a few are called at a time, others the next
//! time, so that a thousand nodes without an agent cost no more than a handful, and two parts of a network that have not
//! met yet do meet.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Node;
use crate::types::{Endpoint, PeerAddress, PeerName};
use siphasher::sip::SipHasher13;
use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
};

/// Addresses of nodes to be called in this round; `known` are peers that the mesh knows already.
pub fn to_call(
    nodes: &BTreeMap<PeerName, Node>,
    me: &PeerName,
    known: &BTreeSet<PeerName>,
    round: u64,
) -> Vec<PeerAddress> {
    let mut strangers: Vec<&Node> =
        nodes.values().filter(|node| node.name != *me && !known.contains(&node.name)).collect();
    // Each agent in an order of its own.
    strangers.sort_by_key(|node| place(me, &node.name));
    let count = strangers.len();
    let first = if count > AT_A_TIME { (round as usize).wrapping_mul(AT_A_TIME) % count } else { 0 };
    let chosen = strangers.into_iter().cycle().skip(first).take(count.min(AT_A_TIME));
    chosen.flat_map(|node| &node.endpoints).map(address).collect()
}

pub fn address(endpoint: &Endpoint) -> PeerAddress {
    PeerAddress { host: endpoint.0.ip().to_string(), port: endpoint.0.port() }
}

fn place(me: &PeerName, other: &PeerName) -> u64 {
    let mut hash = SipHasher13::new();
    (me, other).hash(&mut hash);
    hash.finish()
}

const AT_A_TIME: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::Uid;

    fn nodes(count: u8) -> BTreeMap<PeerName, Node> {
        let node = |n: u8| {
            let name: PeerName = format!("n{n}").parse().unwrap();
            let endpoints = vec![format!("192.0.2.{n}:6783").parse().unwrap()];
            let node = Node {
                name: name.clone(),
                uid: Uid::default(),
                endpoints,
                pod_cidrs: Vec::new(),
                tainted: false,
                network_available: false,
            };
            (name, node)
        };
        (1..=count).map(node).collect()
    }

    fn hosts(addresses: Vec<PeerAddress>) -> BTreeSet<String> {
        addresses.into_iter().map(|address| address.host).collect()
    }

    #[test]
    fn all_others_of_a_small_cluster_are_called_but_those_known_and_ourselves() {
        let me = "n1".parse().unwrap();
        let called = hosts(to_call(&nodes(4), &me, &["n2".parse().unwrap()].into(), 7));
        assert_eq!(called, ["192.0.2.3".to_string(), "192.0.2.4".to_string()].into());
    }

    #[test]
    fn of_many_a_few_are_called_at_a_time_and_all_in_the_end() {
        let (me, nodes) = ("n1".parse().unwrap(), nodes(101));
        let rounds: Vec<_> =
            (0..13).map(|round| hosts(to_call(&nodes, &me, &BTreeSet::new(), round))).collect();
        assert!(rounds.iter().all(|called| called.len() == AT_A_TIME));
        assert_eq!(rounds.into_iter().flatten().collect::<BTreeSet<_>>().len(), 100);
    }
}
