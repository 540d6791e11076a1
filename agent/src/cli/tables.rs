//! What the commands show, as text for people.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    units::{bytes, count, counted, duration},
    view::{Explanation, Ipam, Peer, Peers, Pod, Pods, Policies, Range, Report, Status},
};
use crate::{admin::addresses_in, types::Prefix};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use std::{collections::BTreeMap, fmt::Write, time::Duration};

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    pub on: bool,
}

pub(super) fn status(status: &Status, paint: Paint) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        // Further lines of a value stand below its first.
        let value = value.replace('\n', &format!("\n{:12}", ""));
        writeln!(text, "{label:<12}{value}").expect("writing to a string does not fail");
    };
    let bullets = |head: String, items: &[String]| {
        items
            .iter()
            .fold(head, |text, item| format!("{text}{}- {item}", if text.is_empty() { "" } else { "\n" }))
    };
    let ready = if status.ready { paint.green("yes") } else { paint.red("no") };
    line("node", &status.name);
    line("ready", &bullets(ready, &status.not_ready));
    if !status.warnings.is_empty() {
        line("warnings", &paint.yellow(&bullets(String::new(), &status.warnings)));
    }
    line("peers", &format!("{} known, {} linked", count(status.peers), count(status.links)));
    line("pods", &format!("{}, MTU {}", count(status.pods), status.mtu));
    let (owned, free) = (count(status.addresses_owned), count(status.addresses_free));
    line("addresses", &format!("{owned} owned, {free} free, of {}", status.universe));
    line("bridge", status.bridge_address.as_deref().unwrap_or("no address yet"));
    line("endpoints", &status.endpoints.join(", "));
    line("encryption", &status.encryption);
    let counter = |name: &str| status.counters.get(name).copied().unwrap_or_default();
    let traffic = |way: &str| {
        let (packets, size) = (counter(&format!("packets_{way}")), counter(&format!("bytes_{way}")));
        format!("{}, {}", counted(packets, "packet"), bytes(size))
    };
    line("sent", &traffic("sent"));
    line("received", &traffic("received"));
    let drops: Vec<_> = group(&status.counters, "drops/").filter(|(_, n)| *n > 0).collect();
    let shown: Vec<_> = drops.iter().map(|(reason, n)| format!("{} {reason}", count(*n))).collect();
    line("dropped", &if shown.is_empty() { "none".into() } else { shown.join(", ") });
    let uptime = duration(Duration::from_secs(status.uptime_seconds));
    line("software", &format!("{}, up {uptime}", status.software));
    text
}

pub(super) fn peers(Peers { peers }: &Peers) -> String {
    peer_table(peers)
}

pub(super) fn ipam(ipam: &Ipam) -> String {
    let universe: Option<Prefix> = ipam.universe.parse().ok();
    let all = universe.map(addresses_in);
    let mut text = match all {
        Some(all) => format!("universe {}, {} addresses\n", ipam.universe, count(all)),
        None => format!("universe {}\n", ipam.universe),
    };
    if let Some(waiting) = &ipam.waiting_for {
        writeln!(text, "this node owns no addresses yet: waiting for {waiting}")
            .expect("writing to a string does not fail");
    }
    if ipam.ranges.is_empty() {
        return text;
    }
    let header = ["PREFIX", "OWNER", "ADDRESSES", "SHARE", "ALLOCATED", "RESTING"];
    let rows = ipam.ranges.iter().map(|range| {
        let Range { prefix, owner, mine, allocated, resting } = range;
        let addresses = prefix.parse().ok().map(addresses_in);
        let share =
            addresses.zip(all).map(|(part, all)| format!("{:.1} %", part as f64 * 100.0 / all as f64));
        [
            prefix.clone(),
            named(owner, *mine),
            addresses.map(count).unwrap_or_default(),
            share.unwrap_or_default(),
            allocated.map(count).unwrap_or_default(),
            resting.map(count).unwrap_or_default(),
        ]
    });
    text + "\n" + &table(header, &[2, 3, 4, 5], rows)
}

pub(super) fn pods(Pods { pods }: &Pods) -> String {
    pod_table(pods)
}

pub(super) fn policies(Policies { policies }: &Policies) -> String {
    if policies.is_empty() {
        return "no network policies\n".into();
    }
    let header = ["POLICY", "ISOLATES", "ALLOWED", "DENIED", "PODS HERE"];
    let rows = policies.iter().map(|policy| {
        let directions = [(policy.ingress, "ingress"), (policy.egress, "egress")];
        let directions: Vec<_> = directions.iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect();
        [
            policy.name.clone(),
            directions.join(", "),
            count(policy.allowed),
            count(policy.denied),
            policy.pods.join(", "),
        ]
    });
    table(header, &[2, 3], rows)
}

