//! The ring: tokens that say who owns which addresses; it is the routing table too.
//!
//! ```text
//!   10.32.0.0 ──a──▶ 10.36.0.0 ──b──▶ 10.40.0.0 ──a──▶ 10.47.255.255
//!   a gives its upper half to c:
//!   10.32.0.0 ──a──▶ 10.34.0.0 ──c──▶ 10.36.0.0 ──b──▶ ...
//! ```
//!
//! It is a map from start to token in which the greater token wins, so merging is commutative, associative and
//! idempotent (Shapiro et al., 2011, §3.1). An address is whose token wins among those that reach over it: the one that
//! has been handed over more often, then the newer. Why no address has two owners:
//!
//! * only a token's owner changes it, and each change raises its version: a token's history is one line;
//! * only an owner inserts tokens, inside its own range, and shrinks the range's `end` with it: whoever is handed a
//!   token later is handed no more than that, also if it has not heard of the splits before;
//! * a hand-over raises `hands`: nothing that an owner of before says, or said, wins over what its heir says;
//! * tokens are never removed, and an agent writes down what it changed before anybody else learns of it.
//!
//! That all this is so, and not only claimed, is what deeds show (`deed.rs`).
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Assigned, deed,
    span::{Layout, Span, coalesce},
    token::Token,
};
use crate::{
    identity::Sealer,
    types::{PeerName, Prefix},
};
use std::{
    cell::OnceCell,
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, BinaryHeap, btree_map::Entry},
    sync::Arc,
};
use tracing::warn;

#[derive(Clone, Debug)]
pub struct Ring {
    layout: Layout,
    /// Without it, tokens have no deeds.
    sealer: Option<Sealer>,
    tokens: Tokens,
    /// Whose token wins where; made when it is asked for.
    resolved: OnceCell<Vec<(Span, Arc<Token>)>>,
}

type Tokens = BTreeMap<u128, Arc<Token>>;

/// What somebody owns in a ring.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Owned {
    /// Each with the start of the token that wins there.
    ranges: Vec<(Span, u128)>,
    /// Of all its tokens, also where others win over them.
    reach: Vec<Span>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--ipam-seed names {seeds} nodes, but --universe {universe} has only {blocks} blocks to share out")]
pub struct TooManySeeds {
    universe: crate::types::Universe,
    seeds: usize,
    blocks: u128,
}

impl Owned {
    pub fn spans(&self) -> Vec<Span> {
        coalesce(self.ranges.iter().map(|(span, _)| *span))
    }

    /// Whether it may be another after others' tokens have changed there.
    pub fn is_touched(&self, there: Span) -> bool {
        self.reach.iter().any(|span| span.intersect(there).is_some())
    }
}

impl Ring {
    pub fn new(layout: Layout, sealer: Option<Sealer>) -> Self {
        Self { layout, sealer, tokens: BTreeMap::new(), resolved: OnceCell::new() }
    }

    /// The first tokens, the same on every agent with the same seeds (in order, once each): equal shares of whole
    /// blocks in aligned pieces, the blocks that are left over one each to the first.
    pub fn genesis(layout: Layout, seeds: &[PeerName]) -> Result<Vec<Token>, TooManySeeds> {
        let (unit, blocks) = (layout.unit(), layout.whole().last / layout.unit() + 1);
        if seeds.len() as u128 > blocks {
            return Err(TooManySeeds { universe: layout.universe(), seeds: seeds.len(), blocks });
        }
        let mut tokens = Vec::new();
        let mut deal = |block: u128, count: u128, owner: &PeerName| {
            let (start, end) = (block * unit, (block + count) * unit - 1);
            let (owner, signature) = (owner.clone(), Vec::new());
            tokens.push(Token { start, end, owner, epoch: 0, hands: 0, version: 0, free: true, signature });
        };
        // Round after round everybody gets the greatest power of two that is there for all: so pieces stay aligned.
        let mut next = 0;
        while next < blocks && !seeds.is_empty() {
            let share = (blocks - next) / seeds.len() as u128;
            let piece = 1 << share.checked_ilog2().unwrap_or(0);
            for owner in seeds.iter().take((blocks - next).min(seeds.len() as u128) as usize) {
                deal(next, piece, owner);
                next += piece;
            }
        }
        Ok(tokens)
    }

