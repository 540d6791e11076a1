//! `/metrics`: the snapshot as OpenMetrics, and histograms that are filled as things happen.
//!
//! Names follow Prometheus' conventions: base units, `_total` on counters (the encoder adds it).
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::snapshot::{Observer, PeerView, Snapshot, Traffic};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, MetricEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Registry,
};
use std::fmt;

/// Everything that a scrape shows.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    pub fn new(observer: Observer) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Watched(observer)));
        Self { registry }
    }

    /// For histograms and counters of others.
    pub fn registry(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// The text of a scrape, of the type [`Metrics::CONTENT_TYPE`].
    pub fn render(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing to a string does not fail");
        text
    }

    pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
}

struct Watched(Observer);

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}

impl Collector for Watched {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = self.0.snapshot();
        let mut page = Page(encoder);
        node(&mut page, &now)?;
        addresses(&mut page, &now)?;
        data(&mut page, &now)?;
        peers(&mut page, &now)
    }
}

fn node(page: &mut Page<'_>, now: &Snapshot) -> fmt::Result {
    let (universe, encryption) = (now.universe.to_string(), now.encryption.to_string());
    page.info(
        "weft",
        "This agent",
        &[
            ("name", now.name.as_str()),
            ("software", &now.software),
            ("universe", &universe),
            ("encryption", &encryption),
        ],
    )?;
    page.gauge("weft_ready", "1 if a pod could be attached now", u64::from(now.is_ready()))?;
    page.gauge("weft_warnings", "Conditions that a person should look at", now.warnings.len() as u64)?;
    page.gauge("weft_uptime_seconds", "Time since this agent started", now.uptime.as_secs_f64())?;
    page.gauge("weft_peers", "Other agents known", now.others().count() as u64)?;
    page.gauge("weft_links", "Control links that are up", now.links() as u64)?;
    page.gauge("weft_pod_mtu_bytes", "MTU of the pods", u64::from(now.mtu))?;
    let active = now.pods.iter().filter(|pod| pod.active).count() as u64;
    let reserved = now.pods.len() as u64 - active;
    page.gauges(
        "weft_pods",
        "Pods of this node",
        [([("state", "active")], active), ([("state", "reserved")], reserved)],
    )?;
    page.counter(
        "weft_links_repairs",
        "Times that links, routes or rules were put right after others changed them",
        now.repairs,
    )?;
    page.counters("weft_gossip_events", "Events of the gossip", labelled("event", &now.gossip))
}

fn addresses(page: &mut Page<'_>, now: &Snapshot) -> fmt::Result {
    let (owned, allocated, resting) = now.addresses();
    let (allocated, resting, free) = (u128::from(allocated), u128::from(resting), now.addresses_free);
    let unusable = owned.saturating_sub(allocated + resting + free);
    let states = [("free", free), ("allocated", allocated), ("resting", resting), ("unusable", unusable)];
    page.gauges(
        "weft_ipam_addresses",
        "Addresses that this node owns",
        states.map(|(state, n)| ([("state", state)], n as f64)),
    )?;
    let universe = super::addresses_in(now.universe.prefix()) as f64;
    let shares = now.shares();
    let shares = shares.iter().map(|(owner, n)| ([("peer", owner.as_str())], *n as f64 / universe));
    page.gauges("weft_ipam_range_share", "Part of the universe that a peer owns, 0 to 1", shares)
}

fn data(page: &mut Page<'_>, now: &Snapshot) -> fmt::Result {
    let Traffic { packets_sent, bytes_sent, packets_received, bytes_received } = now.traffic;
    let ways = |sent, received| [([("direction", "sent")], sent), ([("direction", "received")], received)];
    page.counters(
        "weft_packets",
        "Pods' packets to and from other nodes",
        ways(packets_sent, packets_received),
    )?;
    page.counters("weft_bytes", "Bytes of these packets", ways(bytes_sent, bytes_received))?;
    let (packets, bytes) = now.relayed;
    page.counter(
        "weft_relayed_packets",
        "Packets passed on between nodes that do not reach each other",
        packets,
    )?;
    page.counter("weft_relayed_bytes", "Bytes of these packets", bytes)?;
    page.counters("weft_drops", "Packets dropped", labelled("reason", &now.drops))
}

