use std::{fmt, str::FromStr, sync::Arc};

/// A peer's name: its node's name, 1 to 253 characters as Kubernetes and DNS have them, compared in lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerName(Arc<str>);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a node name: 1 to 253 letters, digits, `-`, `.` or `_`, beginning and ending with a letter or digit"
)]
pub struct InvalidPeerName(String);

impl PeerName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerName {
    type Err = InvalidPeerName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let valid = text.len() <= 253
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
            && alphanumeric(text.chars().next())
            && alphanumeric(text.chars().last());
        if !valid {
            return Err(InvalidPeerName(text.chars().take(300).collect()));
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_a_node_may_be_called() {
        assert_eq!("Node-1.example".parse::<PeerName>().unwrap().as_str(), "node-1.example");
        for bad in ["", "-a", "a-", "a b", "a/b", &"x".repeat(254)] {
            assert!(bad.parse::<PeerName>().is_err(), "{bad}");
        }
    }
}