    /// The ring of ranges that somebody else has given out; what lies outside the universe is left out.
    pub fn assigned(layout: Layout, ranges: &Assigned) -> Self {
        let mut ring = Self::new(layout, None);
        for (owner, prefix) in ranges {
            let Some(Span { first: start, last: end }) = layout.span(*prefix) else { continue };
            let (owner, signature) = (owner.clone(), Vec::new());
            ring.merge(Token { start, end, owner, epoch: 0, hands: 0, version: 0, free: false, signature });
        }
        ring
    }

    /// Takes a token in where it wins over the one known with its start; then tells where that may change who owns what.
    pub fn merge(&mut self, token: impl Into<Arc<Token>>) -> Option<Span> {
        let token = token.into();
        let mut touched = token.span();
        match self.tokens.entry(token.start) {
            Entry::Vacant(entry) => _ = entry.insert(token),
            Entry::Occupied(entry) if token.cmp_rank(entry.get()) != Ordering::Greater => return None,
            Entry::Occupied(mut entry) => {
                touched.last = touched.last.max(entry.get().end);
                entry.insert(token);
            }
        }
        self.resolved.take();
        Some(touched)
    }

    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.values().map(|token| &**token)
    }

    pub fn sealer(&self) -> Option<&Sealer> {
        self.sealer.as_ref()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The ranges in ascending order, with the token that wins in each; one token may win in several.
    pub fn ranges(&self) -> impl Iterator<Item = (Span, &Token)> {
        self.resolved().iter().map(|(span, token)| (*span, &**token))
    }

    /// Who owns an address, by its offset; nobody where this ring has not heard of anybody.
    pub fn owner(&self, offset: u128) -> Option<&PeerName> {
        let resolved = self.resolved();
        let at = resolved.partition_point(|(span, _)| span.last < offset);
        let (_, token) = resolved.get(at).filter(|(span, _)| span.contains(offset))?;
        Some(&token.owner)
    }

    /// The ranges, or parts of them, that lie in a span; less than the span where this ring has not heard of anybody.
    pub fn within(&self, span: Span) -> impl Iterator<Item = (Span, &Token)> {
        let resolved = self.resolved();
        let at = resolved.partition_point(|(range, _)| range.last < span.first);
        resolved[at..].iter().map_while(move |(range, token)| Some((range.intersect(span)?, &**token)))
    }

    fn resolved(&self) -> &[(Span, Arc<Token>)] {
        self.resolved.get_or_init(|| resolve(&self.tokens))
    }

    pub fn owned_by(&self, name: &PeerName) -> Vec<Span> {
        self.owned(name).spans()
    }

    pub fn owned(&self, name: &PeerName) -> Owned {
        let its = |token: &Token| token.owner == *name;
        let ranges = self.ranges().filter(|(_, token)| its(token)).map(|(span, token)| (span, token.start));
        Owned {
            ranges: ranges.collect(),
            reach: self.tokens().filter(|token| its(token)).map(Token::span).collect(),
        }
    }

    /// The routing table: every known range as prefixes, neighbouring ranges of one owner joined.
    pub fn routes(&self) -> Vec<(Prefix, PeerName)> {
        let mut joined: Vec<(Span, &PeerName)> = Vec::new();
        for (span, token) in self.ranges() {
            match joined.last_mut() {
                Some((last, owner)) if *owner == &token.owner && last.last + 1 == span.first => {
                    last.last = span.last;
                }
                _ => joined.push((span, &token.owner)),
            }
        }
        let prefixes = |(span, owner): (Span, &PeerName)| {
            let owner = owner.clone();
            self.layout.prefixes(span).map(move |prefix| (prefix, owner.clone()))
        };
        joined.into_iter().flat_map(prefixes).collect()
    }

    /// Addresses by owner; with `only_free`, those under tokens whose owner has blocks to give away.
    pub fn shares(&self, only_free: bool) -> BTreeMap<&PeerName, u128> {
        let mut shares = BTreeMap::new();
        for (span, token) in self.ranges().filter(|(_, token)| token.free || !only_free) {
            *shares.entry(&token.owner).or_default() += span.size();
        }
        shares
    }

    /// Hands what `from`, this node, owns of `span` to `to`; what lies outside its ranges stays as it is, and so does what has
    /// been handed over too often. Returns the changed tokens.
    pub fn give(&mut self, from: &PeerName, span: Span, to: &PeerName) -> Vec<Token> {
        let mut changed = Vec::new();
        for (range, token) in self.ranges().filter(|(_, token)| token.owner == *from) {
            let Some(given) = range.intersect(span) else { continue };
            let kept = |start, end| Token { start, end, version: token.version + 1, ..token.clone() };
            let heir = Token {
                start: given.first,
                end: given.last,
                owner: to.clone(),
                hands: token.hands + 1,
                version: 0,
                free: true,
                ..token.clone()
            };
            let before = (range.first < given.first).then(|| kept(range.first, given.first - 1));
            let after = (given.last < range.last).then(|| kept(given.last + 1, range.last));
            let pieces = before.into_iter().chain([heir]).chain(after);
            let sealed: Option<Vec<Token>> = pieces.map(|piece| self.seal(piece, token)).collect();
            match sealed {
                Some(pieces) => changed.extend(pieces),
                None => warn!(peer = %to, "a range stays here: its deed has no room for another owner"),
            }
        }
        self.replace(&changed);
        changed
    }

    /// Takes over what `from`, who is gone, has of `within` below an epoch; `to` is this node. Returns the new tokens; done
    /// again, it changes nothing.
    pub fn take_over(&mut self, from: &PeerName, within: &[Span], epoch: u64, to: &PeerName) -> Vec<Token> {
        let of_gone = |(_, token): &(Span, &Token)| token.owner == *from && token.epoch < epoch;
        let heir = |(range, token): (Span, &Token)| {
            let heir = Token {
                start: range.first,
                end: range.last,
                owner: to.clone(),
                epoch,
                hands: token.hands + 1,
                version: 0,
                free: true,
                signature: Vec::new(),
            };
            let sealed = self.seal(heir, token);
            if sealed.is_none() {
                warn!(peer = %from, "a range stays with who is gone: its deed has no room for another owner");
            }
            sealed
        };
        let ranges = within.iter().flat_map(|span| self.within(*span)).filter(of_gone);
        let changed: Vec<Token> = ranges.filter_map(heir).collect();
        self.replace(&changed);
        changed
    }

    /// The takeovers that tokens and their deeds refer to, by epoch.
    pub fn epochs(&self) -> BTreeSet<u64> {
        self.tokens.values().flat_map(|token| deed::epochs(token, &self.layout)).collect()
    }

    /// Sets the flag of each token of what this node owns by `free(range)`, and takes over what was handed to it: a range is
    /// its own beyond doubt once it has sealed the token itself. Returns the changed tokens.
    pub fn flag(&mut self, owned: &Owned, mut free: impl FnMut(Span) -> bool) -> Vec<Token> {
        let mut flags: BTreeMap<u128, bool> = BTreeMap::new();
        for (range, start) in &owned.ranges {
            *flags.entry(*start).or_default() |= free(*range);
        }
        let mut changed = Vec::new();
        for (start, free) in flags {
            let token = &self.tokens[&start];
            let handed = token.hands > 0 && token.version == 0;
            if free != token.free || handed {
                let next = Token { free, version: token.version + 1, ..(**token).clone() };
                changed.extend(self.seal(next, token));
            }
        }
        self.replace(&changed);
        changed
    }

    /// The tokens of `owner`, this node, with newer seals.
    pub fn seal_anew(&mut self, owner: &PeerName) -> Vec<Token> {
        let own = self.tokens().filter(|token| token.owner == *owner && token.version > 0);
        let newer = |token: &Token| {
            let next = Token { version: token.version + 1, ..token.clone() };
            self.seal(next, token)
        };
        let changed: Vec<Token> = own.filter_map(newer).collect();
        self.replace(&changed);
        changed
    }

    fn seal(&self, token: Token, parent: &Token) -> Option<Token> {
        let signature = match &self.sealer {
            Some(sealer) => deed::draw_up(&token, parent, &self.layout, sealer)?,
            None => Vec::new(),
        };
        Some(Token { signature, ..token })
    }

    fn replace(&mut self, changed: &[Token]) {
        if !changed.is_empty() {
            self.tokens.extend(changed.iter().map(|token| (token.start, token.clone().into())));
            self.resolved.take();
        }
    }
}