fn peers(page: &mut Page<'_>, now: &Snapshot) -> fmt::Result {
    fn by<T>(now: &Snapshot, value: impl Fn(&PeerView) -> T) -> impl Iterator<Item = ([(&str, &str); 1], T)> {
        now.others().map(move |peer| ([("peer", peer.name.as_str())], value(peer)))
    }
    fn ways<'a>(
        now: &'a Snapshot,
        value: impl Fn(&Traffic) -> [u64; 2] + 'a,
    ) -> impl Iterator<Item = ([(&'a str, &'a str); 2], u64)> {
        now.others().flat_map(move |peer| {
            let [sent, received] = value(&peer.traffic);
            [("sent", sent), ("received", received)]
                .map(|(way, n)| ([("peer", peer.name.as_str()), ("direction", way)], n))
        })
    }
    page.gauges(
        "weft_peer_linked",
        "1 if a control link to the peer is up",
        by(now, |p| u64::from(p.linked)),
    )?;
    let path = now.others().map(|p| ([("peer", p.name.as_str()), ("path", p.path.kind())], 1u64));
    page.gauges("weft_peer_path", "1 for the way on which data reaches the peer now", path)?;
    let measured = now.others().filter_map(|p| Some(([("peer", p.name.as_str())], p.rtt?.as_secs_f64())));
    page.gauges("weft_peer_path_rtt_seconds", "Mean round trip of probes", measured)?;
    let measured = now.others().filter_map(|p| Some(([("peer", p.name.as_str())], f64::from(p.loss?))));
    page.gauges("weft_peer_path_loss_ratio", "Part of the latest probes that were lost, 0 to 1", measured)?;
    page.gauges("weft_peer_mtu_bytes", "MTU of the path to the peer", by(now, |p| u64::from(p.mtu)))?;
    page.counters(
        "weft_peer_packets",
        "Pods' packets to and from the peer",
        ways(now, |t| [t.packets_sent, t.packets_received]),
    )?;
    page.counters(
        "weft_peer_bytes",
        "Bytes of these packets",
        ways(now, |t| [t.bytes_sent, t.bytes_received]),
    )
}

fn labelled<'a>(
    label: &'a str,
    counters: &'a super::Counters,
) -> impl Iterator<Item = ([(&'a str, &'a str); 1], u64)> {
    counters.iter().map(move |(name, value)| ([(label, name.as_str())], *value))
}

