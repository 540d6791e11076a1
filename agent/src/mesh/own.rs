//! The own record and the own name: joining, outbidding, leaving.
//!
//! A record under our name that we did not write is either our own from before a restart, or a twin's. Where its endpoints
//! are ours, it is the former. Elsewhere somebody is called there; of two that live the younger ends, by each other's
//! hello. Then our record is raised above the foreign one.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    dial::Target,
    gossip::Item,
    link::LinkId,
    machine::{Mesh, Output, Phase, addresses},
    peers::{self, MAX_NEIGHBOURS, Neighbour, PeerRecord},
    replica::Merged,
};
use crate::types::{Incarnation, PeerAddress, PeerName};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};
use tracing::{error, info, warn};
use weft_proto::mesh::refusal::Code;

/// What is known of others that use our name.
pub struct Naming {
    /// Incarnations under which we published.
    used: BTreeSet<Incarnation>,
    /// The highest record that we did not write and have not yet decided about.
    foreign: Option<PeerRecord>,
    /// Nobody lives behind records up to this incarnation.
    cleared: Option<Incarnation>,
    calling: bool,
    called: Option<Instant>,
}

impl Naming {
    pub fn new(incarnation: Incarnation) -> Self {
        let used = BTreeSet::from([incarnation]);
        Self { used, foreign: None, cleared: None, calling: false, called: None }
    }

    pub fn next_wake(&self) -> Option<Instant> {
        (self.foreign.is_some() && !self.calling).then_some(self.called? + CALL_AGAIN)
    }
}

impl Mesh {
    pub(super) fn is_own(&self, item: &Item) -> bool {
        item.channel == peers::CHANNEL && item.key == self.greeting.name.as_str().as_bytes()
    }

    /// An item under our name came in.
    pub(super) fn own_item(&mut self, item: Item, from: Option<LinkId>, now: Instant) {
        if let Err(rejected) = self.replica.check(&item) {
            return self.reject(peers::CHANNEL, &item.key, rejected, from, now);
        }
        let ours = self.own.to_item();
        if (&item.rank, &item.body) == (&ours.rank, &ours.body) {
            // Of two signatures of one record the greater is kept, as everywhere.
            return self.merge_checked(item, from, now);
        }
        let Ok(record) = PeerRecord::from_item(&item) else { return };
        let older = ours.beats(&item);
        if older && let Some(ours) = self.replica.find(peers::CHANNEL, &item.key) {
            self.with_link(from, |link| link.buffer.add(ours));
        }
        let echo = self.naming.used.contains(&record.incarnation);
        let cleared = self.naming.cleared.is_some_and(|cleared| record.incarnation <= cleared);
        let lower = self.naming.foreign.as_ref().is_some_and(|foreign| foreign.rank() >= record.rank());
        if !(older && (echo || cleared || record.left) || lower) {
            self.naming.foreign = Some(record);
            self.drive_name(now);
        }
    }

    /// Goes on to be a member of the network once there is somebody who told all, or nobody to wait for.
    pub(super) fn try_join(&mut self, now: Instant) {
        let Phase::Joining { patience } = self.phase else { return };
        let synced = self.links.values().any(|link| link.synced);
        if !(synced || self.dialer.hopeless() || now >= patience) {
            return;
        }
        match self.objection.take() {
            // Alone it would make a network of its own beside theirs.
            Some(why) if self.links.values().all(|link| link.peer.is_none()) => self.end(Output::Fatal(why)),
            _ => self.phase = Phase::Checking,
        }
    }

    /// Decides about the foreign record, if there is one; without one, what waits for the decision goes on.
    pub(super) fn drive_name(&mut self, now: Instant) {
        if self.naming.calling || !matches!(self.phase, Phase::Checking | Phase::Joined) {
            return;
        }
        let Some(foreign) = &self.naming.foreign else { return self.name_is_ours() };
        let mut elsewhere = foreign.clone();
        elsewhere.endpoints.retain(|endpoint| !self.own.endpoints.contains(endpoint));
        if foreign.left || elsewhere.endpoints.is_empty() {
            return self.name_is_ours();
        }
        if self.naming.called.is_none_or(|called| now >= called + CALL_AGAIN) {
            let endpoints: Vec<_> = elsewhere.endpoints.iter().map(ToString::to_string).collect();
            info!(endpoints = endpoints.join(","), "our name is known elsewhere; calling there");
            (self.naming.calling, self.naming.called) = (true, Some(now));
            self.output(Output::Dial { target: Target::Twin, addresses: addresses(&elsewhere) });
        }
    }

    /// Somebody who called us from there uses our name; an agent of that host would answer at the port that we use, too.
    pub(super) fn call_twin_at(&mut self, remote: &str, now: Instant) {
        let recently = self.naming.called.is_some_and(|called| now < called + CALL_AGAIN);
        let port = self.own.endpoints.first().map(|endpoint| endpoint.0.port());
        let (Ok(remote), Some(port)) = (remote.parse::<SocketAddr>(), port) else { return };
        if !self.naming.calling && !recently {
            (self.naming.calling, self.naming.called) = (true, Some(now));
            let address = PeerAddress { host: remote.ip().to_canonical().to_string(), port };
            self.output(Output::Dial { target: Target::Twin, addresses: vec![address] });
        }
    }

    /// Nobody older lives under our name.
    pub(super) fn no_twin(&mut self) {
        self.naming.calling = false;
        if matches!(self.phase, Phase::Checking | Phase::Joined) {
            self.name_is_ours();
        }
    }