/// Goes along the starts with all tokens that reach over where it is, the winner on top.
fn resolve(tokens: &Tokens) -> Vec<(Span, Arc<Token>)> {
    let mut resolved: Vec<(Span, Arc<Token>)> = Vec::new();
    let mut over: BinaryHeap<Over<'_>> = BinaryHeap::new();
    let mut coming = tokens.values().peekable();
    let Some(mut at) = coming.peek().map(|token| token.start) else { return resolved };
    loop {
        while let Some(token) = coming.next_if(|token| token.start <= at) {
            over.push(Over(token));
        }
        while over.peek().is_some_and(|top| top.0.end < at) {
            over.pop();
        }
        let next = coming.peek().map(|token| token.start);
        let Some(Over(top)) = over.peek() else {
            let Some(next) = next else { return resolved };
            at = next;
            continue;
        };
        let last = next.map_or(top.end, |next| top.end.min(next - 1));
        match resolved.last_mut() {
            Some((span, token)) if token.start == top.start && span.last + 1 == at => span.last = last,
            _ => resolved.push((Span { first: at, last }, (*top).clone())),
        }
        at = last + 1;
    }
}

/// In the order in which tokens win over each other where they overlap.
struct Over<'a>(&'a Arc<Token>);

impl Ord for Over<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.cmp_rank(other.0).then_with(|| self.0.start.cmp(&other.0.start))
    }
}

