//! The election of those who share the universe at the start (`--ipam-seed consensus=N`): Paxos for one decision.
//!
//! ```text
//!   every voter says one thing, its vote, ever newer:   promised ballot │ accepted ballot, names
//!     promised to b by N/2+1 ──b's proposer──▶ accepts: names of the latest accepted, or of all who vote
//!     accepted b by N/2+1 ──anybody who has heard──▶ decided, for good
//! ```
//! Votes are gossiped instead of sent (Lamport, "Paxos Made Simple", 2001): whoever hears a vote has its sender's promise
//! and acceptance at once, so a lost message costs nothing. A vote is on disk before it is said. Never more than N nodes may
//! vote, or two halves of them could decide two things.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{
    identity::{BadSeal, Checker, Sealer},
    mesh::gossip::{Gossiper, Item, Rejected},
    types::PeerName,
};
use prost::Message;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use weft_proto::mesh;

/// Orders proposals: by round, then by who proposes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ballot {
    pub round: u64,
    pub proposer: PeerName,
}

/// What one voter has promised and accepted so far; both only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Vote {
    pub promised: Option<Ballot>,
    pub accepted: Option<(Ballot, Vec<PeerName>)>,
    /// What it has seen to be decided; empty: nothing so far. For those who do not vote, and come to know of it by that.
    pub decided: Vec<PeerName>,
}

/// The election as one voter sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Election {
    me: PeerName,
    quorum: usize,
    most: usize,
    votes: BTreeMap<PeerName, Vote>,
}

/// When to propose: the first of the voters that are known after a moment without news, the others after it in turn.
#[derive(Debug, Default)]
pub struct Patience {
    until: Option<Instant>,
}

impl Election {
    /// Among `voters` nodes, of whom at most `most` can share the universe; with this node's vote from before.
    pub fn new(me: PeerName, voters: usize, most: usize, vote: Vote) -> Self {
        let votes = BTreeMap::from([(me.clone(), vote)]);
        Self { me, quorum: voters / 2 + 1, most, votes }
    }

    /// Takes in what a voter has said; true if that was news. Then call [`Election::think`].
    pub fn hear(&mut self, name: &PeerName, vote: Vote) -> bool {
        if *name == self.me {
            return false;
        }
        let known = self.votes.get(name).cloned();
        let held = self.votes.entry(name.clone()).or_default();
        let accepted = |vote: &Vote| vote.accepted.as_ref().map(|(ballot, _)| ballot.clone());
        if accepted(&vote) > accepted(held) {
            held.accepted = vote.accepted;
        }
        held.promised = held.promised.take().max(vote.promised);
        if held.decided.is_empty() {
            held.decided = vote.decided;
        }
        known.as_ref() != Some(held)
    }

    /// Begins a proposal beyond all that have been heard of.
    pub fn propose(&mut self) {
        let round = self.votes.values().filter_map(|vote| Some(vote.promised.as_ref()?.round)).max();
        let round = round.unwrap_or(0) + 1;
        let promised = Some(Ballot { round, proposer: self.me.clone() });
        self.own_mut().promised = promised;
        self.think();
    }

    /// Promises and accepts what is to be; true if this node's vote is another now.
    pub fn think(&mut self) -> bool {
        let before = self.own().clone();
        let promised = self.votes.values().filter_map(|vote| vote.promised.clone()).max();
        self.own_mut().promised = promised.clone();
        if let Some(ballot) = promised {
            let said = |vote: &&Vote| vote.accepted.as_ref().is_some_and(|(accepted, _)| *accepted == ballot);
            let proposed = self.votes.values().find(said).and_then(|vote| vote.accepted.clone());
            let names = match proposed {
                Some((_, names)) => Some(names),
                None if ballot.proposer == self.me => self.names_for(&ballot),
                None => None,
            };
            if let Some(names) = names {
                self.own_mut().accepted = Some((ballot, names));
            }
        }
        *self.own() != before
    }

    /// Who shares the universe, once that is certain.
    pub fn decided(&self) -> Option<&[PeerName]> {
        if let Some(vote) = self.votes.values().find(|vote| !vote.decided.is_empty()) {
            return Some(&vote.decided);
        }
        let mut counts: BTreeMap<&Ballot, (usize, &[PeerName])> = BTreeMap::new();
        for (ballot, names) in self.votes.values().filter_map(|vote| vote.accepted.as_ref()) {
            counts.entry(ballot).or_insert((0, names)).0 += 1;
        }
        counts.into_values().find(|(count, _)| *count >= self.quorum).map(|(_, names)| names)
    }

    /// This node says what is decided.
    pub fn declare(&mut self, names: &[PeerName]) {
        self.own_mut().decided = names.into();
    }

    /// This node's vote, to be written down and said.
    pub fn own(&self) -> &Vote {
        &self.votes[&self.me]
    }

