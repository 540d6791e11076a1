//! Links come and go: greetings, doubles, surplus.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    dial::Target,
    greeting::Verdict,
    link::{Link, LinkId},
    machine::{FRESH, Mesh, Output},
};
use crate::types::{Incarnation, PeerName};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tracing::{debug, info, warn};
use weft_proto::mesh::{Frame, Hello, Refusal, frame::Body, refusal::Code};

impl Mesh {
    pub(super) fn opened(
        &mut self,
        id: LinkId,
        dialled: Option<Target>,
        remote: String,
        certified: Option<Vec<PeerName>>,
        now: Instant,
    ) {
        self.counters.links_opened += 1;
        if dialled.is_none() && self.links.len() >= self.dialer.max_links() + STRANGERS {
            self.count_refused(Code::Surplus);
            self.output(Output::Close { link: id });
            return;
        }
        self.links.insert(id, Link::new(dialled, remote, certified, now));
        let hello = self.greeting.hello();
        self.send_always(id, Body::Hello(hello));
    }

    pub(super) fn dial_failed(&mut self, target: &Target, reason: &str, now: Instant) {
        debug!(%target, reason, "no link");
        self.dialer.failed(target, reason, now, &mut self.rng);
        if *target == Target::Twin {
            self.no_twin();
        }
    }

    pub(super) fn turned_away(&mut self, who: &str, reason: &str, now: Instant) {
        self.count_refused(Code::Identity);
        if self.refusals.note(who, &format!("was turned away: {reason}"), now) {
            warn!(who, reason, "caller turned away");
        }
    }

    pub(super) fn frame(&mut self, id: LinkId, frame: Frame, now: Instant) {
        let Some(link) = self.links.get(&id) else { return };
        let peer = link.peer.clone();
        self.counters.frame_in(&frame);
        let result = match (frame.body, peer) {
            (Some(Body::Refusal(refusal)), _) => {
                self.refused(id, &refusal, now);
                Ok(())
            }
            (Some(Body::Hello(hello)), None) => self.hello(id, &hello, now),
            (Some(Body::Items(items)), Some(_)) => {
                self.items_frame(id, items, now);
                Ok(())
            }
            (Some(Body::Digest(digest)), Some(_)) => self.digest_frame(id, &digest, now),
            (Some(Body::Summary(summary)), Some(_)) => self.summary_frame(id, &summary, now),
            (Some(Body::Unicast(unicast)), Some((from, _))) => self.unicast_frame(unicast, &from),
            (Some(Body::Hello(_)), Some(_)) => Err("a second hello"),
            (Some(_), None) => Err("a frame before the hello"),
            (None, _) => Err("a frame of no known kind"),
        };
        if let Err(what) = result {
            let remote = self.links.get(&id).map(|link| link.remote.clone()).unwrap_or_default();
            warn!(remote, what, "link closed: the other end does not speak our protocol");
            self.counters.links_garbage += 1;
            self.close(id, Code::Protocol, &format!("agent {} got {what}", self.greeting.name), now);
        }
    }

    pub(super) fn closed(&mut self, id: LinkId, reason: &str, now: Instant) {
        let Some(link) = self.links.remove(&id) else { return };
        self.routes = None;
        let Some((name, _)) = &link.peer else {
            if let Some(target) = &link.dialled {
                self.dial_failed(target, reason, now);
            }
            return;
        };
        if !link.double
            && let Some(heir) = self.links.values_mut().find(|other| other.peer == link.peer)
        {
            heir.double = false;
        }
        if self.links.values().any(|other| other.name() == Some(name)) {
            debug!(peer = %name, remote = link.remote, reason, "one link of several is down");
            return;
        }
        info!(peer = %name, remote = link.remote, reason, "link down");
        let lived = now.saturating_duration_since(link.opened);
        self.dialer.down(name, lived, now, &mut self.rng);
        self.neighbours_changed(now);
    }

    /// Closes links whose other end has not said hello in time.
    pub(super) fn close_silent(&mut self, now: Instant) {
        let silent: Vec<_> =
            self.links.iter().filter(|(_, link)| link.silent(now)).map(|(id, _)| *id).collect();
        for id in silent {
            self.close(id, Code::Protocol, "no hello came in time", now);
        }
    }

    /// Closes the doubles of links over which the other end has told all that it knows: it has that link, too. Where one
    /// end called twice it decides, else the one with the smaller name: so the two never close a different one each. Where
    /// the other end has moved, the first gives way.
    pub(super) fn close_doubles(&mut self, now: Instant) {
        let mut surplus = Vec::new();
        for (id, double) in self.links.iter().filter(|(_, link)| link.double) {
            let first = self.links.iter().find(|(_, first)| !first.double && first.peer == double.peer);
            let Some((first_id, first)) = first else { continue };
            let called_alike = first.dialled.is_some() == double.dialled.is_some();
            let decide = if called_alike {
                double.dialled.is_some()
            } else {
                double.name().is_some_and(|name| self.greeting.name < *name)
            };
            match self.has_moved(first, double) {
                Some(true) => surplus.push((*first_id, "its other end has moved")),
                Some(false) if first.synced && decide => surplus.push((*id, "a double of another link")),
                Some(false) | None => {}
            }
        }
        for (id, why) in surplus {
            self.close(id, Code::Surplus, why, now);
        }
    }

