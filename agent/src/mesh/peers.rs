//! Peer records: what each agent says about itself, and the set of those we know.
//!
//! A record is raised by its owner only: `incarnation` grows with each start, `version` with each change. Anyone passes
//! anyone's records on.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::gossip::{Gossiper, Item, Rejected};
use crate::{
    identity::{BadSeal, Checker, Sealer},
    types::{DataId, DataKey, Endpoint, Incarnation, PeerName},
};
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use weft_proto::mesh as wire;

/// What an agent says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRecord {
    pub name: PeerName,
    pub incarnation: Incarnation,
    pub version: u64,
    /// Underlay endpoints, best first.
    pub endpoints: Vec<Endpoint>,
    /// For sessions of the data plane; none where it only speaks in clear.
    pub data_key: Option<DataKey>,
    pub data_id: DataId,
    /// The pods' MTU on that node, in bytes.
    pub mtu: u16,
    pub software: String,
    pub ranges_digest: u64,
    pub neighbours: Vec<Neighbour>,
    /// Addresses that it serves though the ring gives them to another.
    pub held: Vec<IpAddr>,
    /// Addresses of its own ranges that it leaves to who holds them.
    pub conceded: Vec<IpAddr>,
    /// By which the node itself speaks to others' pods.
    pub bridge: Option<IpAddr>,
    /// Of the deaths that it has heard of and written down.
    pub deaths_digest: u64,
    /// Who lives as far as it knew before it started, and has not been heard of since.
    pub absent: Vec<(PeerName, Incarnation)>,
    /// It has left for good and owns nothing.
    pub left: bool,
}

/// A peer to which the record's owner has a control link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub name: PeerName,
    /// `None`: not measured yet. Kept in µs on the wire.
    pub rtt: Option<Duration>,
}

/// The peers that are in the network as one snapshot, the own record among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSet {
    own: PeerName,
    records: BTreeMap<PeerName, Arc<PeerRecord>>,
    left: BTreeSet<PeerName>,
}

/// Checks the items of channel [`CHANNEL`]; without a checker it does not ask who has sealed them.
#[derive(Debug)]
pub struct PeerGossip(pub Option<Checker>);

impl PeerRecord {
    /// A record with nothing but its owner.
    pub fn new(name: PeerName, incarnation: Incarnation) -> Self {
        Self {
            name,
            incarnation,
            version: 1,
            endpoints: Vec::new(),
            data_key: None,
            data_id: DataId::default(),
            mtu: 0,
            software: String::new(),
            ranges_digest: 0,
            neighbours: Vec::new(),
            held: Vec::new(),
            conceded: Vec::new(),
            bridge: None,
            deaths_digest: 0,
            absent: Vec::new(),
            left: false,
        }
    }

    /// Orders the records of one name.
    pub fn rank(&self) -> (Incarnation, u64) {
        (self.incarnation, self.version)
    }

    /// Raises the rank above another record's of the same name: its incarnation, so that nobody takes the two for one.
    pub(super) fn outbid(&mut self, foreign: &PeerRecord) {
        if foreign.rank() >= self.rank() {
            self.incarnation = Incarnation(foreign.incarnation.0.saturating_add(1)).min(Incarnation::MAX);
            self.version = if self.incarnation == foreign.incarnation { foreign.version + 1 } else { 1 };
        }
    }

    /// Says that its owner has left after so long. Farewells are ranked by the time of leaving, not of starting: of too
    /// many the oldest are forgotten, and none that somebody may not have heard yet.
    pub(super) fn farewell(&self, after: Duration) -> Self {
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        let incarnation = Incarnation(self.incarnation.0.saturating_add(micros)).min(Incarnation::MAX);
        Self { left: true, incarnation, version: self.version + 1, ..self.clone() }
    }

