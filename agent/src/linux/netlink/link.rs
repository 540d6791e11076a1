use super::{Mode, Netlink, NetlinkError};
use crate::types::Mac;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        BridgePortState, BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
        InfoPortKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
    },
};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A link as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub kind: LinkKind,
    pub up: bool,
    /// The other end is up too.
    pub carrier: bool,
    /// The kernel has taken note of the carrier: what is sent leaves, and is not thrown away.
    pub running: bool,
    pub mac: Option<Mac>,
    /// Bytes of an IP packet.
    pub mtu: u32,
    /// Index of the bridge that this link is a port of.
    pub master: Option<u32>,
    pub alias: Option<String>,
    /// Index of a veth's other end, in that end's namespace.
    pub peer: Option<u32>,
    /// Our id of the namespace that the other end lives in; none: it is here.
    pub peer_netns: Option<i32>,
    /// Only of a bridge.
    pub bridge: Option<BridgeOptions>,
    /// Only of a bridge's port.
    pub port: Option<PortOptions>,
    /// A bridge's port that lets frames through.
    pub forwarding: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    Veth,
    Bridge,
    Tun,
    /// Any other, also hardware.
    Other,
}

/// The bridge settings that matter to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BridgeOptions {
    pub stp: bool,
    pub multicast_snooping: bool,
    pub vlan_filtering: bool,
}

/// The settings of a bridge's port that matter to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortOptions {
    pub isolated: bool,
    pub learning: bool,
    pub hairpin: bool,
    pub unicast_flood: bool,
    pub multicast_flood: bool,
    pub broadcast_flood: bool,
}

/// Two ends of one cable: one here, the other born in the namespace behind `peer_netns`.
#[derive(Clone, Copy, Debug)]
pub struct VethPair<'a> {
    pub name: &'a str,
    pub mac: Option<Mac>,
    pub peer_name: &'a str,
    pub peer_mac: Option<Mac>,
    /// None: the peer is born here.
    pub peer_netns: Option<BorrowedFd<'a>>,
    /// Of both ends, bytes of an IP packet.
    pub mtu: u32,
    /// Segments of the largest super-packet that the peer's end sends.
    pub peer_max_segments: Option<u32>,
}

impl Netlink {
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
        self.query(RouteNetlinkMessage::GetLink(message), true, as_link, || "list the links".into()).await
    }

    /// Fails with [`NetlinkError::is_gone`] if there is none. Since Linux 6.7, looking at one link also makes a carrier
    /// that just came up count at once; else the kernel takes up to a second.
    pub async fn link_by_name(&self, name: &str) -> Result<Link, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.into())];
        self.one_link(message, || format!("look up link {name}")).await
    }

    /// Fails with [`NetlinkError::is_gone`] if there is none.
    pub async fn link_by_index(&self, index: u32) -> Result<Link, NetlinkError> {
        self.one_link(by_index(index), || format!("look up link number {index}")).await
    }

    async fn one_link(
        &self,
        message: LinkMessage,
        action: impl Fn() -> String,
    ) -> Result<Link, NetlinkError> {
        let found = self.query(RouteNetlinkMessage::GetLink(message), false, as_link, &action).await?;
        found.into_iter().next().ok_or_else(|| NetlinkError {
            action: action(),
            errno: std::io::Error::from_raw_os_error(libc::ENODEV),
        })
    }

    pub async fn create_veth(&self, pair: &VethPair<'_>) -> Result<(), NetlinkError> {
        let end = |name: &str, mac: Option<Mac>| {
            let mut message = LinkMessage::default();
            message.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::Mtu(pair.mtu)];
            message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
            message
        };
        let mut peer = end(pair.peer_name, pair.peer_mac);
        peer.attributes.extend(pair.peer_max_segments.map(LinkAttribute::GsoMaxSegs));
        peer.attributes.extend(pair.peer_netns.map(|fd| LinkAttribute::NetNsFd(fd.as_raw_fd())));
        let mut message = end(pair.name, pair.mac);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.request(RouteNetlinkMessage::NewLink(message), Mode::Create, || {
            format!("create veth {} with peer {}", pair.name, pair.peer_name)
        })
        .await
    }

    pub async fn create_bridge(
        &self,
        name: &str,
        mac: Mac,
        mtu: u32,
        options: BridgeOptions,
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            // Only an MTU that is changed later stays; else the bridge takes over the least of its ports'.
            LinkAttribute::Mtu(mtu - 1),
            LinkAttribute::Address(mac.0.to_vec()),
            bridge_info(BridgeOptions::default(), options),
        ];
        self.request(RouteNetlinkMessage::NewLink(message), Mode::Create, || format!("create bridge {name}"))
            .await?;
        self.set_mtu(self.link_by_name(name).await?.index, mtu).await
    }

    /// Also takes the other end of a veth away.
    pub async fn delete_link(&self, index: u32) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelLink(by_index(index));
        self.request(message, Mode::Existing, || format!("delete link number {index}")).await
    }

    pub async fn set_up(&self, index: u32, up: bool) -> Result<(), NetlinkError> {
        let mut message = by_index(index);
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        let state = if up { "up" } else { "down" };
        self.change_link(message, || format!("set link number {index} {state}")).await
    }

    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        self.set(index, LinkAttribute::Mtu(mtu), || format!("set MTU {mtu} of link number {index}")).await
    }

    pub async fn set_mac(&self, index: u32, mac: Mac) -> Result<(), NetlinkError> {
        let attribute = LinkAttribute::Address(mac.0.to_vec());
        self.set(index, attribute, || format!("set MAC {mac} of link number {index}")).await
    }

    /// The kernel keeps 255 bytes.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        let attribute = LinkAttribute::IfAlias(alias.into());
        self.set(index, attribute, || format!("set the alias of link number {index}")).await
    }

    pub async fn rename(&self, index: u32, name: &str) -> Result<(), NetlinkError> {
        let attribute = LinkAttribute::IfName(name.into());
        self.set(index, attribute, || format!("rename link number {index} to {name}")).await
    }

    pub async fn set_master(&self, index: u32, master: Option<u32>) -> Result<(), NetlinkError> {
        let attribute = LinkAttribute::Controller(master.unwrap_or(0));
        self.set(index, attribute, || format!("make link number {index} a port of {master:?}")).await
    }

    pub async fn set_bridge(&self, index: u32, options: BridgeOptions) -> Result<(), NetlinkError> {
        let now = self.link_by_index(index).await?.bridge.unwrap_or_default();
        let mut message = by_index(index);
        message.attributes.push(bridge_info(now, options));
        // RTM_SETLINK ignores a bridge's own settings; RTM_NEWLINK without NLM_F_CREATE takes them.
        self.request(RouteNetlinkMessage::NewLink(message), Mode::Existing, || {
            format!("set bridge number {index} to {options:?}")
        })
        .await
    }

    /// The link must be a bridge's port already.
    pub async fn set_port(&self, index: u32, options: PortOptions) -> Result<(), NetlinkError> {
        let mut message = by_index(index);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![
                InfoBridgePort::Isolated(options.isolated),
                InfoBridgePort::Learning(options.learning),
                InfoBridgePort::HairpinMode(options.hairpin),
                InfoBridgePort::UnicastFlood(options.unicast_flood),
                InfoBridgePort::MulticastFlood(options.multicast_flood),
                InfoBridgePort::BroadcastFlood(options.broadcast_flood),
            ])),
        ]));
        self.request(RouteNetlinkMessage::NewLink(message), Mode::Existing, || {
            format!("set bridge port number {index} to {options:?}")
        })
        .await
    }

    async fn set(
        &self,
        index: u32,
        attribute: LinkAttribute,
        action: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        let mut message = by_index(index);
        message.attributes.push(attribute);
        self.change_link(message, action).await
    }

    async fn change_link(
        &self,
        message: LinkMessage,
        action: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        self.request(RouteNetlinkMessage::SetLink(message), Mode::Existing, action).await
    }
}

