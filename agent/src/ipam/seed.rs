//! The seed list: who shares the universe at the very beginning.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{InvalidPeerName, PeerName};
use std::{collections::BTreeSet, fmt, str::FromStr};

/// `--ipam-seed`: empty for a joiner, else the same names on every agent that has a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeedPlan {
    /// In order and once each.
    names: Vec<PeerName>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSeed {
    #[error("--ipam-seed: {0}")]
    Name(#[from] InvalidPeerName),
    #[error("--ipam-seed: `{0}` is named twice")]
    Twice(PeerName),
}

impl SeedPlan {
    pub fn names(&self) -> &[PeerName] {
        &self.names
    }
}

impl fmt::Display for SeedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names.iter().map(PeerName::as_str).collect();
        f.write_str(&names.join(","))
    }
}

impl FromIterator<PeerName> for SeedPlan {
    fn from_iter<I: IntoIterator<Item = PeerName>>(names: I) -> Self {
        let names: BTreeSet<_> = names.into_iter().collect();
        Self { names: names.into_iter().collect() }
    }
}

impl FromStr for SeedPlan {
    type Err = InvalidSeed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut names = BTreeSet::new();
        if !text.trim().is_empty() {
            for name in text.split(',') {
                let name: PeerName = name.trim().parse()?;
                if !names.insert(name.clone()) {
                    return Err(InvalidSeed::Twice(name));
                }
            }
        }
        Ok(Self { names: names.into_iter().collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_seeds_does_not_matter() {
        let plan: SeedPlan = "b, a,C".parse().unwrap();
        assert_eq!(plan.names().iter().map(PeerName::as_str).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(plan, "c,b,a".parse().unwrap());
        assert_eq!("".parse(), Ok(SeedPlan::default()));
    }

    #[test]
    fn a_seed_list_is_refused_with_the_name_in_question() {
        let refused = |text: &str| text.parse::<SeedPlan>().unwrap_err().to_string();
        assert!(refused("consensus=3").starts_with("--ipam-seed: `consensus=3` is not a node name"));
        assert_eq!(refused("a,b,A"), "--ipam-seed: `a` is named twice");
        assert!(refused("a,,b").contains("`` is not a node name"));
    }
}