    /// The record as it is gossiped; lists are cut to their bounds.
    pub fn to_item(&self) -> Item {
        let micros =
            |rtt: Option<Duration>| rtt.map_or(0, |rtt| rtt.as_micros().clamp(1, u32::MAX as u128) as u32);
        let neighbour = |n: &Neighbour| wire::Neighbour { name: n.name.to_string(), rtt_us: micros(n.rtt) };
        let absent = |(name, incarnation): &(PeerName, Incarnation)| wire::Absent {
            name: name.to_string(),
            incarnation: incarnation.0,
        };
        let body = wire::PeerRecord {
            name: self.name.to_string(),
            incarnation: self.incarnation.0,
            version: self.version,
            endpoints: self.endpoints.iter().take(MAX_ENDPOINTS).map(Endpoint::to_string).collect(),
            public_key: self.data_key.map(|key| key.0.into()).unwrap_or_default(),
            data_id: self.data_id.0,
            mtu: self.mtu.into(),
            software: self.software.chars().take(MAX_SOFTWARE / 4).collect(),
            ranges_digest: self.ranges_digest,
            neighbours: self.neighbours.iter().take(MAX_NEIGHBOURS).map(neighbour).collect(),
            held: self.held.iter().take(MAX_HELD).map(IpAddr::to_string).collect(),
            conceded: self.conceded.iter().take(MAX_HELD).map(IpAddr::to_string).collect(),
            left: self.left,
            deaths_digest: self.deaths_digest,
            absent: self.absent.iter().take(MAX_ABSENT).map(absent).collect(),
            bridge: self.bridge.as_ref().map(IpAddr::to_string).unwrap_or_default(),
        };
        Item {
            channel: CHANNEL.into(),
            key: self.name.as_str().into(),
            rank: rank(self.incarnation, self.version),
            body: body.encode_to_vec(),
            signature: Vec::new(),
        }
    }

    /// The same, sealed by its owner.
    pub fn to_sealed(&self, sealer: Option<&Sealer>) -> Item {
        let item = self.to_item();
        let signature = sealer.map(|sealer| sealer.seal(SEALED, &item.body).encode_to_vec());
        Item { signature: signature.unwrap_or_default(), ..item }
    }

    /// # Errors
    /// The body does not decode, or key and rank do not agree with it.
    pub fn from_item(item: &Item) -> Result<Self, Rejected> {
        let body = wire::PeerRecord::decode(item.body.as_slice()).map_err(|_| Rejected::Undecodable)?;
        if body.endpoints.len() > MAX_ENDPOINTS
            || body.neighbours.len() > MAX_NEIGHBOURS
            || body.absent.len() > MAX_ABSENT
            || body.held.len().max(body.conceded.len()) > MAX_HELD
            || body.software.len() > MAX_SOFTWARE
        {
            return Err(Rejected::TooLong);
        }
        let neighbour = |n: wire::Neighbour| {
            let rtt = (n.rtt_us != 0).then(|| Duration::from_micros(n.rtt_us.into()));
            Some(Neighbour { name: n.name.parse().ok()?, rtt })
        };
        let absent =
            |absent: wire::Absent| Some((absent.name.parse().ok()?, Incarnation(absent.incarnation)));
        let decode = || {
            Some(Self {
                name: body.name.parse().ok()?,
                incarnation: Incarnation(body.incarnation),
                version: body.version,
                endpoints: body.endpoints.iter().map(|text| text.parse().ok()).collect::<Option<_>>()?,
                data_key: match body.public_key.as_slice() {
                    [] => None,
                    key => Some(DataKey::from_bytes(key)?),
                },
                data_id: DataId(body.data_id),
                mtu: body.mtu.try_into().ok()?,
                software: body.software,
                ranges_digest: body.ranges_digest,
                neighbours: body.neighbours.into_iter().map(neighbour).collect::<Option<_>>()?,
                held: body.held.iter().map(|text| text.parse().ok()).collect::<Option<_>>()?,
                conceded: body.conceded.iter().map(|text| text.parse().ok()).collect::<Option<_>>()?,
                bridge: match body.bridge.as_str() {
                    "" => None,
                    text => Some(text.parse().ok()?),
                },
                deaths_digest: body.deaths_digest,
                absent: body.absent.into_iter().map(absent).collect::<Option<_>>()?,
                left: body.left,
            })
        };
        let record = decode().ok_or(Rejected::Undecodable)?;
        let agrees = item.key == record.name.as_str().as_bytes()
            && item.rank == rank(record.incarnation, record.version)
            && record.version <= MAX_VERSION
            && record
                .absent
                .iter()
                .map(|(_, of)| *of)
                .chain([record.incarnation])
                .all(|of| of <= Incarnation::MAX);
        agrees.then_some(record).ok_or(Rejected::Disagrees)
    }
}

