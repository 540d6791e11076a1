use super::Prefix;
use std::{fmt, net::IpAddr, str::FromStr};

/// The whole overlay range: a network prefix that can be split among nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Universe(Prefix);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUniverse {
    #[error("`{0}` is not a prefix; example: 10.32.0.0/12")]
    Syntax(String),
    #[error("`{given}` is not a network address; did you mean {network}?")]
    HostBits { given: Prefix, network: Prefix },
    #[error("`{0}` has no room for pods; the smallest universe is a /30, or a /126 for IPv6")]
    TooSmall(Prefix),
    #[error("`{0}` is not a range for pods: it holds multicast, loopback or unspecified addresses")]
    Reserved(Prefix),
}

impl Universe {
    pub fn prefix(&self) -> Prefix {
        self.0
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// Prefix length of the unit in which space is handed over: a `/24`, or a sixteenth of a small universe.
    /// For IPv6 a `/120`.
    pub fn block_len(&self) -> u8 {
        let full = self.0.max_prefix_len();
        (full - 8).max((self.0.prefix_len() + 4).min(full))
    }

    /// The least MTU that its IP version lets a link have, in bytes (RFC 791 as hosts count on it, RFC 8200 section 5).
    pub fn least_mtu(&self) -> u16 {
        match self.0 {
            Prefix::V4(_) => LEAST_MTU,
            Prefix::V6(_) => 1280,
        }
    }
}

impl FromStr for Universe {
    type Err = InvalidUniverse;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let prefix: Prefix = text.parse().map_err(|_| InvalidUniverse::Syntax(text.into()))?;
        let reserved = |ip: IpAddr| ip.is_multicast() || ip.is_loopback() || ip.is_unspecified();
        if prefix.addr() != prefix.network() {
            return Err(InvalidUniverse::HostBits { given: prefix, network: prefix.trunc() });
        }
        if prefix.prefix_len() > prefix.max_prefix_len() - 2 {
            return Err(InvalidUniverse::TooSmall(prefix));
        }
        if reserved(prefix.network()) || reserved(prefix.broadcast()) {
            return Err(InvalidUniverse::Reserved(prefix));
        }
        Ok(Self(prefix))
    }
}

impl fmt::Display for Universe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The least MTU that pods of any universe can have, in bytes.
pub const LEAST_MTU: u16 = 576;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_universe_that_exists_can_be_served() {
        assert_eq!("10.32.0.0/12".parse::<Universe>().unwrap().block_len(), 24);
        assert_eq!("10.32.0.0/29".parse::<Universe>().unwrap().block_len(), 32);
        assert_eq!("10.32.0.0/24".parse::<Universe>().unwrap().block_len(), 28);
        assert_eq!("fd00:77::/64".parse::<Universe>().unwrap().block_len(), 120);
        let host_bits = "10.32.0.1/12".parse::<Universe>().unwrap_err();
        assert_eq!(
            host_bits.to_string(),
            "`10.32.0.1/12` is not a network address; did you mean 10.32.0.0/12?"
        );
        for bad in ["", "10.32.0.0", "10.32.0.0/31", "224.0.0.0/8", "0.0.0.0/0", "127.0.0.0/8"] {
            assert!(bad.parse::<Universe>().is_err(), "{bad}");
        }
    }
}
