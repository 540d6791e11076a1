//! Faults of the underlay: what a cable, a switch or a router does, unseen by the nodes.
use std::{
    io::Write,
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, ensure};

use crate::{
    bench::ethtool,
    linux,
    namespace::Netns,
    node::Node,
    tools,
    underlay::{UPLINK, Underlay},
};

/// Sets the MTU of a node's cable, at both ends, in bytes.
pub fn underlay_mtu(underlay: &Underlay, node: &Node, mtu: u32) -> anyhow::Result<()> {
    underlay.netns.links(async |links| links.mtu(node.name(), mtu).await)?;
    node.netns().links(async |links| links.mtu(UPLINK, mtu).await)
}

/// Gives a node another address on the underlay, as a DHCP server might; its agent follows unless `--advertise` pins it.
pub fn renumber(underlay: &Underlay, node: &Node, number: usize) -> anyhow::Result<()> {
    node.set_address(underlay.renumber(node.netns(), node.address(), number)?);
    Ok(())
}

/// Pulls a node's cable, or plugs it in again.
pub fn cable(underlay: &Underlay, node: &Node, plugged: bool) -> anyhow::Result<()> {
    underlay.netns.links(async |links| match plugged {
        true => links.up(node.name()).await,
        false => links.down(node.name()).await,
    })
}

/// Takes segmentation from a node's interface, or gives it back: without it nothing above the MTU leaves the node.
pub fn segmentation(node: &Node, on: bool) -> anyhow::Result<()> {
    let wanted = |name: &str| (name.starts_with("tx-") && name.ends_with("-segmentation")).then_some(on);
    let set = || ethtool::set(UPLINK, wanted).context("switch segmentation");
    node.netns().run(set).with_context(|| format!("of {UPLINK} on {}", node.name()))
}

/// Rules of the switch between the nodes; they hold until this is dropped.
pub struct Fault<'a> {
    underlay: &'a Underlay,
    table: String,
}

impl<'a> Fault<'a> {
    /// No packet passes between nodes of the two sides, in either direction.
    pub fn partition(
        underlay: &'a Underlay,
        left: &[&Arc<Node>],
        right: &[&Arc<Node>],
    ) -> anyhow::Result<Self> {
        let (left, right) = (ports(left), ports(right));
        let rules = format!(
            "iifname {{ {left} }} oifname {{ {right} }} drop; iifname {{ {right} }} oifname {{ {left} }} drop;"
        );
        Self::apply(underlay, &rules)
    }

    /// No packet passes from one node to another; those of the other way do.
    pub fn one_way(underlay: &'a Underlay, from: &Node, to: &Node) -> anyhow::Result<Self> {
        let (from, to) = (from.name(), to.name());
        Self::apply(underlay, &format!("iifname \"{from}\" oifname \"{to}\" drop;"))
    }

    /// Nothing passes between the addresses that all nodes have; those on a second network are not concerned.
    pub fn first_network(underlay: &'a Underlay) -> anyhow::Result<Self> {
        Self::apply(underlay, "ip saddr 192.0.2.0/24 drop; ip daddr 192.0.2.0/24 drop;")
    }

    /// That many percent of what the node sends to other nodes is lost, and of what it is sent.
    pub fn loss(underlay: &'a Underlay, node: &Node, percent: u8) -> anyhow::Result<Self> {
        ensure!((1..=100).contains(&percent), "{percent} % is not between 1 and 100");
        let name = node.name();
        let lose = format!("numgen random mod 100 <= {} drop;", percent - 1);
        Self::apply(underlay, &format!("iifname \"{name}\" {lose} oifname \"{name}\" {lose}"))
    }

    /// No data passes between two nodes, in either direction: only their control links stand.
    pub fn no_data(underlay: &'a Underlay, one: &Node, other: &Node) -> anyhow::Result<Self> {
        let (one, other) = (one.name(), other.name());
        let drop =
            |from, to| format!("iifname \"{from}\" oifname \"{to}\" meta l4proto udp udp dport 6783 drop;");
        Self::apply(underlay, &[drop(one, other), drop(other, one)].concat())
    }

    /// What is larger than that on the wire is lost between two nodes without a word, in either direction.
    pub fn narrow(underlay: &'a Underlay, one: &Node, other: &Node, mtu: u16) -> anyhow::Result<Self> {
        let (one, other) = (one.name(), other.name());
        let drop = |from, to| format!("iifname \"{from}\" oifname \"{to}\" ip length > {mtu} drop;");
        Self::apply(underlay, &[drop(one, other), drop(other, one)].concat())
    }

    /// Nothing that the node sends to others' data ports arrives; a tap on its cable hears it.
    pub fn mute(underlay: &'a Underlay, node: &Node) -> anyhow::Result<Self> {
        Self::apply(underlay, &format!("iifname \"{}\" ip protocol udp udp dport 6783 drop;", node.name()))
    }

    fn apply(underlay: &'a Underlay, rules: &str) -> anyhow::Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let table = format!("fault{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let text = format!(
            "table bridge {table} {{\nchain forward {{\ntype filter hook forward priority 0\n{rules}\n}}\n}}\n"
        );
        nft(&underlay.netns, &text)?;
        Ok(Self { underlay, table })
    }
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        if let Err(error) = nft(&self.underlay.netns, &format!("delete table bridge {}", self.table)) {
            eprintln!("a fault stays: {error:#}");
        }
    }
}

fn ports(nodes: &[&Arc<Node>]) -> String {
    let names: Vec<_> = nodes.iter().map(|node| format!("\"{}\"", node.name())).collect();
    names.join(", ")
}

/// Loads rules in a network namespace, all or none.
pub fn nft(netns: &Netns, rules: &str) -> anyhow::Result<()> {
    let nft = tools::find("nft").context("there is no nft (Debian and Ubuntu: apt-get install nftables)")?;
    let mut command = Command::new(nft);
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    linux::die_with_spawner(&mut command);
    netns.run(|| {
        let mut child = command.spawn().context("start nft")?;
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        stdin.write_all(rules.as_bytes()).context("hand nft its rules")?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft refused `{rules}`: {}", said.trim());
        Ok(())
    })
}