impl PeerSet {
    pub fn new(own: PeerRecord) -> Self {
        let name = own.name.clone();
        Self { own: name.clone(), records: [(name, Arc::new(own))].into(), left: BTreeSet::new() }
    }

    pub fn own(&self) -> &Arc<PeerRecord> {
        &self.records[&self.own]
    }

    pub fn get(&self, name: &PeerName) -> Option<&Arc<PeerRecord>> {
        self.records.get(name)
    }

    /// All records by name, the own one included.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<PeerRecord>> {
        self.records.values()
    }

    pub(super) fn entries(&mut self) -> impl Iterator<Item = &mut Arc<PeerRecord>> {
        self.records.values_mut()
    }

    /// How many, the own one included.
    pub fn count(&self) -> usize {
        self.records.len()
    }

    pub fn others(&self) -> impl Iterator<Item = &Arc<PeerRecord>> {
        self.iter().filter(|record| record.name != self.own)
    }

    /// Those that have left for good, as far as is remembered.
    pub fn left(&self) -> impl Iterator<Item = &PeerName> {
        self.left.iter()
    }

    /// A peer is no more.
    pub(crate) fn remove(&mut self, name: &PeerName) {
        if *name != self.own {
            self.records.remove(name);
        }
    }

    /// Takes a newer record in; a peer that has left goes.
    pub(crate) fn insert(&mut self, record: impl Into<Arc<PeerRecord>>) {
        let record = record.into();
        if record.left && record.name != self.own {
            self.records.remove(&record.name);
            self.left.insert(record.name.clone());
        } else {
            self.left.remove(&record.name);
            self.records.insert(record.name.clone(), record);
        }
    }
}

impl Gossiper for PeerGossip {
    fn channel(&self) -> &'static str {
        CHANNEL
    }

    fn check(&mut self, item: &Item) -> Result<(), Rejected> {
        let record = PeerRecord::from_item(item)?;
        let Some(checker) = &mut self.0 else { return Ok(()) };
        let seal = wire::Seal::decode(item.signature.as_slice()).map_err(|_| BadSeal::Unreadable)?;
        if seal.encoded_len() != item.signature.len() {
            return Err(BadSeal::Unreadable.into());
        }
        let signer = checker.signer(SEALED, &item.body, &seal)?;
        signer.is(&record.name).then_some(()).ok_or(Rejected::Forged("its seal is another peer's"))
    }

    fn is_farewell(&self, item: &Item) -> bool {
        Farewell::decode(item.body.as_slice()).is_ok_and(|record| record.left)
    }
}

/// Of a record only what tells a farewell: every record that comes is asked.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Farewell {
    #[prost(bool, tag = "12")]
    left: bool,
}

fn rank(incarnation: Incarnation, version: u64) -> Vec<u8> {
    [incarnation.0.to_be_bytes(), version.to_be_bytes()].concat()
}