fn by_index(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// VLAN filtering is only spoken of where it changes: kernels built without it refuse even to switch it off.
fn bridge_info(now: BridgeOptions, options: BridgeOptions) -> LinkAttribute {
    let stp = if options.stp { BridgeStpState::KernelStp } else { BridgeStpState::Disabled };
    let mut data = vec![InfoBridge::StpState(stp), InfoBridge::MulticastSnooping(options.multicast_snooping)];
    if now.vlan_filtering != options.vlan_filtering {
        data.push(InfoBridge::VlanFiltering(options.vlan_filtering));
    }
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(InfoData::Bridge(data))])
}

fn as_link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    link_of(message)
}

pub(super) fn link_of(message: LinkMessage) -> Option<Link> {
    if message.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: LinkKind::Other,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        running: message.header.flags.contains(LinkFlags::Running),
        mac: None,
        mtu: 0,
        master: None,
        alias: None,
        peer: None,
        peer_netns: None,
        bridge: None,
        port: None,
        forwarding: false,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Controller(master) => link.master = (master != 0).then_some(master),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Link(peer) => link.peer = (peer != 0).then_some(peer),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = (id >= 0).then_some(id),
            LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| read_info(&mut link, info)),
            _ => {}
        }
    }
    Some(link)
}

fn read_info(link: &mut Link, info: LinkInfo) {
    match info {
        LinkInfo::Kind(kind) => {
            link.kind = match kind {
                InfoKind::Veth => LinkKind::Veth,
                InfoKind::Bridge => LinkKind::Bridge,
                InfoKind::Tun => LinkKind::Tun,
                _ => LinkKind::Other,
            }
        }
        LinkInfo::Data(InfoData::Bridge(data)) => {
            let mut options = BridgeOptions::default();
            for item in data {
                match item {
                    InfoBridge::StpState(state) => options.stp = state != BridgeStpState::Disabled,
                    InfoBridge::MulticastSnooping(on) => options.multicast_snooping = on,
                    InfoBridge::VlanFiltering(on) => options.vlan_filtering = on,
                    _ => {}
                }
            }
            link.bridge = Some(options);
        }
        LinkInfo::PortData(InfoPortData::BridgePort(data)) => {
            let mut options = PortOptions::default();
            for item in data {
                match item {
                    InfoBridgePort::State(state) => link.forwarding = state == BridgePortState::Forwarding,
                    InfoBridgePort::Isolated(on) => options.isolated = on,
                    InfoBridgePort::Learning(on) => options.learning = on,
                    InfoBridgePort::HairpinMode(on) => options.hairpin = on,
                    InfoBridgePort::UnicastFlood(on) => options.unicast_flood = on,
                    InfoBridgePort::MulticastFlood(on) => options.multicast_flood = on,
                    InfoBridgePort::BroadcastFlood(on) => options.broadcast_flood = on,
                    _ => {}
                }
            }
            link.port = Some(options);
        }
        _ => {}
    }
}
