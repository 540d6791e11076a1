//! What all paths of two nodes have in common: addresses, pods behind bridges, routes.
use std::{net::Ipv4Addr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, ensure};
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::RouteMessageBuilder;

use super::{daemon::Daemon, programs::Programs};
use crate::{
    Lab,
    bench::wires::{CABLE, CABLE_MTU, Wire},
    links::Links,
    node::Node,
    pod::Pod,
    wait,
};

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Near = 1,
    Far = 2,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Near, Self::Far];

    pub fn index(self) -> usize {
        self as usize - 1
    }

    pub fn other(self) -> Self {
        match self {
            Self::Near => Self::Far,
            Self::Far => Self::Near,
        }
    }

    /// The node's address on the cable (RFC 5737, TEST-NET-3).
    pub fn underlay(self) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 113, self as u8)
    }

    /// The node's own address in overlays that give it one.
    pub fn overlay(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 202, 0, self as u8)
    }

    /// The addresses of the node's pods.
    pub fn pods(self) -> Ipv4Net {
        Ipv4Net::new_assert(Ipv4Addr::new(10, 201, self as u8, 0), 24)
    }

    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 201, self as u8, 1)
    }

    pub fn pod(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 201, self as u8, 2)
    }
}

/// Where an overlay is set up.
pub struct Ground<'a> {
    pub lab: &'a Lab,
    pub wire: Wire,
    pub nodes: [&'a Node; 2],
    pub pods: [&'a Pod; 2],
    pub programs: &'a Programs,
}

impl Ground<'_> {
    pub fn node(&self, side: Side) -> &Node {
        self.nodes[side.index()]
    }

    /// The cable alone, with the pods at its ends.
    pub fn join_pods(&self) -> anyhow::Result<()> {
        let ends = self.pods.map(Pod::netns);
        self.wire.lay(ends)?;
        for (side, end) in Side::BOTH.into_iter().zip(ends) {
            end.links(async |links| links.address(CABLE, on(side.pod(), 16)).await)?;
        }
        Ok(())
    }

    /// The cable between the nodes, which have their addresses on it.
    pub fn join_nodes(&self) -> anyhow::Result<()> {
        let ends = self.nodes.map(Node::netns);
        self.wire.lay(ends)?;
        for (side, end) in Side::BOTH.into_iter().zip(ends) {
            end.links(async |links| links.address(CABLE, on(side.underlay(), 24)).await)?;
        }
        Ok(())
    }

    /// The cable between the nodes, and on each a pod of that MTU behind a bridge.
    pub fn plug_pods(&self, mtu: u32) -> anyhow::Result<()> {
        self.join_nodes()?;
        for side in Side::BOTH {
            let (node, pod) = (self.node(side).netns(), self.pods[side.index()].netns());
            node.links(async |links| {
                links.bridge(BRIDGE).await?;
                links.up(BRIDGE).await?;
                links.address(BRIDGE, on(side.gateway(), 24)).await?;
                links.veth("pod", "eth0", pod).await?;
                links.plug("pod", BRIDGE).await
            })?;
            node.sysctl("net/ipv4/ip_forward", "1")?;
            pod.links(async |links| {
                links.mtu("eth0", mtu).await?;
                links.address("eth0", on(side.pod(), 24)).await?;
                links.default_route(side.gateway().into()).await
            })?;
        }
        Ok(())
    }

    /// Nodes that route to each other's pods.
    pub fn route(&self) -> anyhow::Result<()> {
        self.plug_pods(CABLE_MTU)?;
        Side::BOTH.into_iter().try_for_each(|side| {
            let (pods, via) = (side.other().pods(), side.other().underlay());
            self.node(side).netns().links(async |links| links.route(pods.into(), via.into()).await)
        })
    }

    /// A directory for the node's daemon.
    pub fn directory(&self, side: Side) -> PathBuf {
        self.lab.claim().state_dir().join(self.node(side).name())
    }

    /// A command line of somebody else's program; nothing of it is run yet.
    pub fn command(&self, program: &str) -> anyhow::Result<Command> {
        self.programs.command(program)
    }

    /// Runs a program to its end; returns what it printed.
    pub fn run(&self, mut command: Command) -> anyhow::Result<String> {
        let what = format!("{command:?}");
        let output = command.stdin(std::process::Stdio::null()).output().with_context(|| what.clone())?;
        ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub fn start(&self, side: Side, name: &str, command: Command) -> anyhow::Result<Daemon> {
        let log = self.directory(side).join(format!("{name}.log"));
        Daemon::start(self.lab, self.node(side), name, command, log)
    }

    /// Waits for the daemon's TUN device and leads the other node's pods through it.
    pub fn route_over_tun(&self, side: Side, device: &str, mtu: u32) -> anyhow::Result<()> {
        let netns = self.node(side).netns();
        let exists = || netns.links(async |links| links.index(device).await);
        wait::until(&format!("{device} is there"), STARTED_WITHIN, exists)?;
        netns.links(async |links| {
            links.mtu(device, mtu).await?;
            links.up(device).await?;
            route_to_device(links, side.other().pods().into(), device).await
        })
    }
}

async fn route_to_device(links: &Links, to: IpNet, device: &str) -> anyhow::Result<()> {
    let route = RouteMessageBuilder::<std::net::IpAddr>::new()
        .destination_prefix(to.addr(), to.prefix_len())?
        .output_interface(links.index(device).await?)
        .build();
    let add = links.handle().route().add(route).replace();
    add.execute().await.with_context(|| format!("add route {to} dev {device}"))
}

fn on(address: Ipv4Addr, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(address, length))
}

const BRIDGE: &str = "pods";
/// From a daemon's start until its device is there.
pub const STARTED_WITHIN: Duration = Duration::from_secs(10);