    /// Voters that are known, and how many it takes.
    pub fn turnout(&self) -> (usize, usize) {
        (self.votes.len(), self.quorum)
    }

    /// How many voters come before this one.
    fn turn(&self) -> u32 {
        self.votes.range(..self.me.clone()).count() as u32
    }

    fn own_mut(&mut self) -> &mut Vote {
        self.votes.get_mut(&self.me).expect("this node votes")
    }

    /// What the proposer of a ballot proposes, once enough have promised: what may have been decided already, or all voters.
    fn names_for(&self, ballot: &Ballot) -> Option<Vec<PeerName>> {
        let promised: Vec<&Vote> =
            self.votes.values().filter(|vote| vote.promised.as_ref() == Some(ballot)).collect();
        if promised.len() < self.quorum {
            return None;
        }
        let latest = promised.iter().filter_map(|vote| vote.accepted.as_ref()).max_by_key(|(b, _)| b.clone());
        let voters = || self.votes.keys().take(self.most).cloned().collect();
        Some(latest.map_or_else(voters, |(_, names)| names.clone()))
    }
}

impl Patience {
    /// There is news: waits again. Others that would propose are given the time to get through.
    pub fn renew(&mut self, election: &Election, now: Instant) {
        self.until = Some(now + PATIENCE * (1 + election.turn()));
    }

    /// Whether it is this node's turn to propose, should enough vote.
    pub fn is_over(&mut self, election: &Election, now: Instant) -> bool {
        let over = self.until.is_none_or(|until| until <= now);
        if over {
            self.renew(election, now);
        }
        let (voters, quorum) = election.turnout();
        over && voters >= quorum
    }

    pub fn next_wake(&self) -> Option<Instant> {
        self.until
    }
}

impl Vote {
    /// As it is gossiped, by whom, sealed by it.
    pub fn to_item(&self, voter: &PeerName, sealer: Option<&Sealer>) -> Item {
        let ballot =
            |ballot: &Ballot| mesh::Ballot { round: ballot.round, proposer: ballot.proposer.to_string() };
        let (accepted, names) =
            self.accepted.as_ref().map(|(b, names)| (ballot(b), names.as_slice())).unzip();
        let body = mesh::Vote {
            voter: voter.to_string(),
            promised: self.promised.as_ref().map(ballot),
            accepted,
            names: names.unwrap_or_default().iter().map(PeerName::to_string).collect(),
            decided: self.decided.iter().map(PeerName::to_string).collect(),
        };
        let body = body.encode_to_vec();
        let signature = sealer.map(|sealer| sealer.seal(SEALED, &body).encode_to_vec()).unwrap_or_default();
        Item { channel: CHANNEL.into(), key: voter.as_str().into(), rank: self.rank(), body, signature }
    }

    /// # Errors
    /// The body does not decode, or key and rank do not agree with it.
    pub fn from_item(item: &Item) -> Result<(PeerName, Self), Rejected> {
        let undecodable = |_| Rejected::Undecodable;
        let mesh::Vote { voter, promised, accepted, names, decided } =
            mesh::Vote::decode(item.body.as_slice()).map_err(|_| Rejected::Undecodable)?;
        let ballot = |ballot: mesh::Ballot| -> Result<Ballot, Rejected> {
            Ok(Ballot { round: ballot.round, proposer: ballot.proposer.parse().map_err(undecodable)? })
        };
        let voter: PeerName = voter.parse().map_err(undecodable)?;
        let parse =
            |names: Vec<String>| names.iter().map(|name| name.parse()).collect::<Result<Vec<PeerName>, _>>();
        let (names, decided) = (parse(names).map_err(undecodable)?, parse(decided).map_err(undecodable)?);
        let vote = Self {
            promised: promised.map(ballot).transpose()?,
            accepted: accepted.map(ballot).transpose()?.map(|ballot| (ballot, names.clone())),
            decided,
        };
        let listed =
            |names: &[PeerName]| names.len() <= MOST_NAMES && names.windows(2).all(|pair| pair[0] < pair[1]);
        let sound = listed(&names) && listed(&vote.decided) && vote.accepted.is_some() != names.is_empty();
        let within = vote.promised.as_ref().is_none_or(|ballot| ballot.round <= MAX_ROUND);
        if !sound || !within || item.key != voter.as_str().as_bytes() || item.rank != vote.rank() {
            return Err(Rejected::Disagrees);
        }
        Ok((voter, vote))
    }

    /// Grows with each change: promises do, and so do acceptances.
    fn rank(&self) -> Vec<u8> {
        let part = |ballot: Option<&Ballot>| {
            let mut bytes = ballot.map_or(0, |ballot| ballot.round).to_be_bytes().to_vec();
            bytes.extend(ballot.map_or("", |ballot| ballot.proposer.as_str()).bytes());
            bytes.push(0);
            bytes
        };
        let accepted = self.accepted.as_ref().map(|(ballot, _)| ballot);
        [part(self.promised.as_ref()), part(accepted), vec![u8::from(!self.decided.is_empty())]].concat()
    }
}

