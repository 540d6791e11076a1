//! The ways from pod to pod that are compared, each between two nodes of its own, so that one overlay's firewall tables
//! and sysctls don't slow the others.
//!
//! ```text
//!   ┌ pod ─────────┐   ┌ node ───────────────────────┐  wire  ┌ node ────────────────────────┐   ┌ pod ─────────┐
//!   │ 10.201.1.2 eth0 ── bridge ── overlay ── cable ═══════════ cable ── overlay ── bridge ── eth0  10.201.2.2 │
//!   └──────────────┘   └──────────── 203.0.113.1 ────┘        └──── 203.0.113.2 ─────────────┘   └──────────────┘
//! ```
//!
//! Only the overlay differs; `veth` is the cable alone, between the pods. Weft's agents make bridge and veths themselves.
mod daemon;
mod fastd;
mod ground;
mod nebula;
mod programs;
mod tinc;
mod vxlan;
mod weft;
mod wireguard;

use std::{net::IpAddr, sync::Arc};

use anyhow::Context;

pub use programs::Programs;

use self::{
    daemon::Daemon,
    ground::{Ground, Side},
};
use super::{generator::Way, wires::Wire};
use crate::{Lab, namespace::Netns, node::Node, pod::Pod, process::Process};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// A cable from pod to pod: what the machine can do
    Veth,
    /// Nodes that route, no overlay
    Routed,
    /// The kernel's VXLAN, as flannel sets it up
    Vxlan,
    /// Weft, clear text
    WeftClear,
    /// Weft as it is by default: sealed
    WeftSealed,
    WireguardGo,
    Boringtun,
    Nebula,
    Fastd,
    Tinc,
}

impl Path {
    /// As on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Routed => "routed",
            Self::Vxlan => "vxlan",
            Self::WeftClear => "weft-clear",
            Self::WeftSealed => "weft-sealed",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun",
            Self::Nebula => "nebula",
            Self::Fastd => "fastd",
            Self::Tinc => "tinc",
        }
    }

    pub fn is_weft(self) -> bool {
        matches!(self, Self::WeftClear | Self::WeftSealed)
    }

    /// Programs of others that it takes.
    pub fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Veth | Self::Routed | Self::Vxlan | Self::WeftClear | Self::WeftSealed => &[],
            Self::WireguardGo => &["wireguard-go"],
            Self::Boringtun => &["boringtun-cli"],
            Self::Nebula => &["nebula", "nebula-cert"],
            Self::Fastd => &["fastd"],
            Self::Tinc => &["tincd"],
        }
    }

    /// Whether the pods' packets cross the cable inside the nodes' UDP.
    pub fn encapsulates(self) -> bool {
        !matches!(self, Self::Veth | Self::Routed)
    }
}

/// One path in place: two nodes with a pod each.
pub struct Site {
    pub path: Path,
    pub wire: Wire,
    ends: [End; 2],
    daemons: Vec<Daemon>,
}

struct End {
    node: Arc<Node>,
    pod: Arc<Pod>,
    address: IpAddr,
}

impl Site {
    /// Builds the path between two of the lab's nodes, each with an unattached pod.
    pub fn build(
        lab: &Lab,
        nodes: [Arc<Node>; 2],
        path: Path,
        wire: Wire,
        programs: &Programs,
        agent_flags: &[String],
    ) -> anyhow::Result<Self> {
        let pods =
            [lab.pod(&format!("{}/p1", nodes[0].name()))?, lab.pod(&format!("{}/p1", nodes[1].name()))?];
        let mut site =
            Self { path, wire, ends: Side::BOTH.map(|side| side.end(&nodes, &pods)), daemons: Vec::new() };
        site.set_up(lab, programs, agent_flags)
            .with_context(|| format!("set up {} on wire {wire}", path.name()))?;
        Ok(site)
    }

    /// From the first node's pod to the second's.
    pub fn way(&self) -> Way<'_> {
        let [from, to] = &self.ends;
        Way { from: from.pod.netns(), to: to.pod.netns(), address: to.address }
    }

    /// The near end of the cable: where it is, and what addresses the packets there must have.
    pub fn cable(&self) -> (&Netns, [IpAddr; 2]) {
        let [near, far] = &self.ends;
        match self.path {
            Path::Veth => (near.pod.netns(), [near.address, far.address]),
            Path::Routed => (near.node.netns(), [near.address, far.address]),
            _ => (near.node.netns(), Side::BOTH.map(|side| side.underlay().into())),
        }
    }

    /// The processes that carry the packets; none where the kernel does.
    pub fn processes(&self) -> Vec<Process> {
        let agents = self.ends.iter().filter_map(|end| end.node.agent_process());
        self.daemons.iter().map(Daemon::process).chain(agents).collect()
    }

    /// The end of what the daemons have logged, for messages.
    pub fn last_words(&self) -> String {
        let agents = self.ends.iter().map(|end| end.node.log_tail());
        self.daemons.iter().map(Daemon::log_tail).chain(agents).filter(|log| !log.is_empty()).collect()
    }

    fn set_up(&mut self, lab: &Lab, programs: &Programs, agent_flags: &[String]) -> anyhow::Result<()> {
        let [one, other] = &self.ends;
        let (nodes, pods) = ([&*one.node, &*other.node], [&*one.pod, &*other.pod]);
        let ground = Ground { lab, wire: self.wire, nodes, pods, programs };
        match self.path {
            Path::Veth => ground.join_pods()?,
            Path::Routed => ground.route()?,
            Path::Vxlan => vxlan::set_up(&ground)?,
            Path::WeftClear | Path::WeftSealed => weft::set_up(&ground, self.path, agent_flags)?,
            Path::WireguardGo => self.daemons = wireguard::set_up_wireguard_go(&ground)?,
            Path::Boringtun => self.daemons = wireguard::set_up_boringtun(&ground)?,
            Path::Nebula => self.daemons = nebula::set_up(&ground)?,
            Path::Fastd => self.daemons = fastd::set_up(&ground)?,
            Path::Tinc => self.daemons = tinc::set_up(&ground)?,
        }
        if self.path.is_weft() {
            for end in &mut self.ends {
                end.address = end.pod.address()?;
            }
        }
        Ok(())
    }
}

impl Side {
    fn end(self, nodes: &[Arc<Node>; 2], pods: &[Arc<Pod>; 2]) -> End {
        let at = self.index();
        End { node: Arc::clone(&nodes[at]), pod: Arc::clone(&pods[at]), address: self.pod().into() }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn a_path_has_one_name_everywhere() {
        for path in Path::value_variants() {
            assert_eq!(path.to_possible_value().unwrap().get_name(), path.name());
            assert_eq!(serde_json::to_value(path).unwrap(), path.name());
        }
    }
}
