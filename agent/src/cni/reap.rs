//! What nobody will take away any more: reservations that were never activated, and allocations whose veth is gone.
//!
//! ```text
//!   Reserve ─▶ pending ──Activate──▶ active ──Release──▶ nothing
//!                 │ a minute            │ no veth for a minute
//!                 ╰────────▶ released ◀─╯
//! ```
//!
//! Not every runtime calls GC, so the agent looks by itself.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Allocation, Veth};
use crate::types::AttachmentKey;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime},
};

/// How old what nobody speaks for must be: three times ADD's deadline, so that no ADD in progress is hit.
pub const GRACE: Duration = Duration::from_secs(60);

/// Since when each attachment has waited for the next step.
#[derive(Debug, Default)]
pub struct Reaper {
    pending: BTreeMap<AttachmentKey, Instant>,
    /// When each was activated, less than [`GRACE`] ago.
    activated: BTreeMap<AttachmentKey, Instant>,
    without_veth: BTreeMap<AttachmentKey, Instant>,
}

impl Reaper {
    /// An ADD has begun; a repeated one begins anew.
    pub fn reserved(&mut self, key: &AttachmentKey, now: Instant) {
        self.without_veth.remove(key);
        self.pending.insert(key.clone(), now);
    }

    /// An ADD is done: how long it took, if it began under this agent.
    pub fn activated(&mut self, key: &AttachmentKey, now: Instant) -> Option<Duration> {
        self.without_veth.remove(key);
        self.activated.insert(key.clone(), now);
        self.pending.remove(key).map(|since| now.saturating_duration_since(since))
    }

    pub fn released(&mut self, key: &AttachmentKey) {
        self.pending.remove(key);
        self.activated.remove(key);
        self.without_veth.remove(key);
    }

    /// An ADD is under way and not overdue, or was done after `since`: its attachment is nobody else's business.
    pub fn is_added(&self, key: &AttachmentKey, since: Instant, now: Instant) -> bool {
        self.is_adding(key, now) || self.activated.get(key).is_some_and(|at| *at >= since)
    }

    /// Nobody has spoken for it for [`GRACE`], and nobody has begun to.
    pub fn is_dead(&self, key: &AttachmentKey, now: Instant) -> bool {
        let overdue = |since: &Instant| now.saturating_duration_since(*since) >= GRACE;
        // An ADD that has just begun speaks for its allocation.
        !self.is_adding(key, now)
            && [self.pending.get(key), self.without_veth.get(key)].into_iter().flatten().any(overdue)
    }

    /// Takes in what there is now and returns what to detach and release. Call again about every half [`GRACE`].
    pub fn observe(
        &mut self,
        allocations: &[Allocation],
        veths: &[Veth],
        now: Instant,
    ) -> Vec<AttachmentKey> {
        let have_veth: BTreeSet<_> = veths.iter().map(|veth| &veth.alias.attachment).collect();
        let bare: BTreeSet<_> =
            allocations.iter().map(|a| &a.attachment).filter(|key| !have_veth.contains(key)).collect();
        self.without_veth.retain(|key, _| bare.contains(key));
        self.activated.retain(|_, at| now.saturating_duration_since(*at) < GRACE);
        for key in bare {
            self.without_veth.entry(key.clone()).or_insert(now);
        }
        let waiting: BTreeSet<_> = self.pending.keys().chain(self.without_veth.keys()).collect();
        waiting.into_iter().filter(|key| self.is_dead(key, now)).cloned().collect()
    }

    fn is_adding(&self, key: &AttachmentKey, now: Instant) -> bool {
        self.pending.get(key).is_some_and(|since| now.saturating_duration_since(*since) < GRACE)
    }
}

