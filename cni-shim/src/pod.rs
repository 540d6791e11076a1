//! The veth: its end in the pod's namespace and the host's, before the agent makes the latter a bridge port.
//!
//! ```text
//!   pod                                     host
//!   eth0  10.32.0.2/32  ◀──── veth ────▶  wf… (ifalias: whose it is)
//!   10.32.0.1 dev eth0, at the bridge's MAC, permanent
//!   default via 10.32.0.1
//! ```

use crate::{
    agent::Reservation,
    failure::{Failure, code},
    prev_result::PrevResult,
};
use std::{net::IpAddr, os::fd::AsFd, time::Duration};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};
use weft::{
    linux::{
        netlink::{Address, AddressFlags, Family, Link, Netlink, NetlinkError, Route, VethPair},
        netns::Netns,
        sysctl::{self, SysctlError},
    },
    types::{AttachmentKey, LARGEST_MESSAGE, Prefix, SEALED_OVERHEAD},
};

/// Both sides of a pod's cable.
pub struct Pod<'a> {
    netns: &'a Netns,
    key: &'a AttachmentKey,
    inside: Netlink,
    outside: Netlink,
}

impl<'a> Pod<'a> {
    /// # Errors
    /// The kernel refuses.
    pub fn open(netns: &'a Netns, key: &'a AttachmentKey) -> Result<Self, Failure> {
        let runtime = Handle::current();
        let inside = netns.enter(|| {
            let _inside_the_runtime = runtime.enter();
            Netlink::open()
        })??;
        Ok(Self { netns, key, inside, outside: Netlink::open()? })
    }

    /// What a shim that was killed left in the pod gives way: our veth, which the agent has not made a port yet.
    ///
    /// # Errors
    /// Code 102 if the pod has any other interface of that name.
    pub async fn refuse_existing(&self) -> Result<(), Failure> {
        let ifname = self.key.ifname();
        let link = match self.inside.link_by_name(ifname).await {
            Err(error) if error.is_gone() => return Ok(()),
            link => link?,
        };
        let host = find(&self.outside, &self.key.host_interface()).await?;
        match host.filter(|host| are_joined(&link, host) && host.master.is_none() && !host.up) {
            Some(host) => {
                let removed = self.outside.delete_link(host.index).await;
                Ok(removed.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })?)
            }
            None => {
                let msg = format!("the pod of {} has an interface {ifname} already", self.key.container_id());
                Err(Failure::new(code::INTERFACE_EXISTS, msg))
            }
        }
    }

    /// Makes the veth, its peer born inside the pod. What a shim that was killed left on the host gives way.
    ///
    /// # Errors
    /// Code 102 if somebody else made the pod's interface meanwhile: nothing of ours is there then.
    pub async fn create(&self, reservation: &Reservation) -> Result<(), Failure> {
        let pair = VethPair {
            name: &reservation.host_interface,
            mac: Some(reservation.host_mac),
            peer_name: self.key.ifname(),
            peer_mac: Some(reservation.mac),
            peer_netns: Some(self.netns.as_fd()),
            mtu: reservation.mtu,
            peer_max_segments: Some(segments_per_message(reservation.mtu)),
        };
        match self.outside.create_veth(&pair).await {
            Err(error) if error.is_exists() => {
                self.refuse_existing().await?;
                remove(&self.outside, &reservation.host_interface).await?;
                self.outside.create_veth(&pair).await?;
            }
            done => done?,
        }
        Ok(())
    }

    /// Sets both ends up, but for what makes the host's end a bridge port.
    pub async fn configure(&self, reservation: &Reservation) -> Result<(), Failure> {
        let host = self.outside.link_by_name(&reservation.host_interface).await?;
        self.outside.set_alias(host.index, &reservation.host_alias).await?;
        let ifname = self.key.ifname();
        self.netns.enter(|| set_sysctls(ifname))??;
        let link = self.inside.link_by_name(ifname).await?.index;
        let no_dad = AddressFlags { no_dad: true, no_prefix_route: false };
        for (address, _) in &reservation.addresses {
            self.inside.add_address(link, *address, no_dad).await?;
        }
        let loopback = self.inside.link_by_name("lo").await?.index;
        self.inside.set_up(loopback, true).await?;
        self.inside.set_up(link, true).await?;
        for (_, gateway) in &reservation.addresses {
            self.inside.set_neighbour(link, *gateway, reservation.bridge_mac).await?;
            for route in routes(*gateway, link) {
                self.inside.add_route(&route).await?;
            }
        }
        Ok(())
    }

    /// Waits until what the pod sends leaves: an interface throws it away until the kernel has taken note of the carrier
    /// that the other end gave it. Looking makes it do so at once since Linux 6.7; before, it takes up to a second.
    pub async fn wait_running(&self) -> Result<(), Failure> {
        let until = Instant::now() + CARRIER_WAIT;
        loop {
            let link = self.inside.link_by_name(self.key.ifname()).await?;
            if link.running || Instant::now() > until {
                return Ok(());
            }
            sleep(CARRIER_LOOK).await;
        }
    }

    /// Takes the veth away; both ends go.
    pub async fn remove(&self, reservation: &Reservation) -> Result<(), Failure> {
        Ok(remove(&self.outside, &reservation.host_interface).await?)
    }

    /// What differs from what was set up; more addresses and routes than ours are fine.
    pub async fn differences(
        &self,
        reservation: &Reservation,
        prev_result: &PrevResult,
    ) -> Result<Vec<String>, Failure> {
        let ifname = self.key.ifname();
        let link = match self.inside.link_by_name(ifname).await {
            Err(error) if error.is_gone() => return Ok(vec![format!("the pod has no interface {ifname}")]),
            link => link?,
        };
        let mut wrong = Vec::new();
        let mut expect = |holds: bool, otherwise: &dyn Fn() -> String| {
            if !holds {
                wrong.push(otherwise());
            }
        };
        let prev = prev_result.of_pod(ifname);
        let mtu = prev.and_then(|(_, interface)| interface.mtu).unwrap_or(reservation.mtu);
        let mac = prev.and_then(|(_, interface)| interface.mac()).unwrap_or(reservation.mac);
        expect(link.up, &|| format!("{ifname} is down"));
        expect(link.mtu == mtu, &|| format!("{ifname} has MTU {}, not {mtu}", link.mtu));
        expect(link.mac == Some(mac), &|| format!("{ifname} has MAC {}, not {mac}", shown(link.mac)));
        let host = find(&self.outside, &reservation.host_interface).await?;
        let joined = host.is_some_and(|host| are_joined(&link, &host));
        expect(joined, &|| format!("the other end of {ifname} is not {}", reservation.host_interface));
        let addresses = self.inside.addresses().await?;
        let ours = reservation.addresses.iter().map(|(address, _)| *address);
        let theirs = prev.map(|(place, _)| prev_result.addresses(place)).unwrap_or_default();
        for address in union(ours, theirs) {
            let held = addresses.contains(&Address { link: link.index, address });
            expect(held, &|| format!("{ifname} lacks address {address}"));
        }
        let routes = self.routes_of(&link).await?;
        let ours = reservation.addresses.iter().flat_map(|(_, gateway)| expected_routes(*gateway));
        let theirs = prev_result.routes.iter().map(|route| (route.dst.trunc(), route.gw));
        for (destination, gateway) in union(ours, theirs) {
            let goes = |(to, via): &(Prefix, Option<IpAddr>)| {
                *to == destination && (gateway.is_none() || *via == gateway)
            };
            let via = gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            expect(routes.iter().any(goes), &|| format!("the pod lacks a route to {destination}{via}"));
        }
        Ok(wrong)
    }

    async fn routes_of(&self, link: &Link) -> Result<Vec<(Prefix, Option<IpAddr>)>, NetlinkError> {
        let mut routes = self.inside.routes(Family::V4).await?;
        routes.extend(self.inside.routes(Family::V6).await?);
        let ours = routes.into_iter().filter(|route| route.link == Some(link.index));
        Ok(ours.map(|route| (route.destination, route.gateway)).collect())
    }
}