/// A scrape that is being written.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str)]) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(&labels)
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn gauges<'l, const N: usize, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'l str, &'l str); N], V)>,
    ) -> fmt::Result {
        let encode = |mut encoder: MetricEncoder<'_>, value: &V| encoder.encode_gauge(value);
        self.family(name, help, MetricType::Gauge, values, encode)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.0
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, u64, u64>(&value, None)
    }

    fn counters<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'l str, &'l str); N], u64)>,
    ) -> fmt::Result {
        let encode = |mut encoder: MetricEncoder<'_>, value: &u64| {
            encoder.encode_counter::<NoLabelSet, u64, u64>(value, None)
        };
        self.family(name, help, MetricType::Counter, values, encode)
    }

    fn family<'l, const N: usize, V>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        values: impl IntoIterator<Item = ([(&'l str, &'l str); N], V)>,
        encode: impl Fn(MetricEncoder<'_>, &V) -> fmt::Result,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in values {
            encode(encoder.encode_family(&labels)?, &value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::snapshot::example;
    use std::sync::Arc;

    #[test]
    fn a_scrape_shows_the_snapshot() {
        let metrics = Metrics::new(Arc::new(example::snapshot));
        insta::assert_snapshot!(metrics.render(), @r#"
# HELP weft This agent
# TYPE weft info
weft_info{name="node-1",software="weft 0.1.0",universe="10.32.0.0/12",encryption="off"} 1
# HELP weft_ready 1 if a pod could be attached now
# TYPE weft_ready gauge
weft_ready 1
# HELP weft_warnings Conditions that a person should look at
# TYPE weft_warnings gauge
weft_warnings 0
# HELP weft_uptime_seconds Time since this agent started
# TYPE weft_uptime_seconds gauge
weft_uptime_seconds 10925.0
# HELP weft_peers Other agents known
# TYPE weft_peers gauge
weft_peers 2
# HELP weft_links Control links that are up
# TYPE weft_links gauge
weft_links 1
# HELP weft_pod_mtu_bytes MTU of the pods
# TYPE weft_pod_mtu_bytes gauge
weft_pod_mtu_bytes 1440
# HELP weft_pods Pods of this node
# TYPE weft_pods gauge
weft_pods{state="active"} 1
weft_pods{state="reserved"} 1
# HELP weft_links_repairs Times that links, routes or rules were put right after others changed them
# TYPE weft_links_repairs counter
weft_links_repairs_total 1
# HELP weft_gossip_events Events of the gossip
# TYPE weft_gossip_events counter
weft_gossip_events_total{event="items_received"} 40
weft_gossip_events_total{event="items_rejected"} 0
# HELP weft_ipam_addresses Addresses that this node owns
# TYPE weft_ipam_addresses gauge
weft_ipam_addresses{state="free"} 524283.0
weft_ipam_addresses{state="allocated"} 3.0
weft_ipam_addresses{state="resting"} 1.0
weft_ipam_addresses{state="unusable"} 1.0
# HELP weft_ipam_range_share Part of the universe that a peer owns, 0 to 1
# TYPE weft_ipam_range_share gauge
weft_ipam_range_share{peer="node-1"} 0.5
weft_ipam_range_share{peer="node-2"} 0.25
weft_ipam_range_share{peer="node-3"} 0.25
# HELP weft_packets Pods' packets to and from other nodes
# TYPE weft_packets counter
weft_packets_total{direction="sent"} 1200
weft_packets_total{direction="received"} 900
# HELP weft_bytes Bytes of these packets
# TYPE weft_bytes counter
weft_bytes_total{direction="sent"} 3145728
weft_bytes_total{direction="received"} 5000
# HELP weft_relayed_packets Packets passed on between nodes that do not reach each other
# TYPE weft_relayed_packets counter
weft_relayed_packets_total 7
# HELP weft_relayed_bytes Bytes of these packets
# TYPE weft_relayed_bytes counter
weft_relayed_bytes_total 9000
# HELP weft_drops Packets dropped
# TYPE weft_drops counter
weft_drops_total{reason="no_peer"} 3
weft_drops_total{reason="too_big"} 1
# HELP weft_peer_linked 1 if a control link to the peer is up
# TYPE weft_peer_linked gauge
weft_peer_linked{peer="node-2"} 1
weft_peer_linked{peer="node-3"} 0
# HELP weft_peer_path 1 for the way on which data reaches the peer now
# TYPE weft_peer_path gauge
weft_peer_path{peer="node-2",path="direct"} 1
weft_peer_path{peer="node-3",path="down"} 1
# HELP weft_peer_path_rtt_seconds Mean round trip of probes
# TYPE weft_peer_path_rtt_seconds gauge
weft_peer_path_rtt_seconds{peer="node-2"} 0.000234
# HELP weft_peer_path_loss_ratio Part of the latest probes that were lost, 0 to 1
# TYPE weft_peer_path_loss_ratio gauge
weft_peer_path_loss_ratio{peer="node-2"} 0.125
# HELP weft_peer_mtu_bytes MTU of the path to the peer
# TYPE weft_peer_mtu_bytes gauge
weft_peer_mtu_bytes{peer="node-2"} 1440
weft_peer_mtu_bytes{peer="node-3"} 1440
# HELP weft_peer_packets Pods' packets to and from the peer
# TYPE weft_peer_packets counter
weft_peer_packets_total{peer="node-2",direction="sent"} 1200
weft_peer_packets_total{peer="node-2",direction="received"} 900
weft_peer_packets_total{peer="node-3",direction="sent"} 0
weft_peer_packets_total{peer="node-3",direction="received"} 0
# HELP weft_peer_bytes Bytes of these packets
# TYPE weft_peer_bytes counter
weft_peer_bytes_total{peer="node-2",direction="sent"} 3145728
weft_peer_bytes_total{peer="node-2",direction="received"} 5000
weft_peer_bytes_total{peer="node-3",direction="sent"} 0
weft_peer_bytes_total{peer="node-3",direction="received"} 0
# EOF
"#);
    }

    #[test]
    fn a_name_cannot_break_out_of_its_label() {
        let hostile = || {
            let mut now = example::snapshot();
            now.drops = [("a\"} 1\nweft_ready 1".into(), 1)].into();
            now
        };
        let text = Metrics::new(Arc::new(hostile)).render();
        assert!(text.contains(r#"weft_drops_total{reason="a\"} 1\nweft_ready 1"} 1"#), "{text}");
    }
}