    /// Whether a double leads to where its peer is, and the first link to where that is not any more. `None`: it has not
    /// yet told over the double where it is.
    fn has_moved(&self, first: &Link, double: &Link) -> Option<bool> {
        let address = |link: &Link| link.remote.parse().ok().map(|remote: SocketAddr| remote.ip());
        let (Some(before), Some(now)) = (address(first), address(double)) else { return Some(false) };
        if before == now {
            return Some(false);
        }
        let record = double.synced.then(|| self.peers.get(double.name()?))??;
        let names = |address| record.endpoints.iter().any(|endpoint| endpoint.0.ip() == address);
        Some(names(now) && !names(before))
    }

    /// Closes half of the surplus links, the youngest first, never one that both ends want.
    pub(super) fn prune(&mut self, now: Instant) {
        let surplus = self.dialer.linked().len().saturating_sub(self.dialer.keep());
        let unwanted = |(_, link): &(&LinkId, &Link)| {
            let old = now.saturating_duration_since(link.opened) >= GRACE;
            old && link.exchanged() && link.name().is_some_and(|name| !self.dialer.wants(name))
        };
        let unwanted: Vec<_> = self.links.iter().filter(unwanted).map(|(id, _)| *id).collect();
        for id in unwanted.into_iter().rev().take(surplus.div_ceil(2)) {
            self.close(id, Code::Surplus, "there are links enough", now);
        }
    }

    /// Ends a link; the other end is told why.
    pub(super) fn close(&mut self, id: LinkId, code: Code, reason: &str, now: Instant) {
        self.send_always(id, Body::Refusal(Refusal { code: code.into(), reason: reason.into() }));
        self.output(Output::Close { link: id });
        self.closed(id, reason, now);
    }