/// Takes the host's end of an attachment away, and with it the pod's; nothing there is success.
pub async fn remove_host_end(key: &AttachmentKey) -> Result<(), Failure> {
    Ok(remove(&Netlink::open()?, &key.host_interface()).await?)
}

async fn find(netlink: &Netlink, name: &str) -> Result<Option<Link>, NetlinkError> {
    match netlink.link_by_name(name).await {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looked at from both ends, as a link of the pod's own may have the same number as the host's end.
fn are_joined(inside: &Link, outside: &Link) -> bool {
    let each_other = inside.peer == Some(outside.index) && outside.peer == Some(inside.index);
    each_other && inside.peer_netns.is_some() && outside.peer_netns.is_some()
}

async fn remove(outside: &Netlink, name: &str) -> Result<(), NetlinkError> {
    let removed = match outside.link_by_name(name).await {
        Ok(link) => outside.delete_link(link.index).await,
        Err(error) => Err(error),
    };
    removed.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })
}

/// Super-packets with more segments would take two of the agent's messages.
fn segments_per_message(mtu: u32) -> u32 {
    let datagram = mtu.max(1) + u32::from(SEALED_OVERHEAD);
    (LARGEST_MESSAGE as u32 / datagram).max(1)
}

/// Where a kernel has no IPv6, its sysctls are missing, and so is what they prevent.
fn set_sysctls(ifname: &str) -> Result<(), SysctlError> {
    for (key, value) in [
        // Tell the neighbours when the address or the MAC changes.
        (format!("net/ipv4/conf/{ifname}/arp_notify"), "1"),
        // Routes and addresses come from us only; an address that we hand out is nobody else's.
        (format!("net/ipv6/conf/{ifname}/accept_ra"), "0"),
        (format!("net/ipv6/conf/{ifname}/autoconf"), "0"),
        (format!("net/ipv6/conf/{ifname}/accept_dad"), "0"),
    ] {
        if sysctl::read(&key)?.is_some() {
            sysctl::write(&key, value)?;
        }
    }
    Ok(())
}

fn routes(gateway: IpAddr, link: u32) -> [Route; 2] {
    [Route::on_link(Prefix::from(gateway), link), Route::via(everywhere(gateway), gateway, link)]
}

fn expected_routes(gateway: IpAddr) -> [(Prefix, Option<IpAddr>); 2] {
    [(Prefix::from(gateway), None), (everywhere(gateway), Some(gateway))]
}

fn everywhere(family_of: IpAddr) -> Prefix {
    Prefix::new_assert(family_of, 0).trunc()
}

fn union<T: PartialEq>(ours: impl IntoIterator<Item = T>, theirs: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut all: Vec<T> = ours.into_iter().collect();
    for item in theirs {
        if !all.contains(&item) {
            all.push(item);
        }
    }
    all
}

fn shown(mac: Option<weft::types::Mac>) -> String {
    mac.map_or("none".into(), |mac| mac.to_string())
}

/// Then the pod's first packets may be lost, which is no reason to fail.
const CARRIER_WAIT: Duration = Duration::from_millis(1200);
const CARRIER_LOOK: Duration = Duration::from_millis(2);
