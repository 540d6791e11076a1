//! What the allocator keeps, as entries of the state file.

use super::{
    Allocation, Change, Owner, Stored,
    death::{self, Death},
    election::{self, Vote},
    seed::SeedPlan,
    span::Layout,
    token::Token,
};
use crate::{
    linux::store::{Entry, Store, StoreError, Table, Write},
    mesh::gossip::Item,
    types::{AttachmentKey, Incarnation, PodRef},
};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use weft_proto::mesh;

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the state file holds {0} that this version of weft cannot read; it has been left as it is: start the version that \
         wrote it, or give this node's addresses up with `weft reset --force`"
    )]
    Unreadable(&'static str),
}

/// Who shared the universe at the start, once that is settled.
pub fn seeds(store: &Store) -> Result<Option<SeedPlan>, RecordError> {
    let stored = store.read(Table::Meta)?.into_iter().find(|(key, _)| key == SEEDS);
    let names = |text: &str| text.split(',').map(|name| name.parse().ok()).collect();
    let plan = |(_, text): Entry| -> Option<SeedPlan> { names(std::str::from_utf8(&text).ok()?) };
    stored.map(|stored| plan(stored).ok_or(RecordError::Unreadable("a list of seeds"))).transpose()
}

/// Reads all that was stored.
pub fn load(store: &Store, layout: &Layout) -> Result<Stored, RecordError> {
    let mut stored = Stored::default();
    for table in [Table::Meta, Table::Ring, Table::Allocations, Table::Resting, Table::Items] {
        for entry in store.read(table)? {
            read(&mut stored, table, &entry, layout)?;
        }
    }
    Ok(stored)
}

/// Takes one entry in.
pub fn read(
    stored: &mut Stored,
    table: Table,
    (key, value): &Entry,
    layout: &Layout,
) -> Result<(), RecordError> {
    match table {
        Table::Meta => {
            stored.in_force |= key == IN_FORCE;
            if let Some(name) = key.strip_prefix(MEMBER) {
                let name = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
                let incarnation = value.as_slice().try_into().ok().map(u64::from_be_bytes);
                let member = name.zip(incarnation.map(Incarnation));
                stored.members.extend([member.ok_or(RecordError::Unreadable("the name of a peer"))?]);
            }
        }
        Table::Ring => {
            let item = mesh::Item::decode(value.as_slice()).ok();
            let token = item.and_then(|mesh::Item { body, signature, .. }| {
                Some(Token { signature, ..Token::from_body(&body, layout).ok()? })
            });
            let token = token.ok_or(RecordError::Unreadable("a token"))?;
            stored.tokens.insert(token.start, token.into());
        }
        Table::Allocations => {
            stored.allocations.push(decode(value).ok_or(RecordError::Unreadable("an allocation"))?);
        }
        Table::Resting => {
            let offset = layout.from_bytes(key).ok_or(RecordError::Unreadable("a resting address"))?;
            stored.resting.push(layout.address(offset));
        }
        Table::Items => {
            let (settled, item) = value.split_first().ok_or(RecordError::Unreadable("a kept item"))?;
            let item: Item =
                mesh::Item::decode(item).map_err(|_| RecordError::Unreadable("a kept item"))?.into();
            // Who left these out would go back on its word.
            if item.channel == death::CHANNEL && Death::from_item(&item).is_err() {
                return Err(RecordError::Unreadable("a promise about a dead peer"));
            }
            if item.channel == election::CHANNEL && Vote::from_item(&item).is_err() {
                return Err(RecordError::Unreadable("a vote"));
            }
            stored.kept.push((item, *settled != 0));
        }
    }
    Ok(())
}

