//! Where each overlay address lives: a snapshot, built whole and read by every worker without a lock.
//!
//! ```text
//!   ranges   10.32.0.0/24 ─▶ me   10.32.1.0/24 ─▶ b   10.32.2.0/23 ─▶ nobody
//!   held          10.32.1.77 ─▶ c                  (an address that its peer kept when it lost the range)
//!   local         10.32.0.1, 10.32.0.2             (own bridge and pods)
//!                              │ flattened
//!                              ▼
//!   starts   …0.0  …0.1   …0.3  …1.0  …1.77  …1.78  …2.0  …4.0
//!   homes     me   local   me    b      c      b    nobody nobody      one binary search per lookup
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{DataId, PeerName, Prefix};
use std::{
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// Where packets go to and may come from.
#[derive(Clone, Debug, Default)]
pub struct Table {
    me: DataId,
    peers: Arc<[Peer]>,
    /// The peers' data ids in order, with their places in `peers`.
    by_data_id: Vec<(DataId, u32)>,
    v4: Segments<u32>,
    v6: Segments<u128>,
    bridge_v4: Option<Ipv4Addr>,
    bridge_v6: Option<Ipv6Addr>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: PeerName,
    pub data_id: DataId,
    /// Where its UDP data socket is; none while no address of it is known.
    pub endpoint: Option<SocketAddr>,
    /// The node to which packets for it go, behind a [`super::relay::Prefix`], where it cannot be reached directly.
    pub relay: Option<SocketAddr>,
    /// Largest inner packet, in bytes, that the way to it takes.
    pub mtu: u16,
}

/// Who owns a range, in a table's inputs. A peer is named by its place in `peers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Me,
    Peer(usize),
    Nobody,
}

/// What a table is made from.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Our own data id, for the header of what we send.
    pub me: DataId,
    /// Keep the same `Arc` while no peer changes: the workers then keep their counters' places too.
    pub peers: Arc<[Peer]>,
    /// The longest prefix wins; of two equal ones, the later.
    pub ranges: Vec<(Prefix, Owner)>,
    /// Single addresses that are preferred to every range.
    pub held: Vec<(IpAddr, Owner)>,
    /// The bridge's addresses, one of a family: local, and the source of the ICMP errors that we make.
    pub bridge: Vec<IpAddr>,
    /// The addresses of the pods that live here.
    pub pods: Vec<IpAddr>,
}

/// Where an address lives, as a table answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Home {
    /// In a range that nobody owns, or outside every range.
    #[default]
    Nobody,
    /// In a range of ours, but no pod has it.
    Me,
    /// On this node: a pod's or the bridge's.
    Local,
    /// On the peer at that place in [`Table::peers`].
    Peer(u32),
}

impl Peer {
    /// Where datagrams for it are sent.
    pub fn hop(&self) -> Option<SocketAddr> {
        self.relay.or(self.endpoint)
    }
}

impl Table {
    /// Flattens the inputs. An owner that is no peer's place is taken for nobody.
    pub fn new(inputs: Inputs) -> Self {
        let Inputs { me, peers, ranges, held, bridge, pods } = inputs;
        let home = |owner| match owner {
            Owner::Me => Home::Me,
            Owner::Peer(place) if place < peers.len() => Home::Peer(place as u32),
            Owner::Peer(_) | Owner::Nobody => Home::Nobody,
        };
        // Later entries win over earlier ones of the same prefix: ranges, then held, then local addresses.
        let ranges = ranges.iter().map(|&(prefix, owner)| (prefix, home(owner)));
        let held = held.iter().map(|&(address, owner)| (Prefix::from(address), home(owner)));
        let local = bridge.iter().chain(&pods).map(|&address| (Prefix::from(address), Home::Local));
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (prefix, home) in ranges.chain(held).chain(local) {
            match prefix {
                Prefix::V4(p) => {
                    v4.push(Range { first: p.network().to_bits(), last: p.broadcast().to_bits(), home })
                }
                Prefix::V6(p) => {
                    v6.push(Range { first: p.network().to_bits(), last: p.broadcast().to_bits(), home })
                }
            }
        }
        let mut by_data_id: Vec<_> =
            peers.iter().enumerate().map(|(place, peer)| (peer.data_id, place as u32)).collect();
        by_data_id.sort_unstable();
        Self {
            me,
            by_data_id,
            v4: Segments::flatten(v4),
            v6: Segments::flatten(v6),
            bridge_v4: bridge.iter().find_map(|address| match address {
                IpAddr::V4(address) => Some(*address),
                IpAddr::V6(_) => None,
            }),
            bridge_v6: bridge.iter().find_map(|address| match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(*address),
            }),
            peers,
        }
    }

    /// Our own data id.
    pub fn me(&self) -> DataId {
        self.me
    }

    pub fn peers(&self) -> &Arc<[Peer]> {
        &self.peers
    }

    /// Where an address lives, by the longest prefix.
    pub fn home(&self, address: IpAddr) -> Home {
        match address {
            IpAddr::V4(address) => self.v4.find(address.to_bits()),
            IpAddr::V6(address) => self.v6.find(address.to_bits()),
        }
    }

    /// The place of the peer that may send packets from `source` under that data id: the address must live there.
    ///
    /// # Errors
    /// Tells a sender that nobody knows from one that sends as another's pod.
    pub fn sender(&self, data_id: DataId, source: IpAddr) -> Result<u32, Refused> {
        match self.home(source) {
            Home::Peer(place) if self.peers[place as usize].data_id == data_id => Ok(place),
            _ if self.by_data_id(data_id).is_some() => Err(Refused::Spoofed),
            _ => Err(Refused::Unknown),
        }
    }

    /// The place of the peer of that name, if `source` lives there.
    ///
    /// # Errors
    /// The same.
    pub fn named_sender(&self, name: &PeerName, source: IpAddr) -> Result<u32, Refused> {
        match self.home(source) {
            Home::Peer(place) if self.peers[place as usize].name == *name => Ok(place),
            _ => Err(Refused::Spoofed),
        }
    }

    /// The place of the peer with that data id; of several, the first.
    pub fn by_data_id(&self, data_id: DataId) -> Option<u32> {
        let at = self.by_data_id.partition_point(|(id, _)| *id < data_id);
        self.by_data_id.get(at).filter(|(id, _)| *id == data_id).map(|(_, place)| *place)
    }

    pub fn bridge_v4(&self) -> Option<Ipv4Addr> {
        self.bridge_v4
    }

    pub fn bridge_v6(&self) -> Option<Ipv6Addr> {
        self.bridge_v6
    }
}