    fn hello(&mut self, id: LinkId, hello: &Hello, now: Instant) -> Result<(), &'static str> {
        let Some(link) = self.links.get(&id) else { return Ok(()) };
        let (dialled, remote) = (link.dialled.clone(), link.remote.clone());
        match self.greeting.judge(hello, link.certified.as_deref()) {
            Verdict::Welcome { name, incarnation, seeds } => {
                self.learn_seeds(seeds);
                self.welcome(id, dialled, name, incarnation, now);
            }
            Verdict::Myself => self.close(id, Code::Surplus, "this agent itself", now),
            // Anybody can say so: it counts where somebody answers to that at an endpoint.
            Verdict::ElderTwin if dialled.is_none() => {
                warn!(remote, name = %self.greeting.name, "an agent under our name says that it was started before");
                let reason = format!("agent {} looks whether its name is taken", self.greeting.name);
                self.count_refused(Code::NameTaken);
                self.close(id, Code::NameTaken, &reason, now);
                self.call_twin_at(&remote, now);
            }
            Verdict::ElderTwin => {
                let name = &self.greeting.name;
                let reason = format!(
                    "the name {name} is taken: an agent that was started before answers at {remote}; \
                     stop it or use another --name"
                );
                self.end(Output::Fatal(reason));
            }
            Verdict::YoungerTwin(refusal) => {
                warn!(remote, name = %self.greeting.name, "another agent was started under our name; it is refused");
                self.count_refused(refusal.code());
                self.close(id, refusal.code(), &refusal.reason, now);
                self.no_twin();
            }
            Verdict::Refused(refusal) => {
                warn!(remote, peer = hello.name, reason = refusal.reason, "link refused");
                self.count_refused(refusal.code());
                let (who, _) = remote.rsplit_once(':').unwrap_or((&remote, ""));
                let what = format!("was turned away: {}", refusal.reason);
                self.refusals.note(who, &what, now);
                if refusal.code() != Code::Identity {
                    self.object(dialled.is_some(), &remote, &refusal.reason);
                }
                self.close(id, refusal.code(), &refusal.reason, now);
            }
            Verdict::Garbage(what) => return Err(what),
        }
        Ok(())
    }

    /// Who joins learns the seeds from the first whom it meets: whose shares are whose follows from them.
    pub(super) fn learn_seeds(&mut self, seeds: Vec<PeerName>) {
        if self.greeting.seeds.is_empty() && !seeds.is_empty() {
            self.replica.seeds(&seeds);
            self.greeting.seeds.clone_from(&seeds);
            self.output(Output::Seeds(seeds));
        }
    }

    fn welcome(
        &mut self,
        id: LinkId,
        dialled: Option<Target>,
        name: PeerName,
        incarnation: Incarnation,
        now: Instant,
    ) {
        match &dialled {
            Some(target @ Target::Peer(expected)) if *expected != name => {
                let reason = format!("peer {name} answers at the address of {expected}");
                self.dialer.failed(target, &reason, now, &mut self.rng);
            }
            Some(Target::Twin) => self.no_twin(),
            Some(target) => self.dialer.met(target, &name),
            None => {}
        }
        if !self.make_room(dialled.is_some() && self.dialer.wants(&name), now) {
            self.count_refused(Code::Surplus);
            self.close(id, Code::Surplus, &format!("agent {} has links enough", self.greeting.name), now);
            return;
        }
        let peer = Some((name.clone(), incarnation));
        let double = self.links.values().any(|link| link.peer == peer);
        let Some(link) = self.links.get_mut(&id) else { return };
        link.welcome(name.clone(), incarnation);
        link.double = double;
        self.fresh_until = now + FRESH;
        if double {
            debug!(peer = %name, remote = link.remote, dialled = dialled.is_some(), "a double of another link");
            return;
        }
        info!(peer = %name, remote = link.remote, dialled = dialled.is_some(), "link up");
        self.dialer.up(&name);
        self.routes = None;
        self.neighbours_changed(now);
    }

    /// Makes room for one more link where there is none: a link that nobody wants ends, the oldest first, once both sides
    /// have told each other everything. That turns an overrun bootstrap node into a turnstile.
    fn make_room(&mut self, ours: bool, now: Instant) -> bool {
        if self.links.values().filter(|link| link.peer.is_some()).count() < self.dialer.max_links() {
            return true;
        }
        let unwanted = |link: &Link| link.name().is_some_and(|name| !self.dialer.wants(name));
        let victim =
            self.links.iter().find(|(_, link)| link.exchanged() && unwanted(link)).map(|(id, _)| *id);
        match victim.or_else(|| self.links.iter().find(|(_, link)| ours && unwanted(link)).map(|(id, _)| *id))
        {
            Some(id) => {
                self.close(id, Code::Surplus, "there are links enough", now);
                true
            }
            None => false,
        }
    }

    /// The other end has ended the link, and says why.
    fn refused(&mut self, id: LinkId, refusal: &Refusal, now: Instant) {
        let remote = self.links.get(&id).map(|link| link.remote.clone()).unwrap_or_default();
        let reason: String = refusal.reason.chars().filter(|c| !c.is_control()).take(300).collect();
        match refusal.code() {
            Code::Surplus | Code::Leaving => debug!(remote, reason, "the other end closed the link"),
            _ => warn!(remote, reason, "the other end refused the link"),
        }
        if matches!(refusal.code(), Code::UniverseDiffers | Code::SeedDiffers) {
            let dialled = self.links.get(&id).is_some_and(|link| link.dialled.is_some());
            self.object(dialled, &remote, &reason);
        }
        let dialled = self.links.get(&id).and_then(|link| link.dialled.clone());
        self.output(Output::Close { link: id });
        let unneeded = self.links.get(&id).filter(|link| !link.double && refusal.code() == Code::Surplus);
        let unneeded = unneeded.and_then(|link| link.name().cloned());
        self.closed(id, &reason, now);
        if let Some(name) = unneeded.filter(|_| dialled.is_some()) {
            self.dialer.unneeded(&name, now, &mut self.rng);
        }
        // We knew the other end for what it is, so the link was up for a moment; it is in vain all the same.
        let is_for_good = !matches!(refusal.code(), Code::Surplus | Code::Leaving | Code::NameTaken);
        if let Some(target) = dialled.filter(|_| is_for_good) {
            self.dial_failed(&target, &reason, now);
        }
    }

    /// One whom we called and we do not belong to one network, as our configurations differ.
    fn object(&mut self, dialled: bool, remote: &str, reason: &str) {
        if dialled {
            self.objection = Some(format!("the peer at {remote} belongs to another network: {reason}"));
        }
    }

    /// Sends a frame if the link has room for it.
    pub(super) fn send(&mut self, id: LinkId, body: Body) -> bool {
        if !self.links.get(&id).is_some_and(Link::has_room) {
            *self.counters.frames_dropped.entry("no_room").or_default() += 1;
            return false;
        }
        self.send_always(id, body);
        true
    }

    /// Sends a frame of the comparison of replicas, or leaves it to the next one.
    pub(super) fn send_calmly(&mut self, id: LinkId, body: Body) {
        match self.links.get(&id).is_some_and(Link::is_calm) {
            true => self.send_always(id, body),
            false => *self.counters.frames_dropped.entry("no_room").or_default() += 1,
        }
    }

    fn send_always(&mut self, id: LinkId, body: Body) {
        if let Some(link) = self.links.get_mut(&id) {
            link.sent();
            let frame = Frame { body: Some(body) };
            self.counters.frame_out(&frame);
            self.output(Output::Send { link: id, frame });
        }
    }

    fn count_refused(&mut self, code: Code) {
        let reason = match code {
            Code::Unspecified | Code::Protocol => "protocol",
            Code::NameTaken => "name_taken",
            Code::UniverseDiffers => "universe_differs",
            Code::SeedDiffers => "seed_differs",
            Code::Surplus => "surplus",
            Code::Leaving => "leaving",
            Code::Identity => "identity",
        };
        *self.counters.links_refused.entry(reason).or_default() += 1;
    }
}

/// Links beyond the bound that may be waiting for their hello.
pub const STRANGERS: usize = 16;
/// A link younger than that is not surplus: who called may have come to join.
const GRACE: Duration = Duration::from_secs(1);
