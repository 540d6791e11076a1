//! What the cluster's agents have agreed on, in a ConfigMap: who shares the universe at the start, and who has taken over
//! whose space.
//!
//! ```text
//!   data:
//!     seed: '{"nodes":["node-1"]}'
//!     takeovers: '[{"node":"node-3","uid":"…","epoch":1,"taker":"node-2"}]'
//! ```
//! It ships without data. Whoever wants to write says which version it has read: of two that write at once, one fails, reads
//! again, and finds that the other was first.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::Uid;
use crate::types::PeerName;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Board {
    /// Empty until somebody has been elected.
    pub seeds: Vec<PeerName>,
    /// In the order in which they were agreed on.
    pub takeovers: Vec<Takeover>,
}

/// The space of a node that is gone has a new owner, and nobody else may take it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Takeover {
    #[serde(with = "name")]
    pub node: PeerName,
    /// Of the Node that is gone: a later one of the same name is another.
    pub uid: Uid,
    /// Tokens of `node` below this epoch are meant; the taker's have it.
    pub epoch: u64,
    #[serde(with = "name")]
    pub taker: PeerName,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("key `{key}` of ConfigMap {map} cannot be read ({why}); restore it, or if no agent runs, remove it", map = super::CONFIG_MAP)]
pub struct Unreadable {
    key: &'static str,
    why: String,
}

pub type Data = BTreeMap<String, String>;

#[derive(Serialize, Deserialize)]
struct SeedJson {
    nodes: Vec<String>,
}

mod name {
    use crate::types::PeerName;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(name: &PeerName, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(name.as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PeerName, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Board {
    /// # Errors
    /// What is there is not ours to overwrite.
    pub fn read(data: &Data) -> Result<Self, Unreadable> {
        let seed: Option<SeedJson> = json(data, SEED)?;
        let seeds = seed.iter().flat_map(|seed| &seed.nodes).map(|name| parse(name, SEED));
        let takeovers: Option<Vec<Takeover>> = json(data, TAKEOVERS)?;
        Ok(Self { seeds: seeds.collect::<Result<_, _>>()?, takeovers: takeovers.unwrap_or_default() })
    }

    /// What the ConfigMap holds then; keys that we do not know stay as they are.
    pub fn write(&self, data: &mut Data) {
        let text = |json: serde_json::Result<String>| json.expect("strings and numbers are JSON");
        if !self.seeds.is_empty() {
            let nodes = self.seeds.iter().map(PeerName::to_string).collect();
            data.insert(SEED.into(), text(serde_json::to_string(&SeedJson { nodes })));
        }
        if !self.takeovers.is_empty() {
            data.insert(TAKEOVERS.into(), text(serde_json::to_string(&self.takeovers)));
        }
    }

    /// The board on which `seeds` share the universe; none where that is settled.
    pub fn elect(&self, seeds: &[PeerName]) -> Option<Self> {
        self.seeds.is_empty().then(|| Self { seeds: seeds.to_vec(), ..self.clone() })
    }

    /// The board on which `taker` has a gone node's space, and only takeovers that are still `needed` beside; none where
    /// somebody has it already. `least` is an epoch above all of the node's tokens.
    pub fn take_over(
        &self,
        node: &PeerName,
        uid: &Uid,
        taker: &PeerName,
        least: u64,
        needed: impl Fn(&Takeover) -> bool,
    ) -> Option<Self> {
        if self.takeovers.iter().any(|t| t.node == *node && t.uid == *uid) {
            return None;
        }
        let epoch = self.takeovers.iter().map(|t| t.epoch + 1).max().unwrap_or(1).max(least);
        let mut takeovers: Vec<_> = self.takeovers.iter().filter(|t| needed(t)).cloned().collect();
        takeovers.push(Takeover { node: node.clone(), uid: uid.clone(), epoch, taker: taker.clone() });
        Some(Self { takeovers, ..self.clone() })
    }
}

fn json<T: DeserializeOwned>(data: &Data, key: &'static str) -> Result<Option<T>, Unreadable> {
    let text = data.get(key).map(|text| text.trim()).filter(|text| !text.is_empty());
    let read = |text| serde_json::from_str(text).map_err(|e| Unreadable { key, why: e.to_string() });
    text.map(read).transpose()
}

fn parse(name: &str, key: &'static str) -> Result<PeerName, Unreadable> {
    name.parse().map_err(|error: crate::types::InvalidPeerName| Unreadable { key, why: error.to_string() })
}

const SEED: &str = "seed";
const TAKEOVERS: &str = "takeovers";

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> PeerName {
        name.parse().unwrap()
    }

    fn uid(uid: &str) -> Uid {
        Uid(uid.into())
    }

    #[test]
    fn the_first_is_elected_and_nobody_after() {
        for empty in [Data::new(), Data::from([("seed".into(), " ".into())])] {
            let board = Board::read(&empty).unwrap().elect(&[name("a")]).unwrap();
            let mut data = empty;
            board.write(&mut data);
            assert_eq!(data["seed"], r#"{"nodes":["a"]}"#);
            assert_eq!(Board::read(&data).unwrap(), board);
            assert_eq!(board.elect(&[name("b")]), None);
        }
    }

    #[test]
    fn a_gone_node_has_one_taker_and_each_takeover_its_epoch() {
        let all = |_: &Takeover| true;
        let board = Board::default().take_over(&name("c"), &uid("1"), &name("a"), 0, all).unwrap();
        assert_eq!(board.take_over(&name("c"), &uid("1"), &name("b"), 0, all), None);
        // It came back and is gone again.
        let board = board.take_over(&name("c"), &uid("2"), &name("b"), 0, all).unwrap();
        let board = board.take_over(&name("d"), &uid("3"), &name("b"), 9, all).unwrap();
        assert_eq!(board.takeovers.iter().map(|t| t.epoch).collect::<Vec<_>>(), [1, 2, 9]);
        let mut data = Data::from([("other".into(), "stays".into())]);
        board.write(&mut data);
        assert_eq!((data["other"].as_str(), Board::read(&data).unwrap()), ("stays", board.clone()));
        // What nothing refers to any more is dropped, and its epoch not used again.
        let board = board.take_over(&name("e"), &uid("4"), &name("b"), 0, |t| t.epoch == 2).unwrap();
        assert_eq!(board.takeovers.iter().map(|t| t.epoch).collect::<Vec<_>>(), [2, 10]);
    }

    #[test]
    fn what_cannot_be_read_is_not_overwritten() {
        let data = Data::from([("seed".into(), "node-1".into())]);
        let why = Board::read(&data).unwrap_err().to_string();
        assert!(why.starts_with("key `seed` of ConfigMap weft-seed cannot be read"), "{why}");
    }
}
