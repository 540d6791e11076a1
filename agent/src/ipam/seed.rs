//! The seed list: who shares the universe at the very beginning.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::PeerName;
use std::{collections::BTreeSet, fmt};

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
        assert_eq!(plan, seeds("c,b,a"));
        assert_eq!((plan.to_string().as_str(), seeds(&plan.to_string())), ("a,b,c", plan));
    }
}