impl PartialOrd for Over<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Over<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Over<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new("10.32.0.0/16".parse().unwrap())
    }

    fn name(n: usize) -> PeerName {
        format!("n{n}").parse().unwrap()
    }

    fn seeded(layout: Layout, seeds: usize) -> Ring {
        let names: Vec<PeerName> = (0..seeds).map(name).collect();
        let mut ring = Ring::new(layout, None);
        for token in Ring::genesis(layout, &names).unwrap() {
            assert!(ring.merge(token).is_some());
        }
        ring
    }

    fn is_partition(ring: &Ring) -> bool {
        coalesce(ring.ranges().map(|(span, _)| span)) == [ring.layout.whole()]
    }

    #[test]
    fn seeds_get_equal_aligned_shares() {
        let ring = seeded(layout(), 3);
        let shares: Vec<u128> = ring.shares(false).into_values().map(|share| share / 256).collect();
        assert_eq!(shares, [86, 85, 85]);
        assert!(is_partition(&ring));
        let four: Vec<String> =
            seeded(layout(), 4).routes().iter().map(|(p, n)| format!("{p} {n}")).collect();
        assert_eq!(four, ["10.32.0.0/18 n0", "10.32.64.0/18 n1", "10.32.128.0/18 n2", "10.32.192.0/18 n3"]);
    }

    #[test]
    fn any_number_of_seeds_shares_out_the_universe() {
        for universe in ["10.32.0.0/29", "10.32.0.0/30", "10.32.0.0/12", "fd00:77::/64"] {
            let layout = Layout::new(universe.parse().unwrap());
            for seeds in [1, 2, 3, 4] {
                let ring = seeded(layout, seeds);
                let shares: Vec<u128> = ring.shares(false).into_values().collect();
                assert!(is_partition(&ring), "{universe} {seeds}");
                assert!(shares[0] - shares[seeds - 1] <= layout.unit(), "{universe} {shares:?}");
                assert!(ring.tokens().all(|t| t.span().aligned().count() == 1), "{universe}");
            }
        }
        let layout = Layout::new("10.32.0.0/30".parse().unwrap());
        let seeds: Vec<PeerName> = (0..5).map(name).collect();
        assert_eq!(
            Ring::genesis(layout, &seeds).unwrap_err().to_string(),
            "--ipam-seed names 5 nodes, but --universe 10.32.0.0/30 has only 4 blocks to share out"
        );
    }

    #[test]
    fn a_grant_alone_says_no_more_than_was_handed_over() {
        let mut ring = seeded(layout(), 1);
        let (a, b, c) = (name(0), name(1), name(2));
        ring.give(&a, Span { first: 0x8000, last: 0xffff }, &b);
        ring.give(&b, Span { first: 0xc000, last: 0xffff }, &a);
        let grant = ring.give(&b, Span { first: 0xa000, last: 0xbfff }, &c);
        // c hears of its own token only, not of the one at 0xc000.
        let mut partial = Ring::new(layout(), None);
        for token in grant {
            partial.merge(token);
        }
        assert_eq!(partial.owned_by(&c), [Span { first: 0xa000, last: 0xbfff }]);
        assert_eq!(partial.owner(0xc000), None);
    }

    fn gives() -> impl Strategy<Value = Vec<(usize, u128, u128, usize)>> {
        prop::collection::vec((0usize..4, 0u128..256, 1u128..64, 0usize..4), 0..40)
    }

    /// Every token that ever was, and the ring that knows them all.
    fn history(gives: &[(usize, u128, u128, usize)]) -> (Vec<Token>, Ring) {
        let mut ring = seeded(layout(), 3);
        let mut all: Vec<Token> = ring.tokens().cloned().collect();
        for (from, first, count, to) in gives {
            let span = Span { first: first * 256, last: ((first + count) * 256 - 1).min(0xffff) };
            all.extend(ring.give(&name(*from), span, &name(*to)));
        }
        (all, ring)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn space_is_conserved(gives in gives()) {
            prop_assert!(is_partition(&history(&gives).1));
        }

        #[test]
        fn what_somebody_owns_changes_only_where_it_is_touched(gives in gives(), order in any::<prop::sample::Index>(), me in 0usize..5) {
            let (mut all, _) = history(&gives);
            let (at, me) = (order.index(all.len()), name(me));
            all.rotate_left(at);
            let mut ring = Ring::new(layout(), None);
            let mut owned = ring.owned(&me);
            for token in all.into_iter().rev() {
                let own = token.owner == me;
                if ring.merge(token).is_some_and(|touched| own || owned.is_touched(touched)) {
                    owned = ring.owned(&me);
                }
                prop_assert_eq!(&owned, &ring.owned(&me));
            }
        }

        #[test]
        fn merge_is_a_join(gives in gives(), order in any::<prop::sample::Index>(), split in any::<prop::sample::Index>()) {
            let (all, full) = history(&gives);
            let rotated: Vec<Token> = {
                let at = order.index(all.len());
                all[at..].iter().chain(&all[..at]).rev().cloned().collect()
            };
            let (left, right) = rotated.split_at(split.index(rotated.len()));
            let join = |parts: [&[Token]; 3]| {
                let mut ring = Ring::new(layout(), None);
                for token in parts.concat() {
                    ring.merge(token);
                }
                ring.tokens
            };
            prop_assert_eq!(&join([left, right, &[]]), &full.tokens);
            prop_assert_eq!(&join([right, left, &[]]), &full.tokens);
            prop_assert_eq!(&join([right, left, right]), &full.tokens);
        }

        #[test]
        fn partial_knowledge_never_enlarges_an_own_range(
            gives in gives(),
            heard in prop::collection::vec(any::<bool>(), 256),
        ) {
            let (all, full) = history(&gives);
            for me in (0..4).map(name) {
                // An agent knows what it wrote itself, and any part of the rest.
                let mine = {
                    let mut mine = seeded(layout(), 3);
                    for (token, heard) in all.iter().zip(heard.iter().cycle()) {
                        if *heard {
                            mine.merge(token.clone());
                        }
                    }
                    for (span, token) in full.ranges() {
                        // The end of each own line of changes: the last token that was ours or made by us.
                        if token.owner == me || all.iter().any(|t| t.start == span.first && t.owner == me) {
                            mine.merge(token.clone());
                        }
                    }
                    mine
                };
                for (span, token) in mine.ranges().filter(|(_, token)| token.owner == me) {
                    prop_assert_eq!(full.owner(span.first), Some(&token.owner));
                    prop_assert_eq!(full.owner(span.last), Some(&token.owner));
                }
            }
        }
    }
}