/// Lets the mesh refuse what is no vote of who seems to cast it.
#[derive(Debug)]
pub struct VoteGossip(pub Option<Checker>);

impl Gossiper for VoteGossip {
    fn channel(&self) -> &'static str {
        CHANNEL
    }

    fn check(&mut self, item: &Item) -> Result<(), Rejected> {
        let (voter, _) = Vote::from_item(item)?;
        let Some(checker) = &mut self.0 else { return Ok(()) };
        let seal = mesh::Seal::decode(item.signature.as_slice()).map_err(|_| BadSeal::Unreadable)?;
        let signer = checker.signer(SEALED, &item.body, &seal)?;
        let is_voter = signer.is(&voter) && seal.encoded_len() == item.signature.len();
        is_voter.then_some(()).ok_or(Rejected::Forged("its seal is another peer's"))
    }
}

/// The channel of votes.
pub const CHANNEL: &str = "votes";
/// Of how many nodes a majority can be asked for.
pub const MOST_NAMES: usize = 128;
/// What a vote is to who seals it.
const SEALED: &str = "vote";
/// Rounds beyond are forged: nobody could propose any more.
const MAX_ROUND: u64 = u64::MAX / 2;
/// Without news for so long, the next voter proposes. Several round trips of gossip.
const PATIENCE: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn name(n: usize) -> PeerName {
        format!("n{n}").parse().unwrap()
    }

    fn elections(voters: usize) -> Vec<Election> {
        (0..voters).map(|n| Election::new(name(n), voters, 64, Vote::default())).collect()
    }

    fn hear(all: &mut [Election], from: usize, to: usize) {
        let vote = all[from].own().clone();
        let from = name(from);
        all[to].hear(&from, vote);
        all[to].think();
    }

    fn all_hear_all(all: &mut [Election]) {
        for _ in 0..4 {
            for from in 0..all.len() {
                (0..all.len()).for_each(|to| hear(all, from, to));
            }
        }
    }

    #[test]
    fn one_alone_elects_itself() {
        let mut all = elections(1);
        all[0].propose();
        assert_eq!(all[0].decided(), Some(&[name(0)][..]));
    }

    #[test]
    fn a_majority_decides_without_the_rest_and_the_rest_follows() {
        let mut all = elections(5);
        for from in 0..3 {
            (0..3).for_each(|to| hear(&mut all, from, to));
        }
        all[1].propose();
        all_hear_all(&mut all[..3]);
        let decided = all[0].decided().unwrap().to_vec();
        assert_eq!(decided, [name(0), name(1), name(2)]);
        all[4].propose();
        all_hear_all(&mut all);
        assert!(all.iter().all(|one| one.decided() == Some(&decided)));
    }

    #[test]
    fn too_few_decide_nothing() {
        let mut all = elections(4);
        all[0].propose();
        all_hear_all(&mut all[..2]);
        assert_eq!(all[0].decided(), None);
    }

    proptest! {
        #[test]
        fn nobody_ever_decides_otherwise(
            steps in vec((0..5usize, 0..5usize, 0..12u8), 0..300),
        ) {
            let mut all = elections(5);
            let mut decided: Option<Vec<PeerName>> = None;
            for (from, to, what) in steps {
                match what {
                    0 => all[from].propose(),
                    // It comes back with its vote, and nothing else.
                    1 => all[from] = Election::new(name(from), 5, 64, all[from].own().clone()),
                    _ => hear(&mut all, from, to),
                }
                for one in &all {
                    if let Some(names) = one.decided() {
                        let first = decided.get_or_insert_with(|| names.to_vec());
                        prop_assert_eq!(first.as_slice(), names);
                    }
                }
            }
        }

        #[test]
        fn a_vote_reads_back_and_newer_ones_rank_higher(a in 0..3u64, b in 0..3u64, accepts: bool) {
            let ballot = |round| Ballot { round, proposer: name(1) };
            let vote = |promised: u64, accepted: u64| Vote {
                promised: (promised > 0).then(|| ballot(promised)),
                accepted: (accepts && accepted > 0).then(|| (ballot(accepted), vec![name(0), name(1)])),
                decided: Vec::new(),
            };
            let (older, newer) = (vote(a, a.min(b)), vote(a + 1, a.min(b)));
            let item = older.to_item(&name(3), None);
            prop_assert_eq!(Vote::from_item(&item), Ok((name(3), older)));
            prop_assert!(newer.to_item(&name(3), None).beats(&item));
        }

        #[test]
        fn any_bytes_are_read_or_refused(body in vec(any::<u8>(), 0..64)) {
            let _ = Vote::from_item(&Item { body, ..Item::default() });
        }
    }
}