/// Why a packet's sender is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No peer has this data id.
    Unknown,
    /// The inner source does not live on that peer.
    Spoofed,
}

struct Range<A> {
    first: A,
    last: A,
    home: Home,
}

/// All addresses of a family as runs that do not overlap: run `i` begins at `starts[i]` and ends before the next.
/// What is before the first start is nobody's.
#[derive(Clone, Debug, Default)]
struct Segments<A> {
    starts: Vec<A>,
    homes: Vec<Home>,
}

impl<A: Address> Segments<A> {
    /// Prefixes either nest or are apart, so one pass with a stack of the open ones flattens them.
    fn flatten(mut ranges: Vec<Range<A>>) -> Self {
        // Outer ranges before inner ones; the sort is stable, so a later one of equals comes later.
        ranges.sort_by_key(|range| (range.first, Reverse(range.last)));
        let mut segments = Self { starts: Vec::new(), homes: Vec::new() };
        let mut open: Vec<Range<A>> = Vec::new();
        for range in ranges {
            while let Some(outer) = open.pop_if(|outer| outer.last < range.first) {
                segments.close(&open, outer.last);
            }
            segments.push(range.first, range.home);
            open.push(range);
        }
        while let Some(outer) = open.pop() {
            segments.close(&open, outer.last);
        }
        segments.starts.shrink_to_fit();
        segments.homes.shrink_to_fit();
        segments
    }

    /// What a range covered up to `last` goes back to the one around it.
    fn close(&mut self, open: &[Range<A>], last: A) {
        if let Some(next) = last.next() {
            self.push(next, open.last().map_or(Home::Nobody, |outer| outer.home));
        }
    }

    fn push(&mut self, start: A, home: Home) {
        if self.starts.last() == Some(&start) {
            self.starts.pop();
            self.homes.pop();
        }
        if self.homes.last().copied().unwrap_or_default() != home {
            self.starts.push(start);
            self.homes.push(home);
        }
    }

    fn find(&self, address: A) -> Home {
        let after = self.starts.partition_point(|start| *start <= address);
        after.checked_sub(1).map_or(Home::Nobody, |at| self.homes[at])
    }
}

trait Address: Copy + Ord {
    fn next(self) -> Option<Self>;
}

impl Address for u32 {
    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }
}

