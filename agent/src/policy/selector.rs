//! Label selectors, as `k8s.io/apimachinery` reads them.
//!
//! All requirements must hold; without any everything matches. `NotIn` and `DoesNotExist` match what lacks the key.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

pub type Labels = BTreeMap<String, String>;

/// Two selectors that list the same requirements are equal, in whatever order they were written.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selector(BTreeSet<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Operator {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels))
    }

    #[cfg(test)]
    pub fn requirements(&self) -> impl Iterator<Item = &Requirement> {
        self.0.iter()
    }
}

impl FromIterator<Requirement> for Selector {
    fn from_iter<T: IntoIterator<Item = Requirement>>(requirements: T) -> Self {
        Self(requirements.into_iter().collect())
    }
}

impl Requirement {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> Labels {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.into(), value.into())).collect()
    }

    fn selector(key: &str, operator: Operator) -> Selector {
        [Requirement { key: key.into(), operator }].into_iter().collect()
    }

    #[test]
    fn an_empty_selector_matches_everything() {
        assert!(Selector::default().matches(&Labels::new()));
        assert!(Selector::default().matches(&labels("a=1")));
    }

    #[test]
    fn not_in_and_does_not_exist_match_what_lacks_the_key() {
        let one = BTreeSet::from(["1".to_string()]);
        assert!(selector("a", Operator::NotIn(one.clone())).matches(&labels("b=1")));
        assert!(selector("a", Operator::NotIn(one.clone())).matches(&labels("a=2")));
        assert!(!selector("a", Operator::NotIn(one)).matches(&labels("a=1")));
        assert!(selector("a", Operator::DoesNotExist).matches(&labels("b=1")));
        assert!(!selector("a", Operator::DoesNotExist).matches(&labels("a=")));
    }

    #[test]
    fn an_empty_value_needs_the_key() {
        let empty = selector("a", Operator::In([String::new()].into()));
        assert!(empty.matches(&labels("a=")));
        assert!(!empty.matches(&labels("b=1")));
        assert!(!empty.matches(&labels("a=1")));
        assert!(selector("a", Operator::Exists).matches(&labels("a=")));
    }

    #[test]
    fn all_requirements_must_hold() {
        let one = Requirement { key: "a".into(), operator: Operator::In(["1".into()].into()) };
        let two = Requirement { key: "b".into(), operator: Operator::Exists };
        let both: Selector = [one.clone(), two.clone()].into_iter().collect();
        assert!(both.matches(&labels("a=1,b=")));
        assert!(!both.matches(&labels("a=1")));
        assert_eq!(both, [two, one].into_iter().collect());
    }
}