pub fn write(change: &Change, layout: &Layout) -> Write {
    match change {
        Change::InForce => Write { table: Table::Meta, key: IN_FORCE.into(), value: Some(Vec::new()) },
        Change::Seeds(seeds) => {
            Write { table: Table::Meta, key: SEEDS.into(), value: Some(seeds.to_string().into()) }
        }
        Change::Token(token) => {
            // Body and deed, as an item has them.
            let (body, signature) = (token.to_body(layout), token.signature.clone());
            let value = mesh::Item { body, signature, ..Default::default() }.encode_to_vec();
            Write { table: Table::Ring, key: layout.to_bytes(token.start), value: Some(value) }
        }
        Change::Member(name, incarnation) => {
            let key = [MEMBER, name.as_str().as_bytes()].concat();
            let value = incarnation.map(|incarnation| incarnation.0.to_be_bytes().into());
            Write { table: Table::Meta, key, value }
        }
        Change::Kept { item, settled } => {
            let key = [item.channel.as_bytes(), b"\0", &item.key].concat();
            let value = [vec![u8::from(*settled)], mesh::Item::from(item.clone()).encode_to_vec()].concat();
            Write { table: Table::Items, key, value: Some(value) }
        }
        Change::Allocation(address, allocation) => {
            let value = allocation.as_deref().map(encode);
            Write { table: Table::Allocations, key: key(*address), value }
        }
        Change::Resting(address, freed) => {
            let value = freed.map(|unix_ms| unix_ms.to_be_bytes().into());
            Write { table: Table::Resting, key: key(*address), value }
        }
    }
}

impl Stored {
    /// Takes a change in, for those who have no file to write it to and to [`load`] it from.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::InForce => self.in_force = true,
            Change::Seeds(_) => {}
            Change::Token(token) => _ = self.tokens.insert(token.start, token),
            Change::Member(name, incarnation) => match incarnation {
                Some(incarnation) => _ = self.members.insert(name, incarnation),
                None => _ = self.members.remove(&name),
            },
            Change::Kept { item, settled } => {
                let place = |item: &Item| (item.channel.clone(), item.key.clone());
                self.kept.retain(|(known, _)| place(known) != place(&item));
                self.kept.push((item, settled));
            }
            Change::Allocation(address, allocation) => {
                self.allocations.retain(|known| known.address != address);
                self.allocations.extend(allocation.map(|allocation| (*allocation).clone()));
            }
            Change::Resting(address, freed) => {
                self.resting.retain(|known| *known != address);
                self.resting.extend(freed.map(|_| address));
            }
        }
    }
}

/// JSON, because it takes new fields without a new format.
#[derive(Serialize, Deserialize)]
struct StoredAllocation {
    address: IpAddr,
    /// Container id and interface; absent for the bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attachment: Option<(String, String)>,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    mac: [u8; 6],
    reserved_at: u64,
}

fn encode(allocation: &Allocation) -> Vec<u8> {
    let attachment = match &allocation.owner {
        Owner::Bridge => None,
        Owner::Pod(key) => Some((key.container_id().into(), key.ifname().into())),
    };
    let PodRef { uid, namespace, name } = allocation.pod.clone();
    let stored = StoredAllocation {
        address: allocation.address,
        attachment,
        uid,
        namespace,
        name,
        mac: allocation.mac.0,
        reserved_at: allocation.reserved_at,
    };
    serde_json::to_vec(&stored).expect("strings and numbers are JSON")
}

fn decode(json: &[u8]) -> Option<Allocation> {
    let stored: StoredAllocation = serde_json::from_slice(json).ok()?;
    let owner = match stored.attachment {
        Some((id, ifname)) => Owner::Pod(AttachmentKey::new(&id, &ifname).ok()?),
        None => Owner::Bridge,
    };
    Some(Allocation {
        owner,
        address: stored.address,
        pod: PodRef { uid: stored.uid, namespace: stored.namespace, name: stored.name },
        mac: crate::types::Mac(stored.mac),
        reserved_at: stored.reserved_at,
    })
}

