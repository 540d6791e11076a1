//! A snapshot in the words of local.proto.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::snapshot::{Path, Snapshot};
use weft_proto::local;

pub(super) fn status(now: &Snapshot) -> local::StatusReply {
    let (owned, ..) = now.addresses();
    local::StatusReply {
        name: now.name.to_string(),
        incarnation: now.incarnation.0,
        software: now.software.clone(),
        universe: now.universe.to_string(),
        endpoints: now.endpoints.iter().map(ToString::to_string).collect(),
        encryption: now.encryption.to_string(),
        ready: now.is_ready(),
        not_ready: now.not_ready.clone(),
        warnings: now.warnings.clone(),
        peers: count(now.others().count()),
        links: count(now.links()),
        pods: count(now.pods.len()),
        mtu: now.mtu.into(),
        bridge_address: now.bridge_address.map(|ip| ip.to_string()).unwrap_or_default(),
        addresses_owned: clamp(owned),
        addresses_free: clamp(now.addresses_free),
        uptime_seconds: now.uptime.as_secs(),
        counters: counters(now),
    }
}

pub(super) fn peers(now: &Snapshot) -> local::PeersReply {
    let shares = now.shares();
    let peers = now.peers.iter().map(|peer| local::Peer {
        name: peer.name.to_string(),
        endpoints: peer.endpoints.iter().map(ToString::to_string).collect(),
        software: peer.software.clone(),
        me: peer.name == now.name,
        linked: peer.linked,
        path: peer.path.kind().into(),
        via: match &peer.path {
            Path::Relayed(relay) => relay.to_string(),
            _ => String::new(),
        },
        why: match &peer.path {
            Path::Down(why) => why.clone(),
            _ => String::new(),
        },
        rtt_us: peer.rtt.map_or(0, |rtt| count(rtt.as_micros() as usize).max(1)),
        loss: peer.loss,
        mtu: peer.mtu.into(),
        addresses: clamp(shares.get(&peer.name).copied().unwrap_or_default()),
        packets_sent: peer.traffic.packets_sent,
        bytes_sent: peer.traffic.bytes_sent,
        packets_received: peer.traffic.packets_received,
        bytes_received: peer.traffic.bytes_received,
    });
    local::PeersReply { peers: peers.collect() }
}

pub(super) fn ipam(now: &Snapshot) -> local::IpamReply {
    let ranges = now.ranges.iter().map(|range| local::Range {
        prefix: range.prefix.to_string(),
        owner: range.owner.to_string(),
        mine: range.owner == now.name,
        allocated: range.allocated,
        resting: range.resting,
    });
    local::IpamReply {
        universe: now.universe.to_string(),
        ranges: ranges.collect(),
        waiting_for: now.waiting_for.clone().unwrap_or_default(),
    }
}

pub(super) fn pods(now: &Snapshot) -> local::PodsReply {
    let pods = now.pods.iter().map(|entry| local::PodEntry {
        attachment: Some(local::Attachment {
            container_id: entry.attachment.container_id().into(),
            ifname: entry.attachment.ifname().into(),
        }),
        pod: Some(local::Pod {
            uid: entry.pod.uid.clone(),
            namespace: entry.pod.namespace.clone(),
            name: entry.pod.name.clone(),
        }),
        addresses: entry.addresses.iter().map(ToString::to_string).collect(),
        host_interface: entry.attachment.host_interface(),
        state: if entry.active { "active" } else { "reserved" }.into(),
    });
    local::PodsReply { pods: pods.collect() }
}

/// Names are a path, so that the command line can group them: `drops/no_peer`.
fn counters(now: &Snapshot) -> Vec<local::Counter> {
    let traffic = [
        ("packets_sent", now.traffic.packets_sent),
        ("bytes_sent", now.traffic.bytes_sent),
        ("packets_received", now.traffic.packets_received),
        ("bytes_received", now.traffic.bytes_received),
        ("repairs", now.repairs),
    ];
    let traffic = traffic.into_iter().map(|(name, value)| local::Counter { name: name.into(), value });
    let groups = [("drops", &now.drops), ("gossip", &now.gossip)];
    let grouped = groups.into_iter().flat_map(|(group, counters)| {
        counters
            .iter()
            .map(move |(name, value)| local::Counter { name: format!("{group}/{name}"), value: *value })
    });
    traffic.chain(grouped).collect()
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn clamp(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::snapshot::{addresses_in, example};

    #[test]
    fn addresses_are_summed_by_owner() {
        let now = example::snapshot();
        let status = status(&now);
        assert_eq!((status.addresses_owned, status.addresses_free), (1 << 19, (1 << 19) - 5));
        assert_eq!((status.peers, status.links, status.pods), (2, 1, 2));
        let shares: Vec<_> = peers(&now).peers.into_iter().map(|peer| (peer.me, peer.addresses)).collect();
        assert_eq!(shares, [(true, 1 << 19), (false, 1 << 18), (false, 1 << 18)]);
        assert!(status.counters.iter().any(|c| c.name == "drops/no_peer" && c.value == 3));
    }

    #[test]
    fn a_universe_of_ipv6_does_not_overflow() {
        let mut now = example::snapshot();
        now.ranges[0].prefix = "fd00::/8".parse().unwrap();
        assert_eq!(status(&now).addresses_owned, u64::MAX);
        assert_eq!(addresses_in("::/0".parse().unwrap()), u128::MAX);
    }
}