    fn name_is_ours(&mut self) {
        let foreign = self.naming.foreign.take();
        if let Some(foreign) = &foreign {
            self.naming.cleared = self.naming.cleared.max(Some(foreign.incarnation));
            if !self.own.to_item().beats(&foreign.to_item()) {
                warn!(name = %foreign.name, incarnation = %foreign.incarnation, "outbidding another record of our name");
                self.own.outbid(foreign);
                self.naming.used.insert(self.own.incarnation);
                if self.phase == Phase::Joined {
                    self.publish_own();
                }
            }
        }
        if self.phase == Phase::Checking {
            self.phase = Phase::Joined;
            self.own.neighbours = self.neighbours();
            self.publish_own();
            self.output(Output::Joined);
        }
    }

    pub(super) fn update(&mut self, change: Box<dyn FnOnce(&mut PeerRecord) + Send>) {
        let mut record = self.own.clone();
        change(&mut record);
        let rtts: BTreeMap<_, _> = record.neighbours.iter().map(|n| (n.name.clone(), n.rtt)).collect();
        let neighbours = self
            .own
            .neighbours
            .iter()
            .map(|n| Neighbour { name: n.name.clone(), rtt: rtts.get(&n.name).copied().unwrap_or(n.rtt) });
        record.neighbours = neighbours.collect();
        let (name, left) = (self.own.name.clone(), self.own.left);
        self.replace_own(PeerRecord { name, left, ..record });
    }

    /// Publishes the own record under a newer seal, for when the CA of the older one is believed no more.
    pub(super) fn seal_anew(&mut self) {
        if self.phase == Phase::Joined {
            self.own.version += 1;
            self.publish_own();
        }
    }

    /// Others are told soon, but not ever again while a large network finds itself: each time all of it hears of it.
    pub(super) fn neighbours_changed(&mut self, now: Instant) {
        let again = self.neighbours_told.map_or(now, |told| told + SETTLE * self.crowds());
        self.neighbours_at.get_or_insert(again.max(now + SETTLE));
    }

    pub(super) fn tell_neighbours(&mut self, now: Instant) {
        self.neighbours_told = Some(now);
        let neighbours = self.neighbours();
        self.replace_own(PeerRecord { neighbours, ..self.own.clone() });
    }

    /// A peer is dead up to an incarnation, and its record is one of a later one should it come back. Should it be this
    /// agent, it says that it lives.
    pub(super) fn forget(&mut self, name: PeerName, incarnation: Incarnation) {
        if name == self.own.name {
            if self.own.incarnation <= incarnation && self.phase == Phase::Joined {
                self.own.incarnation = Incarnation(incarnation.0.saturating_add(1));
                self.naming.used.insert(self.own.incarnation);
                self.publish_own();
            }
            return;
        }
        if self.peers.get(&name).is_some_and(|record| record.incarnation <= incarnation) {
            self.dialer.gone(&name);
            self.peers.remove(&name);
            self.routes = None;
            self.output(Output::PeersChanged);
        }
        let last = self.forgotten.entry(name).or_insert(incarnation);
        *last = incarnation.max(*last);
    }

    pub(super) fn leave(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Leaving { .. }) {
            self.phase = Phase::Leaving { by: now + FAREWELL };
            self.own = self.own.farewell(now.saturating_duration_since(self.started));
            self.naming.used.insert(self.own.incarnation);
            self.publish_own();
        }
    }

    /// Ends once every link was told that we leave.
    pub(super) fn try_leave(&mut self, now: Instant) {
        let Phase::Leaving { by } = self.phase else { return };
        if now >= by || self.links.values().all(|link| link.idle()) {
            for id in self.links.keys().copied().collect::<Vec<_>>() {
                self.close(id, Code::Leaving, &format!("agent {} leaves", self.greeting.name), now);
            }
            self.end(Output::Left);
        }
    }

    pub(super) fn end(&mut self, last: Output) {
        self.phase = Phase::Ended;
        for id in std::mem::take(&mut self.links).into_keys() {
            self.output(Output::Close { link: id });
        }
        self.output(last);
    }

    /// Takes a changed record as the own one; only a real change raises its version.
    fn replace_own(&mut self, record: PeerRecord) {
        let (incarnation, version) = self.own.rank();
        let record = PeerRecord { incarnation, version, ..record };
        if record == self.own {
            return;
        }
        self.own = record;
        match self.phase {
            Phase::Joining { .. } | Phase::Checking => {
                self.peers.insert(self.own.clone());
                self.output(Output::PeersChanged);
            }
            Phase::Joined | Phase::Leaving { .. } | Phase::Ended => {
                self.own.version += 1;
                self.publish_own();
            }
        }
    }

    fn publish_own(&mut self) {
        let item = self.own.to_sealed(self.sealer.as_ref());
        match self.replica.merge(item) {
            Ok(Merged::New(id)) => self.spread(id, None),
            Ok(_) => {}
            Err(rejected) => error!(%rejected, "the own record is not one that peers would take"),
        }
        self.peers.insert(self.own.clone());
        self.routes = None;
        self.output(Output::PeersChanged);
    }

    /// Whom we are linked with, with the round-trip times that are known already.
    fn neighbours(&self) -> Vec<Neighbour> {
        let known: BTreeMap<_, _> = self.own.neighbours.iter().map(|n| (&n.name, n.rtt)).collect();
        let neighbour = |name: &crate::types::PeerName| Neighbour {
            name: name.clone(),
            rtt: known.get(name).copied().flatten(),
        };
        self.dialer.linked().iter().take(MAX_NEIGHBOURS).map(neighbour).collect()
    }
}

/// How long to wait before calling a twin again that has not answered, should its record come back.
const CALL_AGAIN: Duration = Duration::from_secs(2);
/// Changed neighbours are told once in that time.
const SETTLE: Duration = Duration::from_secs(1);
/// How long to wait for slow links when leaving.
const FAREWELL: Duration = Duration::from_secs(2);