fn key(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

const IN_FORCE: &[u8] = b"ring in force";
const SEEDS: &[u8] = b"seeds";
/// Then its name.
const MEMBER: &[u8] = b"member ";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ipam::seed, types::Mac};
    use std::{path::Path, sync::Arc};

    fn store(dir: &Path) -> (Store, Layout) {
        let universe = "fd00:77::/64".parse().unwrap();
        let (store, _) = Store::open(dir, &"a".parse().unwrap(), &universe).unwrap();
        (store, Layout::new(universe))
    }

    fn death() -> Item {
        let (peer, taker) = ("b".parse().unwrap(), "a".parse().unwrap());
        let ranges = vec!["fd00:77::/80".parse().unwrap()];
        let death =
            Death { peer, incarnation: Incarnation(1), epoch: 1, taker, forced: false, ranges, known: 0 };
        death.to_item(Vec::new())
    }

    #[test]
    fn what_is_written_is_loaded() {
        let temp = tempfile::tempdir().unwrap();
        let (store, layout) = store(temp.path());
        assert_eq!(load(&store, &layout).unwrap(), Stored::default());
        assert_eq!(seeds(&store).unwrap(), None);
        let token = Token {
            start: 0,
            end: 255,
            owner: "a".parse().unwrap(),
            epoch: 1,
            hands: 3,
            version: 2,
            free: true,
            signature: vec![1, 2, 3],
        };
        let pod = Allocation {
            owner: Owner::Pod(AttachmentKey::new("c1", "eth0").unwrap()),
            address: layout.address(2),
            pod: PodRef { uid: "u".into(), namespace: "default".into(), name: "web".into() },
            mac: Mac([2, 0, 0, 0, 0, 1]),
            reserved_at: 1,
        };
        let bridge = Allocation {
            owner: Owner::Bridge,
            address: layout.address(1),
            pod: PodRef::default(),
            mac: Mac::default(),
            reserved_at: 0,
        };
        let death = death();
        let allocation = |a: &Allocation| Change::Allocation(a.address, Some(Arc::new(a.clone())));
        let changes = [
            Change::InForce,
            Change::Seeds(seed::seeds("b,a")),
            Change::Token(token.clone().into()),
            Change::Kept { item: death.clone(), settled: false },
            Change::Kept { item: death.clone(), settled: true },
            Change::Member("b".parse().unwrap(), Some(Incarnation(1))),
            Change::Member("c".parse().unwrap(), Some(Incarnation(2))),
            Change::Member("b".parse().unwrap(), Some(Incarnation(3))),
            Change::Member("c".parse().unwrap(), None),
            allocation(&pod),
            allocation(&bridge),
            Change::Resting(layout.address(3), Some(7)),
            Change::Resting(layout.address(4), Some(7)),
            Change::Resting(layout.address(4), None),
        ];
        let writes: Vec<Write> = changes.iter().map(|change| write(change, &layout)).collect();
        store.commit(&writes).unwrap();
        let expected = Stored {
            in_force: true,
            tokens: [(token.start, token.into())].into(),
            kept: vec![(death, true)],
            members: [("b".parse().unwrap(), Incarnation(3))].into(),
            allocations: vec![bridge, pod],
            resting: vec![layout.address(3)],
        };
        assert_eq!(load(&store, &layout).unwrap(), expected);
        let mut applied = Stored::default();
        changes.into_iter().for_each(|change| applied.apply(change));
        applied.allocations.sort_by_key(|allocation| allocation.address);
        assert_eq!(applied, expected);
        assert_eq!(seeds(&store).unwrap(), Some(seed::seeds("a,b")));
    }

    #[test]
    fn a_promise_or_a_vote_that_cannot_be_read_is_not_left_out() {
        let temp = tempfile::tempdir().unwrap();
        let (store, layout) = store(temp.path());
        let vote = Vote::default().to_item(&"a".parse().unwrap(), None);
        let unknown = Item { channel: "later".into(), ..Item::default() };
        let keep = |item: &Item| {
            let written = write(&Change::Kept { item: item.clone(), settled: true }, &layout);
            store.commit(std::slice::from_ref(&written)).unwrap();
            let loaded = load(&store, &layout).map(|stored| stored.kept.len());
            store.commit(&[Write { value: None, ..written }]).unwrap();
            loaded.map_err(|error| error.to_string())
        };
        for item in [death(), vote.clone(), unknown] {
            assert_eq!(keep(&item), Ok(1));
        }
        // As they were before they named ranges: one for each peer, with the epoch in the rank.
        let older = Item { key: b"b".into(), rank: [&[0; 8], &b"a"[..]].concat(), ..death() };
        let refused = keep(&older).unwrap_err();
        assert!(
            refused.starts_with("the state file holds a promise about a dead peer that this"),
            "{refused}"
        );
        assert!(refused.contains("left as it is: start the version that wrote it, or give"), "{refused}");
        assert!(keep(&Item { rank: Vec::new(), ..vote }).unwrap_err().contains("holds a vote that"));
    }
}
