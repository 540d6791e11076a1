//! The seed list: who shares the universe at the very beginning.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::PeerName;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

/// `--ipam-seed`: empty for a joiner, else the same names on every agent that has a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeedPlan {
    /// In order and once each.
    names: Vec<PeerName>,
}

impl SeedPlan {
    pub fn names(&self) -> &[PeerName] {
        &self.names
    }

    /// SHA-256 of the sorted names, which peers compare in their hello; empty without a list.
    pub fn hash(&self) -> Vec<u8> {
        if self.names.is_empty() {
            return Vec::new();
        }
        let mut hash = Sha256::new();
        for name in &self.names {
            hash.update(name.as_str());
            hash.update([b'\n']);
        }
        hash.finalize().to_vec()
    }
}

impl FromIterator<PeerName> for SeedPlan {
    fn from_iter<I: IntoIterator<Item = PeerName>>(names: I) -> Self {
        let names: BTreeSet<_> = names.into_iter().collect();
        Self { names: names.into_iter().collect() }
    }
}

/// A plan of names with commas between.
#[cfg(test)]
pub(super) fn seeds(names: &str) -> SeedPlan {
    names.split_terminator(',').map(|name| name.parse().unwrap()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_seeds_does_not_matter() {
        let plan = seeds("b,a,C");
        assert_eq!(plan.names().iter().map(PeerName::as_str).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(plan.hash(), seeds("c,b,a").hash());
        assert_ne!(plan.hash(), seeds("ab,c").hash());
        assert_eq!(seeds("").hash(), Vec::<u8>::new());
    }
}