/// GC: our attachments that the runtime doesn't know, older than [`GRACE`]; and veths without an allocation.
pub fn collect(
    valid: &BTreeSet<(String, String)>,
    allocations: &[Allocation],
    veths: &[Veth],
    now: SystemTime,
) -> Vec<AttachmentKey> {
    let is_valid =
        |key: &AttachmentKey| valid.contains(&(key.container_id().to_string(), key.ifname().to_string()));
    let old = |a: &&Allocation| now.duration_since(a.reserved).is_ok_and(|age| age >= GRACE);
    let allocated: BTreeSet<_> = allocations.iter().map(|a| &a.attachment).collect();
    let orphans = veths.iter().map(|veth| &veth.alias.attachment).filter(|key| !allocated.contains(key));
    let mut dead: Vec<_> = allocations
        .iter()
        .filter(old)
        .map(|a| &a.attachment)
        .chain(orphans)
        .filter(|key| !is_valid(key))
        .cloned()
        .collect();
    dead.sort();
    dead.dedup();
    dead
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use super::*;
    use crate::types::{Mac, PodRef, VethAlias};

    fn key(id: &str) -> AttachmentKey {
        AttachmentKey::new(id, "eth0").unwrap()
    }

    fn allocation(id: &str, reserved: SystemTime) -> Allocation {
        Allocation {
            attachment: key(id),
            pod: PodRef::default(),
            addresses: vec![],
            mac: Mac::derived(b"x"),
            reserved,
        }
    }

    fn veth(id: &str) -> Veth {
        Veth {
            alias: VethAlias { attachment: key(id), addresses: vec![], pod: PodRef::default() },
            host_interface: key(id).host_interface(),
            up: true,
            on_bridge: true,
            routes: vec![],
        }
    }

    #[test]
    fn a_reservation_that_is_never_activated_times_out() {
        let (start, mut reaper) = (Instant::now(), Reaper::default());
        let allocations = [allocation("a", SystemTime::UNIX_EPOCH), allocation("b", SystemTime::UNIX_EPOCH)];
        reaper.reserved(&key("a"), start);
        reaper.reserved(&key("b"), start);
        assert_eq!(reaper.activated(&key("b"), start + GRACE / 2), Some(GRACE / 2));
        let veths = [veth("a"), veth("b")];
        assert_eq!(reaper.observe(&allocations, &veths, start + GRACE / 2), []);
        assert_eq!(reaper.observe(&allocations, &veths, start + GRACE), [key("a")]);
        assert!(reaper.is_dead(&key("a"), start + GRACE));
        let mut late = Reaper::default();
        late.reserved(&key("a"), start);
        assert_eq!(late.observe(&allocations, &veths, start + GRACE), [key("a")]);
        late.activated(&key("a"), start + GRACE);
        assert!(!late.is_dead(&key("a"), start + GRACE), "its ADD was only slow");
        reaper.released(&key("a"));
        assert_eq!(reaper.observe(&allocations[1..], &veths[1..], start + GRACE * 2), []);
    }

    #[test]
    fn an_allocation_without_a_veth_is_freed_after_a_minute_but_not_under_an_add() {
        let (start, mut reaper) = (Instant::now(), Reaper::default());
        let allocations = [allocation("a", SystemTime::UNIX_EPOCH)];
        assert_eq!(reaper.observe(&allocations, &[], start), []);
        assert_eq!(reaper.observe(&allocations, &[veth("a")], start + GRACE / 2), [], "it came back");
        assert_eq!(reaper.observe(&allocations, &[], start + GRACE), []);
        assert_eq!(reaper.observe(&allocations, &[], start + GRACE * 2), [key("a")]);
        reaper.reserved(&key("a"), start + GRACE * 2);
        assert_eq!(reaper.observe(&allocations, &[], start + GRACE * 2), []);
    }

    #[test]
    fn what_is_added_again_is_known_until_it_is_released() {
        let (start, mut reaper) = (Instant::now(), Reaper::default());
        let later = start + GRACE / 2;
        assert!(!reaper.is_added(&key("a"), start, later));
        reaper.reserved(&key("a"), start);
        assert!(reaper.is_added(&key("a"), later, later), "it is under way");
        reaper.activated(&key("a"), start);
        assert!(reaper.is_added(&key("a"), start, later));
        assert!(!reaper.is_added(&key("a"), later, later), "it was done before");
        reaper.released(&key("a"));
        assert!(!reaper.is_added(&key("a"), start, later));
    }

    #[test]
    fn gc_takes_what_the_runtime_does_not_know_if_it_is_older_than_a_minute() {
        let now = SystemTime::UNIX_EPOCH + GRACE * 10;
        let allocations =
            [allocation("old", now - GRACE), allocation("young", now), allocation("kept", now - GRACE)];
        let valid = BTreeSet::from([("kept".to_string(), "eth0".to_string())]);
        let veths = [veth("orphan"), veth("kept"), veth("young")];
        assert_eq!(collect(&valid, &allocations, &veths, now), [key("old"), key("orphan")]);
    }
}