impl Address for u128 {
    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(name: &str, data_id: u32) -> Peer {
        Peer { name: name.parse().unwrap(), data_id: DataId(data_id), endpoint: None, relay: None, mtu: 1400 }
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn example() -> Table {
        Table::new(Inputs {
            me: DataId(1),
            peers: [peer("b", 2), peer("c", 3)].into(),
            ranges: vec![
                ("10.32.0.0/24".parse().unwrap(), Owner::Me),
                ("10.32.1.0/24".parse().unwrap(), Owner::Peer(0)),
                ("10.32.2.0/23".parse().unwrap(), Owner::Nobody),
                ("fd00::/64".parse().unwrap(), Owner::Peer(1)),
            ],
            held: vec![(address("10.32.1.77"), Owner::Peer(1))],
            bridge: vec![address("10.32.0.1"), address("fd01::1")],
            pods: vec![address("10.32.0.2"), address("10.32.1.9")],
        })
    }

    #[test]
    fn an_address_lives_where_the_longest_prefix_says() {
        let table = example();
        for (text, home) in [
            ("10.31.255.255", Home::Nobody),
            ("10.32.0.0", Home::Me),
            ("10.32.0.1", Home::Local),
            ("10.32.0.2", Home::Local),
            ("10.32.0.3", Home::Me),
            ("10.32.1.0", Home::Peer(0)),
            ("10.32.1.9", Home::Local),
            ("10.32.1.77", Home::Peer(1)),
            ("10.32.1.78", Home::Peer(0)),
            ("10.32.3.255", Home::Nobody),
            ("255.255.255.255", Home::Nobody),
            ("fd00::7", Home::Peer(1)),
            ("fd01::1", Home::Local),
            ("::", Home::Nobody),
        ] {
            assert_eq!(table.home(address(text)), home, "{text}");
        }
        assert_eq!(Table::default().home(address("10.32.0.1")), Home::Nobody);
        assert_eq!(table.bridge_v4(), Some(Ipv4Addr::new(10, 32, 0, 1)));
    }

    #[test]
    fn a_peer_sends_only_from_what_lives_there() {
        let table = example();
        assert_eq!(table.sender(DataId(2), address("10.32.1.5")), Ok(0));
        assert_eq!(table.sender(DataId(3), address("10.32.1.77")), Ok(1), "held");
        for source in ["10.32.1.77", "10.32.1.9", "10.32.0.2", "10.32.0.9", "10.32.2.1", "192.0.2.1"] {
            assert_eq!(table.sender(DataId(2), address(source)), Err(Refused::Spoofed), "{source}");
        }
        assert_eq!(table.sender(DataId(9), address("10.32.1.5")), Err(Refused::Unknown));
    }

    #[test]
    fn two_peers_with_one_data_id_both_send() {
        let ranges = vec![
            ("10.0.0.0/24".parse().unwrap(), Owner::Peer(0)),
            ("10.0.1.0/24".parse().unwrap(), Owner::Peer(1)),
        ];
        let peers = [peer("b", 2), peer("c", 2)].into();
        let table = Table::new(Inputs { peers, ranges, ..Inputs::default() });
        assert_eq!(table.sender(DataId(2), address("10.0.0.1")), Ok(0));
        assert_eq!(table.sender(DataId(2), address("10.0.1.1")), Ok(1));
    }

    #[test]
    fn the_last_address_of_a_family_ends_a_table() {
        let all = vec![
            ("0.0.0.0/0".parse().unwrap(), Owner::Me),
            ("255.255.255.255/32".parse().unwrap(), Owner::Peer(0)),
            ("::/0".parse().unwrap(), Owner::Me),
        ];
        let table = Table::new(Inputs { peers: [peer("b", 2)].into(), ranges: all, ..Inputs::default() });
        assert_eq!(table.home(address("255.255.255.255")), Home::Peer(0));
        assert_eq!(table.home(address("255.255.255.254")), Home::Me);
        assert_eq!(table.home(address("ffff::")), Home::Me);
    }

    /// Few bits, so that prefixes nest and collide: 10.0.0.0/24 and what is in it.
    fn prefix() -> impl Strategy<Value = Prefix> {
        (any::<u8>(), 24u8..=32)
            .prop_map(|(low, len)| Prefix::new(Ipv4Addr::new(10, 0, 0, low).into(), len).unwrap().trunc())
    }

    fn owner() -> impl Strategy<Value = Owner> {
        prop_oneof![Just(Owner::Me), Just(Owner::Nobody), (0usize..3).prop_map(Owner::Peer)]
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_trying_every_prefix(
            ranges in prop::collection::vec((prefix(), owner()), 0..40),
            held in prop::collection::vec((any::<u8>(), owner()), 0..5),
            pods in prop::collection::vec(any::<u8>(), 0..5),
        ) {
            let at = |low: u8| IpAddr::from([10, 0, 0, low]);
            let held: Vec<_> = held.into_iter().map(|(low, owner)| (at(low), owner)).collect();
            let pods: Vec<_> = pods.into_iter().map(at).collect();
            let peers: Arc<[Peer]> = [peer("a", 1), peer("b", 2), peer("c", 3)].into();
            let inputs = Inputs { peers, ranges, held, pods, ..Inputs::default() };
            let table = Table::new(inputs.clone());
            for low in 0..=255 {
                let naive = || {
                    if inputs.pods.contains(&at(low)) {
                        return Home::Local;
                    }
                    let ranges = inputs.ranges.iter().filter(|(prefix, _)| prefix.contains(&at(low)));
                    let range = ranges.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, owner)| owner);
                    let held = inputs.held.iter().rfind(|(address, _)| *address == at(low)).map(|(_, o)| o);
                    match held.or(range) {
                        Some(Owner::Me) => Home::Me,
                        Some(Owner::Peer(place)) => Home::Peer(*place as u32),
                        Some(Owner::Nobody) | None => Home::Nobody,
                    }
                };
                prop_assert_eq!(table.home(at(low)), naive(), "{}", low);
            }
        }
    }
}