pub(super) fn explanation(said: &Explanation) -> String {
    let verdict = if said.allowed { "allowed" } else { "denied" };
    let mut text = format!("{} to {}: {verdict}\n", said.source, said.destination);
    text += &format!("  egress   {}\n  ingress  {}\n", said.egress, said.ingress);
    text + &said.caveats.iter().map(|caveat| format!("  but {caveat}\n")).collect::<String>()
}

pub(super) fn report(report: &Report, paint: Paint) -> String {
    let Report { software, kernel, status: state, peers, ipam: ring, pods } = report;
    let counters = state.counters.iter().map(|(name, n)| [name.clone(), count(*n)]);
    let sections = [
        ("status", status(state, paint)),
        ("peers", peer_table(peers)),
        ("ipam", ipam(ring)),
        ("pods", pod_table(pods)),
        ("counters", table(["COUNTER", "VALUE"], &[1], counters)),
    ];
    let head = format!(
        "{:<12}{software}\n{:<12}{kernel}\n{:<12}{}\n",
        "command", "kernel", "incarnation", state.incarnation
    );
    sections.iter().fold(head, |text, (title, section)| format!("{text}\n== {title} ==\n{section}"))
}

impl Paint {
    fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    /// `code` is of SGR, ECMA-48 §8.3.117.
    fn with(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

fn peer_table(peers: &[Peer]) -> String {
    let header = [
        "NAME",
        "PATH",
        "RTT",
        "LOSS",
        "MTU",
        "LINK",
        "ADDRESSES",
        "SENT",
        "RECEIVED",
        "ENDPOINTS",
        "SOFTWARE",
    ];
    let rows = peers.iter().map(|peer| {
        let link = match (peer.me, peer.linked) {
            (true, _) => "",
            (false, true) => "up",
            (false, false) => "none",
        };
        [
            named(&peer.name, peer.me),
            match (&peer.via, &peer.why) {
                (Some(via), _) => format!("{} via {via}", peer.path),
                (_, Some(why)) => format!("{}: {why}", peer.path),
                (None, None) => peer.path.clone(),
            },
            peer.rtt_us.map(|micros| format!("{:.1} ms", f64::from(micros) / 1e3)).unwrap_or_default(),
            peer.loss.map(|loss| format!("{:.0} %", loss * 100.0)).unwrap_or_default(),
            peer.mtu.to_string(),
            link.into(),
            count(peer.addresses),
            if peer.me { String::new() } else { bytes(peer.bytes_sent) },
            if peer.me { String::new() } else { bytes(peer.bytes_received) },
            peer.endpoints.join(", "),
            peer.software.clone(),
        ]
    });
    table(header, &[2, 3, 4, 6, 7, 8], rows)
}

fn pod_table(pods: &[Pod]) -> String {
    if pods.is_empty() {
        return "no pods on this node\n".into();
    }
    let header = ["NAMESPACE", "NAME", "ADDRESS", "STATE", "INTERFACE", "CONTAINER"];
    let dash = |text: &str| if text.is_empty() { "-".into() } else { text.into() };
    let rows = pods.iter().map(|pod| {
        let container: String = pod.container_id.chars().take(SHORT_ID).collect();
        [
            dash(&pod.namespace),
            dash(&pod.name),
            pod.addresses.join(", "),
            pod.state.clone(),
            pod.host_interface.clone(),
            format!("{container}/{}", pod.ifname),
        ]
    });
    table(header, &[], rows)
}

fn named(name: &str, me: bool) -> String {
    if me { format!("{name} (this node)") } else { name.into() }
}

fn group<'a>(counters: &'a BTreeMap<String, u64>, prefix: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
    counters.iter().filter_map(move |(name, n)| Some((name.strip_prefix(prefix)?, *n)))
}

/// Columns without lines, `right` of them aligned to the right: easy to read, easy to cut.
fn table<const N: usize>(
    header: [&str; N],
    right: &[usize],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.to_vec()).add_rows(rows.map(Vec::from));
    for (n, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&n) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt() + "\n"
}

/// Characters of a container id that tell it from the others, as container tools show it.
const SHORT_ID: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals() {
        assert_eq!(Paint { on: true }.red("no"), "\x1b[31mno\x1b[0m");
        assert_eq!(Paint { on: false }.red("no"), "no");
    }
}
