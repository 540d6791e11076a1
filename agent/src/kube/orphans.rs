//! Attachments whose pod the cluster does not know any more: runtimes do not always say that a pod is gone.
//!
//! ```text
//!   pod known ──missing for two minutes──▶ suspect ──missing in a list asked for now──▶ taken away
//! ```
//! Pods are told apart by their UID. An attachment without one was not made for Kubernetes and is nobody's business here.
//! An empty list proves nothing: where agents run as pods, at least this one is on the node.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Pod, Uid};
use crate::types::{AttachmentKey, PodRef};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Since when each attachment's pod has been missing.
#[derive(Debug, Default)]
pub struct Orphans {
    missing: BTreeMap<AttachmentKey, Instant>,
}

impl Orphans {
    /// Takes in what there is, by a list that may be old; returns what is to be asked about. Call again about every half
    /// [`GRACE`].
    pub fn observe<'a>(
        &mut self,
        attachments: impl IntoIterator<Item = (&'a AttachmentKey, &'a PodRef)>,
        pods: &[Pod],
        now: Instant,
    ) -> BTreeSet<AttachmentKey> {
        let missing = missing(attachments, pods);
        self.missing.retain(|key, _| missing.contains(key));
        for key in missing {
            self.missing.entry(key).or_insert(now);
        }
        let overdue = |since: &Instant| now.saturating_duration_since(*since) >= GRACE;
        self.missing.iter().filter(|(_, since)| overdue(since)).map(|(key, _)| key.clone()).collect()
    }
}

/// Which attachments have a pod that is not in the list.
pub fn missing<'a>(
    attachments: impl IntoIterator<Item = (&'a AttachmentKey, &'a PodRef)>,
    pods: &[Pod],
) -> BTreeSet<AttachmentKey> {
    if pods.is_empty() {
        return BTreeSet::new();
    }
    let known: BTreeSet<&Uid> = pods.iter().flat_map(|pod| &pod.uids).collect();
    let is_missing = |pod: &PodRef| !pod.uid.is_empty() && !known.contains(&Uid(pod.uid.clone()));
    attachments.into_iter().filter(|(_, pod)| is_missing(pod)).map(|(key, _)| key.clone()).collect()
}

/// Longer than it takes a runtime to end a pod that has been deleted by force.
pub const GRACE: Duration = Duration::from_secs(120);

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use super::*;

    fn attachment(id: &str, uid: &str) -> (AttachmentKey, PodRef) {
        let pod = PodRef { uid: uid.into(), namespace: "default".into(), name: id.into() };
        (AttachmentKey::new(id, "eth0").unwrap(), pod)
    }

    fn pods(uids: &[&str]) -> Vec<Pod> {
        let pod = |uid: &&str| Pod {
            namespace: "default".into(),
            name: format!("p{uid}"),
            uids: [Uid(uid.to_string())].into(),
        };
        uids.iter().map(pod).collect()
    }

    #[test]
    fn a_pod_that_is_missing_for_long_is_asked_about_and_one_that_comes_back_is_not() {
        let (start, mut orphans) = (Instant::now(), Orphans::default());
        let all = [attachment("a", "1"), attachment("b", "2"), attachment("c", "3")];
        let mut observe = |pods: &[Pod], at| {
            let keys = orphans.observe(all.iter().map(|(key, pod)| (key, pod)), pods, start + at);
            keys.into_iter().map(|key| key.container_id().to_string()).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(observe(&pods(&["1"]), Duration::ZERO), none);
        assert_eq!(observe(&pods(&["1", "3"]), GRACE / 2), none, "one came back");
        assert_eq!(observe(&pods(&["1"]), GRACE), ["b"]);
        assert_eq!(observe(&pods(&["1"]), GRACE * 2), ["b", "c"]);
    }

    #[test]
    fn an_empty_list_and_a_pod_without_a_uid_prove_nothing() {
        let all = [attachment("a", "1"), attachment("b", "")];
        let missing = |pods: &[Pod]| super::missing(all.iter().map(|(key, pod)| (key, pod)), pods).len();
        assert_eq!((missing(&[]), missing(&pods(&["9"])), missing(&pods(&["1"]))), (0, 1, 0));
    }
}
