//! The cable between two nodes, laid in one of two ways.
//!
//! * `offload`: a veth as it is. Super-packets of 64 KiB cross it whole, which flatters everything that passes them whole.
//! * `plain`: nothing above the MTU crosses it, as on a network card: segmentation happens before, reassembly (GRO) after.
//!   A queue in front of it, so that a full ring holds the sender back instead of losing packets.
use std::fmt;

use anyhow::{Context, ensure};
use futures_util::StreamExt;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage},
    },
};

use super::ethtool;
use crate::{links::Links, namespace::Netns};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    Offload,
    Plain,
}

impl Wire {
    pub const ALL: [Self; 2] = [Self::Offload, Self::Plain];

    /// Joins the two namespaces by a cable, whose ends are both called [`CABLE`].
    pub fn lay(self, ends: [&Netns; 2]) -> anyhow::Result<()> {
        let [one, other] = ends;
        one.links(async |links| links.veth(CABLE, CABLE, other).await)?;
        if self == Self::Plain {
            ends.iter().try_for_each(|end| plain(end, CABLE))?;
        }
        Ok(())
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offload => "offload",
            Self::Plain => "plain",
        })
    }
}

/// Has the interface send and take nothing above its MTU.
pub(crate) fn plain(end: &Netns, interface: &str) -> anyhow::Result<()> {
    let set = || {
        ethtool::set(interface, wanted).with_context(|| format!("switch offloads of {interface}"))?;
        for (name, on) in ethtool::get(interface)? {
            ensure!(
                wanted(&name).is_none_or(|wanted| wanted == on),
                "{name} of {interface} can't be switched"
            );
        }
        Ok(())
    };
    end.run(set).with_context(|| format!("in network namespace {}", end.name()))?;
    end.links(async |links| queue(links, interface).await)
}

/// Whether a feature has to be on or off on the plain wire; none where it does not matter.
fn wanted(feature: &str) -> Option<bool> {
    match feature {
        "rx-gro" => Some(true),
        "tx-gso-list" => Some(false),
        _ if feature.starts_with("tx-") && feature.ends_with("-segmentation") => Some(false),
        _ => None,
    }
}

/// Puts a `pfifo` in front of the interface, which has none of its own.
async fn queue(links: &Links, name: &str) -> anyhow::Result<()> {
    let mut message = TcMessage::with_index(links.index(name).await?.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message.attributes.push(TcAttribute::Kind("pfifo".into()));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let mut answers = links.handle().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload {
            ensure!(error.code.is_none(), "put a pfifo before {name}: {}", error.to_io());
        }
    }
    Ok(())
}

/// What the cable is called at both ends.
pub const CABLE: &str = "cable";
/// Bytes of the largest packet that the cable carries.
pub const CABLE_MTU: u32 = 1500;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plain_wire_neither_takes_super_packets_nor_loses_its_checksum_offload() {
        for off in
            ["tx-tcp-segmentation", "tx-generic-segmentation", "tx-udp_tnl-csum-segmentation", "tx-gso-list"]
        {
            assert_eq!(wanted(off), Some(false), "{off}");
        }
        assert_eq!(wanted("rx-gro"), Some(true));
        for either in ["tx-checksum-ip-generic", "tx-gso-robust", "rx-gro-list", "rx-vlan-hw-parse"] {
            assert_eq!(wanted(either), None, "{either}");
        }
    }
}
