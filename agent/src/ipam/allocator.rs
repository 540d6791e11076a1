//! The allocator: hands out addresses of the own ranges, asks peers for more, and gives to peers that ask.
//!
//! ```text
//!              Stored ─▶ new ──(first contact, or the only seed)──▶ in force ──leave──▶ left
//!                        only knows the ring                        hands out, gives, asks
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod begin;
mod forget;
mod recover;
mod share;

use forget::Estate;

use super::{
    Assigned, Change, Config, Effects, Found, IpamError, KnownPeer, Now, Request, Seeding, Stored, View,
    WaitingFor,
    ask::Asker,
    death::{self, Deaths},
    election::{self, Election, Patience, Vote},
    ring::{Owned, Ring, TooManySeeds},
    seed::SeedPlan,
    space::{Allocation, Owner, Space},
    span::{Layout, Span},
    token::{self, Token},
};
use crate::{
    mesh::gossip::Item,
    types::{AttachmentKey, Incarnation, Mac, PeerName, PodRef, Prefix},
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::{debug, info, warn};

#[derive(Debug)]
pub struct Allocator {
    me: PeerName,
    layout: Layout,
    ring: Ring,
    seeds: SeedPlan,
    /// The first tokens by the seed list, for when there is no ring yet.
    genesis: Vec<Token>,
    space: Space,
    in_force: bool,
    /// Somebody else says who owns what: nothing is asked for, given or told.
    assigned: bool,
    left: bool,
    /// It owns ranges from before a restart, and has not heard yet what the others have done meanwhile.
    returning: bool,
    /// Peers that can be reached.
    peers: BTreeSet<PeerName>,
    /// All that are known to belong to the network, also from before a restart.
    members: Arc<BTreeMap<PeerName, Incarnation>>,
    /// Those whose record is here, and what they have promised.
    heard: BTreeMap<PeerName, (Incarnation, u64)>,
    deaths: Deaths,
    /// Deaths or peers have become known, or what this node can do about them has changed.
    deaths_due: bool,
    estates: Vec<Estate>,
    deaths_digest: u64,
    /// As long as nobody knows who shares the universe, and this node has a vote.
    election: Option<(Election, Patience)>,
    observes: bool,
    /// Somebody, or an operator, has told this node what is going on since it started.
    has_contact: bool,
    /// When each reservation that was not activated ends.
    unactivated: BTreeMap<AttachmentKey, Instant>,
    asker: Asker,
    /// Until when a pod that got no address is believed to be waiting for one.
    demand: Option<Instant>,
    /// What the ring gives to this node; taken from it anew when that has changed.
    owned: Owned,
    own_changed: bool,
    /// The routing table; `None`: it has not been asked for since the ring has changed.
    routes: Option<Arc<Vec<(Prefix, PeerName)>>>,
    ring_changed: bool,
    effects: Effects,
}

impl Allocator {
    /// Starts from what was stored and what is found on the node.
    ///
    /// # Errors
    /// More seeds than the universe has blocks.
    pub fn new(config: Config, stored: Stored, found: Found, now: Now) -> Result<Self, TooManySeeds> {
        let layout = Layout::new(config.universe);
        let may_be_forgotten = config.assigned.is_none() && !found.continues;
        let genesis = Ring::genesis(layout, config.seeds.names())?;
        let mut this = Self {
            me: config.name,
            layout,
            ring: Ring::new(layout, config.sealer),
            seeds: config.seeds.clone(),
            genesis,
            space: Space::new(layout),
            in_force: stored.in_force,
            assigned: config.assigned.is_some(),
            left: false,
            returning: false,
            peers: BTreeSet::new(),
            members: Arc::new(stored.members),
            heard: BTreeMap::new(),
            deaths: Deaths::default(),
            deaths_due: true,
            estates: Vec::new(),
            deaths_digest: 0,
            election: None,
            observes: config.seeding == Seeding::Observer,
            has_contact: false,
            unactivated: BTreeMap::new(),
            asker: Asker::default(),
            demand: None,
            owned: Owned::default(),
            own_changed: true,
            routes: None,
            ring_changed: true,
            effects: Effects::default(),
        };
        if let Some(assigned) = config.assigned {
            this.in_force = true;
            this.ring = Ring::assigned(layout, &assigned);
        }
        let voted = stored.kept.iter().filter(|(item, _)| item.channel == election::CHANNEL);
        let voted = voted.filter_map(|(item, _)| Vote::from_item(item).ok()).next();
        for (item, settled) in stored.kept.into_iter().filter(|_| !this.assigned) {
            this.effects.publish.push(item.clone());
            this.deaths.hear(item, settled);
        }
        if let (Seeding::Consensus(voters), []) = (config.seeding, config.seeds.names()) {
            this.stand(voters, voted.map(|(_, vote)| vote), now);
        }
        for token in stored.tokens.into_values().filter(|_| !this.assigned) {
            this.effects.publish.push(token.to_item(&layout));
            this.ring.merge(token);
        }
        this.returning = this.in_force && may_be_forgotten && !this.members.is_empty();
        this.restore(stored.allocations, stored.resting, now);
        this.recover(found, now);
        this.vote(now);
        if config.seeds.names() == std::slice::from_ref(&this.me) && !config.has_bootstrap {
            this.open();
        }
        this.settle(now);
        Ok(this)
    }

    /// Reserves an address. The same attachment gets the same address again.
    ///
    /// # Errors
    /// [`IpamError::NotReady`] and [`IpamError::Full`] may pass; the others are about the request.
    pub fn reserve(&mut self, request: Request, now: Now) -> Result<Arc<Allocation>, IpamError> {
        if self.left {
            return Err(IpamError::Left);
        }
        let wanted = self.wanted(&request.wanted)?;
        let owner = Owner::Pod(request.key.clone());
        let existing = self.space.find(&owner).map(|allocation| allocation.address);
        if let Some(has) = existing {
            if wanted.is_some_and(|wanted| self.layout.address(wanted) != has) {
                return Err(IpamError::HasAnother { key: request.key, has });
            }
            return Ok(self.reserve_again(request, owner, now));
        }
        if let (true, Some(waiting)) = (!self.in_force || self.returning, self.waiting_for()) {
            return Err(IpamError::NotReady(waiting));
        }
        let offset = match wanted {
            Some(offset) => self.check_wanted(offset, &request.ranges).map(|()| offset)?,
            None => self.pick(&request.ranges, now)?,
        };
        self.demand = None;
        let mac = request.mac.unwrap_or_else(|| request.key.pod_mac());
        self.unactivated.insert(request.key, now.at + UNACTIVATED_FOR);
        let allocation = self.allocate(offset, owner, request.pod, mac, now);
        self.settle(now);
        Ok(allocation)
    }

    /// The attachment stands: its reservation no longer times out. False where there is none.
    pub fn activated(&mut self, key: &AttachmentKey) -> bool {
        self.unactivated.remove(key);
        self.space.find(&Owner::Pod(key.clone())).is_some()
    }

    /// Frees an attachment's address, which then rests.
    pub fn release(&mut self, key: &AttachmentKey, now: Now) -> Option<Arc<Allocation>> {
        let freed = self.free(&Owner::Pod(key.clone()), now);
        self.settle(now);
        freed
    }

    /// Takes in what the mesh heard on channels "ring", "deaths" and "votes".
    pub fn on_items(&mut self, items: &[Item], now: Now) {
        if self.assigned {
            return;
        }
        let of = |channel: &'static str| items.iter().filter(move |item| item.channel == channel);
        self.on_deaths(of(death::CHANNEL).cloned());
        self.on_votes(of(election::CHANNEL), now);
        for item in of(token::CHANNEL) {
            match Token::from_item(item, &self.layout) {
                Ok(token) => {
                    let token = Arc::new(token);
                    if let Some(touched) = self.ring.merge(token.clone()) {
                        self.ring_changed = true;
                        self.own_changed |= token.owner == self.me || self.owned.is_touched(touched);
                        self.effects.changes.push(Change::Token(token));
                    }
                }
                Err(rejected) => debug!(%rejected, "dropped a ring item"),
            }
        }
        self.settle(now);
    }

    /// Who is known and can be reached now, and what they hold of others' ranges.
    pub fn on_peers(&mut self, peers: &[KnownPeer], now: Now) {
        let others = || peers.iter().filter(|peer| peer.name != self.me && !peer.left);
        let held = others().flat_map(|peer| peer.held.iter().map(|address| (*address, peer.name.clone())));
        self.space.set_foreign(held.filter_map(|(a, name)| Some((self.layout.offset(a)?, name))).collect());
        let heard = others().map(|peer| (peer.name.clone(), (peer.incarnation, peer.deaths_digest)));
        let heard = heard.collect();
        let before = std::mem::replace(&mut self.heard, heard);
        let gone = before.into_keys().filter(|name| !self.heard.contains_key(name));
        let left = peers.iter().filter(|peer| peer.left).map(|peer| peer.name.clone());
        for gone in gone.chain(left) {
            if Arc::make_mut(&mut self.members).remove(&gone).is_some() {
                self.effects.changes.push(Change::Member(gone, None));
                self.deaths_due = true;
            }
        }
        let here = others().map(|peer| (&peer.name, &peer.incarnation));
        let has_left = |name: &PeerName| peers.iter().any(|peer| peer.left && peer.name == *name);
        let absent = others().flat_map(|peer| &peer.absent).map(|(name, incarnation)| (name, incarnation));
        let absent = absent.filter(|(name, _)| **name != self.me && !has_left(name));
        let known: Vec<_> = here.chain(absent).collect();
        for (name, incarnation) in known {
            // A record of before a restart may still be about.
            if self.members.get(name) < Some(incarnation) {
                Arc::make_mut(&mut self.members).insert(name.clone(), *incarnation);
                self.effects.changes.push(Change::Member(name.clone(), Some(*incarnation)));
                self.deaths_due = true;
            }
        }
        self.peers = others().filter(|peer| peer.reachable).map(|peer| peer.name.clone()).collect();
        self.settle(now);
    }

    /// A peer has told all that it knows (the first exchange with it is complete).
    pub fn on_contact(&mut self, now: Now) {
        self.has_contact = true;
        self.deaths_due = true;
        self.open();
        self.vote(now);
        self.settle(now);
    }

    /// A peer has told who shared the universe at the start.
    pub fn on_seeds(&mut self, seeds: SeedPlan) {
        if self.seeds.names().is_empty() {
            self.effects.changes.push(Change::Seeds(seeds.clone()));
            self.seeds = seeds;
            self.election = None;
        }
    }

    /// Somebody else has said anew who owns what.
    pub fn on_assigned(&mut self, assigned: &Assigned, now: Now) {
        if self.assigned {
            self.ring = Ring::assigned(self.layout, assigned);
            (self.ring_changed, self.own_changed) = (true, true);
            self.settle(now);
        }
    }

    /// This node has other keys: its tokens are sealed anew with them.
    pub fn on_keys(&mut self, now: Now) {
        if self.shares() {
            let changed = self.ring.seal_anew(&self.me);
            self.record(changed);
        }
        self.settle(now);
    }

    /// Ends rests, reservations that were never activated, and waits for an answer. Call at [`next_wake`](Self::next_wake).
    pub fn tick(&mut self, now: Now) {
        for offset in self.space.wake(now.at) {
            self.effects.changes.push(Change::Resting(self.layout.address(offset), None));
        }
        let late: Vec<AttachmentKey> = self
            .unactivated
            .iter()
            .filter(|(_, until)| **until <= now.at)
            .map(|(key, _)| key.clone())
            .collect();
        for key in late {
            warn!(attachment = %key, "freed a reservation that was never activated");
            self.free(&Owner::Pod(key), now);
        }
        self.vote(now);
        self.settle(now);
    }

    /// Everything has been handed over, for good.
    pub fn has_left(&self) -> bool {
        self.left
    }

    /// How many pods have an address of this node.
    pub fn pods(&self) -> usize {
        self.space.pods()
    }

    pub fn next_wake(&self) -> Option<Instant> {
        let reservation = self.unactivated.values().min().copied();
        let vote = self.election.as_ref().and_then(|(_, patience)| patience.next_wake());
        [self.space.next_wake(), reservation, self.asker.next_wake(), vote].into_iter().flatten().min()
    }

    /// What the calls since the last time ask for.
    pub fn effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    pub fn view(&mut self) -> View {
        let ranges = self.routes.get_or_insert_with(|| Arc::new(self.ring.routes())).clone();
        let prefixes = |spans: &[Span]| spans.iter().flat_map(|span| self.layout.prefixes(*span)).collect();
        let ours = |offset| self.space.is_own(offset);
        let allocations = || self.space.allocations();
        View {
            ranges,
            own: prefixes(self.space.own()),
            bridge: self.space.find(&Owner::Bridge).map(|bridge| bridge.address),
            allocations: allocations().map(|(_, a)| (a.address, a.clone())).collect(),
            reserved: self.unactivated.keys().cloned().collect(),
            held: allocations().filter(|(offset, _)| !ours(*offset)).map(|(_, a)| a.address).collect(),
            conceded: self.space.conceded().map(|offset| self.layout.address(offset)).collect(),
            resting: self.space.resting().map(|offset| self.layout.address(offset)).collect(),
            counts: self.space.counts(),
            epoch: self.ring.tokens().map(|token| token.epoch).max().unwrap_or(0),
            waiting_for: self.waiting_for(),
            deaths: self.deaths.all().clone(),
            deaths_digest: self.deaths_digest,
            absent: self.absent(),
            takeovers: self.waits(),
            members: self.members.clone(),
        }
    }

    fn wanted(&self, wanted: &[IpAddr]) -> Result<Option<u128>, IpamError> {
        let universe = self.layout.universe();
        match wanted {
            [] => Ok(None),
            [address] => match self.layout.offset(*address) {
                Some(offset) => Ok(Some(offset)),
                None => Err(IpamError::OutsideUniverse { address: *address, universe }),
            },
            _ => Err(IpamError::TooManyWanted(universe)),
        }
    }

    /// A wanted address may still be resting: its pod may just have been started anew.
    fn check_wanted(&self, offset: u128, ranges: &[Prefix]) -> Result<(), IpamError> {
        let address = self.layout.address(offset);
        if !ranges.is_empty() && !ranges.iter().any(|range| range.contains(&address)) {
            return Err(IpamError::Contradiction { address, ranges: ranges.into() });
        }
        if self.layout.reserved(offset) {
            return Err(IpamError::Reserved { address, universe: self.layout.universe() });
        }
        if !self.space.is_own(offset) {
            return Err(IpamError::NotOurs { address, owner: self.ring.owner(offset).cloned() });
        }
        let by = match (self.space.at(offset).map(Arc::as_ref), self.space.foreign(offset)) {
            (Some(Allocation { owner: Owner::Bridge, .. }), _) => "the bridge".into(),
            (Some(Allocation { owner: Owner::Pod(key), pod, .. }), _) => format!("{pod} ({key})"),
            (None, Some(peer)) => format!("a pod on {peer}"),
            (None, None) => return Ok(()),
        };
        Err(IpamError::InUse { address, by })
    }

    fn pick(&mut self, ranges: &[Prefix], now: Now) -> Result<u128, IpamError> {
        let limits: Vec<Span> = ranges.iter().filter_map(|range| self.layout.span(*range)).collect();
        let out_of_ranges = |space: &Space| IpamError::OutOfRanges {
            ranges: ranges.into(),
            own: space.own().iter().flat_map(|span| self.layout.prefixes(*span)).collect(),
        };
        if !ranges.is_empty() && limits.is_empty() {
            return Err(out_of_ranges(&self.space));
        }
        if let Some(offset) = self.space.lowest_free(&limits) {
            return Ok(offset);
        }
        if self.space.lowest_free(&[]).is_some() {
            return Err(out_of_ranges(&self.space));
        }
        self.demand = Some(now.at + DEMAND_FOR);
        self.settle(now);
        Err(self.waiting_for().map_or_else(|| self.full(), IpamError::NotReady))
    }

    fn reserve_again(&mut self, request: Request, owner: Owner, now: Now) -> Arc<Allocation> {
        if let Some(until) = self.unactivated.get_mut(&request.key) {
            *until = now.at + UNACTIVATED_FOR;
        }
        let allocation = self.space.get_mut(&owner).expect("the owner has an allocation");
        let mac = request.mac.unwrap_or(allocation.mac);
        let changed = allocation.pod != request.pod || allocation.mac != mac;
        (allocation.pod, allocation.mac) = (request.pod, mac);
        let allocation = self.space.find(&owner).expect("the owner has an allocation").clone();
        if changed {
            self.effects.changes.push(Change::Allocation(allocation.address, Some(allocation.clone())));
        }
        allocation
    }

    fn allocate(&mut self, offset: u128, owner: Owner, pod: PodRef, mac: Mac, now: Now) -> Arc<Allocation> {
        let address = self.layout.address(offset);
        if self.space.is_resting(offset) {
            self.effects.changes.push(Change::Resting(address, None));
        }
        let allocation = Arc::new(Allocation { owner, address, pod, mac, reserved_at: now.unix_ms });
        self.space.insert(offset, allocation.clone());
        self.effects.changes.push(Change::Allocation(address, Some(allocation.clone())));
        allocation
    }

    fn free(&mut self, owner: &Owner, now: Now) -> Option<Arc<Allocation>> {
        if let Owner::Pod(key) = owner {
            self.unactivated.remove(key);
        }
        let (offset, allocation) = self.space.remove(owner)?;
        self.effects.changes.push(Change::Allocation(allocation.address, None));
        if self.ring.owner(offset) == Some(&self.me) {
            self.space.rest(offset, now.at + REST_FOR);
            self.effects.changes.push(Change::Resting(allocation.address, Some(now.unix_ms)));
        }
        Some(allocation)
    }

    /// The ring may be used again, or from now on. Where there is none yet, it begins with the seeds' shares; where there is
    /// one, the seed list says nothing: it may have been made longer since, and this node may have lost its state.
    fn open(&mut self) {
        self.returning = false;
        if self.in_force {
            return;
        }
        self.in_force = true;
        self.ring_changed = true;
        self.effects.changes.push(Change::InForce);
        if !self.seeds.names().is_empty() {
            self.effects.changes.push(Change::Seeds(self.seeds.clone()));
        }
        let genesis = std::mem::take(&mut self.genesis);
        if self.ring.is_empty() {
            for token in &genesis {
                self.ring.merge(token.clone());
            }
            self.record(genesis);
        }
    }

    /// Notes tokens that this node has changed in the ring.
    fn record(&mut self, changed: Vec<Token>) {
        self.ring_changed |= !changed.is_empty();
        self.own_changed |= !changed.is_empty();
        for token in changed {
            self.effects.publish.push(token.to_item(&self.layout));
            self.effects.changes.push(Change::Token(token.into()));
        }
    }

    /// Brings all that follows from ring and allocations up to date.
    fn settle(&mut self, now: Now) {
        self.settle_deaths();
        if self.ring_changed {
            self.ring_changed = false;
            self.routes = None;
            if std::mem::take(&mut self.own_changed) {
                self.owned = self.ring.owned(&self.me);
            }
            let own = match self.in_force && !self.left {
                true => self.usable(),
                false => Vec::new(),
            };
            if own != self.space.own() {
                self.take_own(own);
            }
        }
        self.settle_bridge(now);
        if self.shares() {
            let changed = self.ring.flag(&self.owned, |range| self.space.has_surplus(range));
            self.record(changed);
            // Flags change nobody's ranges.
            (self.ring_changed, self.own_changed) = (false, false);
        }
        self.seek(now);
    }

    /// This node's tokens are its own to change.
    fn shares(&self) -> bool {
        self.in_force && !self.left && !self.assigned && !self.returning
    }

    fn take_own(&mut self, own: Vec<Span>) {
        let was = self.space.counts().owned;
        let lost = |offset| !own.iter().any(|span| span.contains(offset));
        for (offset, allocation) in self.space.allocations() {
            if self.space.is_own(offset) && lost(offset) && !self.left {
                warn!(address = %allocation.address, now_of = self.ring.owner(offset).map(PeerName::as_str), "lost an address in use: still serving it");
            }
        }
        self.space.set_own(own);
        let owned = self.space.counts().owned;
        info!(addresses = %owned, was = %was, "own ranges changed");
        if owned > was {
            self.asker.satisfied();
        }
    }

    /// The bridge has an address as soon as there is one, and keeps it as long as any pod lives.
    fn settle_bridge(&mut self, now: Now) {
        let bridge = self.space.find(&Owner::Bridge).and_then(|bridge| self.layout.offset(bridge.address));
        let stays = |offset| self.space.is_own(offset) || self.space.pods() > 0;
        if !self.in_force || bridge.is_some_and(stays) {
            return;
        }
        if bridge.is_some() {
            self.free(&Owner::Bridge, now);
        }
        if let Some(offset) = self.space.lowest_free(&[]) {
            self.allocate(offset, Owner::Bridge, PodRef::default(), Mac::default(), now);
        }
    }

    fn waiting_for(&self) -> Option<WaitingFor> {
        if self.left {
            return None;
        }
        if !self.in_force {
            return Some(WaitingFor::FirstContact);
        }
        if self.returning {
            return Some(WaitingFor::Return { peers: self.members.keys().cloned().collect() });
        }
        if self.space.counts().free > 0 {
            return None;
        }
        if self.assigned {
            return self.space.own().is_empty().then_some(WaitingFor::Assignment);
        }
        if self.observes {
            return Some(WaitingFor::Nothing);
        }
        if self.ring.is_empty() {
            let votes = |(election, _): &(Election, Patience)| {
                let (voters, quorum) = election.turnout();
                WaitingFor::Votes { voters, quorum }
            };
            return Some(self.election.as_ref().map_or(WaitingFor::Seed, votes));
        }
        if let Some(peer) = self.asker.asked() {
            return Some(WaitingFor::Space { from: peer.clone() });
        }
        let owners = self.givers();
        (!owners.is_empty()).then_some(WaitingFor::Unreachable { owners })
    }

    fn full(&self) -> IpamError {
        let mut shares: Vec<_> = self.ring.shares(false).into_iter().map(|(n, s)| (n.clone(), s)).collect();
        shares.sort_by_key(|(_, size)| Reverse(*size));
        IpamError::Full { universe: self.layout.universe(), shares, resting: self.space.counts().resting }
    }
}

/// A freed address is not used again for so long: peers and connections still know its last pod.
pub const REST_FOR: Duration = Duration::from_secs(30);
/// The shim activates what it reserved within a second, or it has died.
pub const UNACTIVATED_FOR: Duration = Duration::from_secs(60);
/// How long after a failed reservation space is asked for urgently: runtimes try again within seconds.
const DEMAND_FOR: Duration = Duration::from_secs(30);