/// The channel of peer records.
pub const CHANNEL: &str = "peers";
/// What a record is to who seals it.
const SEALED: &str = "record";
/// Versions stay below, so that an owner can always outbid.
const MAX_VERSION: u64 = u64::MAX / 2;
const MAX_ENDPOINTS: usize = 16;
/// As many links as an agent may have.
pub(super) const MAX_NEIGHBOURS: usize = 64;
/// The rest follows once these have been heard of or forgotten.
const MAX_ABSENT: usize = 16;
/// A node's pods, all of them held.
const MAX_HELD: usize = 512;
const MAX_SOFTWARE: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn record(name: &str) -> PeerRecord {
        PeerRecord {
            endpoints: vec!["192.0.2.1:6783".parse().unwrap(), "[2001:db8::1]:6783".parse().unwrap()],
            mtu: 1440,
            data_key: Some(DataKey([7; 32])),
            data_id: DataId(7),
            neighbours: vec![
                Neighbour { name: "b".parse().unwrap(), rtt: Some(Duration::from_micros(150)) },
                Neighbour { name: "c".parse().unwrap(), rtt: None },
            ],
            held: vec!["10.32.0.9".parse().unwrap()],
            conceded: vec!["10.32.0.10".parse().unwrap()],
            bridge: Some("10.32.0.1".parse().unwrap()),
            absent: vec![("d".parse().unwrap(), Incarnation(8))],
            ..PeerRecord::new(name.parse().unwrap(), Incarnation(9))
        }
    }

    proptest! {
        #[test]
        fn a_record_reads_back(incarnation in 0..=Incarnation::MAX.0, version in 0..=MAX_VERSION, mtu: u16, rtt in 1u32.., left: bool) {
            let mut record = PeerRecord { incarnation: Incarnation(incarnation), version, mtu, left, ..record("a") };
            record.neighbours[0].rtt = Some(Duration::from_micros(rtt.into()));
            prop_assert_eq!(PeerRecord::from_item(&record.to_item()), Ok(record));
        }

        #[test]
        fn no_bytes_make_it_panic(body in vec(any::<u8>(), 0..100)) {
            let _ = PeerGossip(None).check(&Item { body, ..record("a").to_item() });
        }

        #[test]
        fn a_changed_byte_never_passes_as_another_peers(at in 0..60usize, bit in 0..8u8) {
            let mut item = record("a").to_item();
            let len = item.body.len();
            item.body[at % len] ^= 1 << bit;
            if let Ok(read) = PeerRecord::from_item(&item) {
                prop_assert_eq!(read.name.as_str(), "a");
                prop_assert_eq!(read.rank(), (Incarnation(9), 1));
            }
        }
    }

    #[test]
    fn key_and_rank_must_agree_with_the_body() {
        let item = record("a").to_item();
        assert_eq!(PeerGossip(None).check(&item), Ok(()));
        assert_eq!(
            PeerGossip(None).check(&Item { key: b"b".into(), ..item.clone() }),
            Err(Rejected::Disagrees)
        );
        assert_eq!(
            PeerGossip(None).check(&Item { rank: vec![0; 16], ..item.clone() }),
            Err(Rejected::Disagrees)
        );
        let beyond = Incarnation(Incarnation::MAX.0 + 1);
        for endless in [
            PeerRecord { version: u64::MAX, ..record("a") },
            PeerRecord { incarnation: beyond, ..record("a") },
            PeerRecord { absent: vec![("d".parse().unwrap(), beyond)], ..record("a") },
        ] {
            assert_eq!(PeerGossip(None).check(&endless.to_item()), Err(Rejected::Disagrees));
        }
    }

    #[test]
    fn an_owner_outbids_a_foreign_record_of_its_name() {
        for foreign in [(8, 5), (9, 1), (9, 7), (30, 7), (Incarnation::MAX.0, 7)] {
            let foreign =
                PeerRecord { incarnation: Incarnation(foreign.0), version: foreign.1, ..record("a") };
            let mut own = record("a");
            own.outbid(&foreign);
            assert!(own.rank() > foreign.rank(), "{:?}", foreign.rank());
            assert!(own.to_item().beats(&foreign.to_item()));
            assert!(PeerGossip(None).check(&own.to_item()).is_ok());
        }
    }

    #[test]
    fn a_farewell_is_dated_to_the_leaving_and_takes_its_peer_away() {
        let here = record("b");
        let gone = here.farewell(Duration::from_secs(3600));
        assert_eq!(gone.rank(), (Incarnation(9 + 3_600_000_000), 2));
        assert!(
            PeerGossip(None).is_farewell(&gone.to_item()) && !PeerGossip(None).is_farewell(&here.to_item())
        );
        assert_eq!(PeerGossip(None).check(&here.farewell(Duration::MAX).to_item()), Ok(()));
        let mut peers = PeerSet::new(record("a"));
        peers.insert(here);
        assert_eq!(peers.others().count(), 1);
        peers.insert(gone);
        assert_eq!((peers.others().count(), peers.iter().count()), (0, 1));
        assert!(peers.left().eq([&"b".parse().unwrap()]));
    }

    #[test]
    fn the_largest_record_fits_an_item() {
        let long: PeerName = "x".repeat(253).parse().unwrap();
        let mut record = record(long.as_str());
        record.endpoints = vec!["[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap(); 99];
        record.absent = vec![(long.clone(), Incarnation::MAX); 9999];
        record.neighbours = vec![Neighbour { name: long, rtt: Some(Duration::MAX) }; 9999];
        record.held = vec!["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff0".parse().unwrap(); 9999];
        record.conceded.clone_from(&record.held);
        record.software = "\u{10ffff}".repeat(999);
        record.data_key = Some(DataKey([0; 32]));
        assert_eq!(record.to_item().check_bounds(), Ok(()));
        assert_eq!(PeerGossip(None).check(&record.to_item()), Ok(()));
    }
}
