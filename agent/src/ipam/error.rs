//! Why there is no address.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::{AttachmentKey, PeerName, Prefix, Universe};
use std::{fmt, net::IpAddr};

/// What an agent without space waits for. Addresses are likely soon: the caller should try again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitingFor {
    /// Nothing is handed out before a peer has told what it knows: this node may have given away its space before it
    /// lost its state.
    FirstContact,
    /// After a restart: others may have declared this node dead.
    Return { peers: Vec<PeerName> },
    /// No peer heard so far knows who owns anything.
    Seed,
    /// Nobody knows yet who shares the universe.
    Votes { voters: usize, quorum: usize },
    /// It only observes.
    Nothing,
    /// Asked for space.
    Space { from: PeerName },
    /// Somebody else says who owns what, and has given this node nothing yet.
    Assignment,
    /// All who could give space cannot be reached.
    Unreachable { owners: Vec<PeerName> },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("this node has no address to hand out yet: waiting for {0}")]
    NotReady(WaitingFor),
    #[error("{universe} is full: {}; remove pods, or take nodes away with `weft reset` on them", Shares { shares, resting: *resting })]
    Full {
        universe: Universe,
        /// Addresses by owner.
        shares: Vec<(PeerName, u128)>,
        /// Addresses of this node that were freed a moment ago and can be used again soon.
        resting: u128,
    },
    #[error("{address} was asked for, but {universe} (--universe) does not hold it")]
    OutsideUniverse { address: IpAddr, universe: Universe },
    #[error("{address} was asked for, but no pod can have the first or last address of {universe}")]
    Reserved { address: IpAddr, universe: Universe },
    #[error("{address} was asked for, but {} owns it; ask there, or for another address", Owned(owner))]
    NotOurs { address: IpAddr, owner: Option<PeerName> },
    #[error("{address} was asked for, but it is in use by {by}")]
    InUse { address: IpAddr, by: String },
    #[error("{0} has one family of addresses; only one address can be asked for")]
    TooManyWanted(Universe),
    #[error("{key} has {has} already, but another address was asked for; delete the attachment first")]
    HasAnother { key: AttachmentKey, has: IpAddr },
    #[error("no free address of this node ({}) lies in the ranges asked for: {}", List(own), List(ranges))]
    OutOfRanges { ranges: Vec<Prefix>, own: Vec<Prefix> },
    #[error("{address} was asked for, but it does not lie in the ranges asked for: {}", List(ranges))]
    Contradiction { address: IpAddr, ranges: Vec<Prefix> },
    #[error("{0} pods of this node have addresses: remove them first, or insist with --force")]
    PodsLeft(usize),
    #[error("this node has handed its addresses over and leaves")]
    Left,
    #[error("cannot write the state file: {0}")]
    Store(String),
    #[error("the agent is stopping")]
    Stopped,
}

impl fmt::Display for WaitingFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstContact => write!(f, "first contact with a peer (--peer)"),
            Self::Return { peers } => write!(
                f,
                "first contact after a restart with one of {}: they may have taken this node for dead (`weft forget` those \
                 that are dead themselves)",
                List(peers)
            ),
            Self::Seed => write!(f, "a peer that was given --ipam-seed"),
            Self::Votes { voters, quorum } => write!(
                f,
                "the election of those who share the universe (--ipam-seed consensus): {voters} nodes vote, it takes {quorum}"
            ),
            Self::Nothing => write!(f, "another --ipam-seed than `observer`: this node never has addresses"),
            Self::Assignment => write!(f, "the cluster, to give this Node a podCIDR inside --universe"),
            Self::Space { from } => write!(f, "space from {from}"),
            Self::Unreachable { owners } => {
                write!(f, "an unreachable node with free space: {}", List(owners))
            }
        }
    }
}

struct Shares<'a> {
    shares: &'a [(PeerName, u128)],
    resting: u128,
}

impl fmt::Display for Shares<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> =
            self.shares.iter().map(|(name, size)| format!("{name} owns {size}")).collect();
        write!(f, "{} addresses", List(&texts))?;
        match self.resting {
            0 => Ok(()),
            resting => write!(f, " ({resting} freed here can be used again in up to 30 s)"),
        }
    }
}

struct Owned<'a>(&'a Option<PeerName>);

impl fmt::Display for Owned<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or("nobody that is known", PeerName::as_str).fmt(f)
    }
}

/// Comma-separated, cut where it would fill the screen.
struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, value) in self.0.iter().take(LISTED).enumerate() {
            write!(f, "{}{value}", if n == 0 { "" } else { ", " })?;
        }
        match self.0.len() {
            0 => write!(f, "none"),
            n if n > LISTED => write!(f, " and {} more", n - LISTED),
            _ => Ok(()),
        }
    }
}

const LISTED: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_universe_says_who_owns_what() {
        let full = |nodes: u32, resting| {
            let shares = (0..nodes).map(|n| (format!("n{n}").parse().unwrap(), 4)).collect();
            IpamError::Full { universe: "10.32.0.0/29".parse().unwrap(), shares, resting }.to_string()
        };
        assert_eq!(
            full(2, 0),
            "10.32.0.0/29 is full: n0 owns 4, n1 owns 4 addresses; remove pods, or take nodes away with `weft reset` on them"
        );
        assert!(full(9, 1).contains("n7 owns 4 and 1 more addresses (1 freed here can be used again"));
    }
}
