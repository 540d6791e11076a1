//! A peer's record, as gossip brings it.

use prost::Message;
use weft::mesh::{
    gossip::{Gossiper, Item},
    peers::{CHANNEL, PeerGossip, PeerRecord},
    wire,
};

/// The bytes are a record's; key and rank are made to agree with it.
pub fn run(bytes: &[u8]) {
    let Ok(body) = wire::PeerRecord::decode(bytes) else { return };
    let item = Item {
        channel: CHANNEL.into(),
        key: body.name.as_bytes().into(),
        rank: [body.incarnation.to_be_bytes(), body.version.to_be_bytes()].concat(),
        body: bytes.into(),
        signature: Vec::new(),
    };
    let Ok(record) = PeerRecord::from_item(&item) else { return };
    let mut gossip = PeerGossip(None);
    assert_eq!(gossip.check(&item), Ok(()));
    assert_eq!(gossip.is_farewell(&item), record.left);
    let again = PeerRecord::from_item(&record.to_item()).expect("what we say is what we take");
    let software = record.software.chars().take(64).collect();
    assert_eq!(again, PeerRecord { software, ..record });
}
