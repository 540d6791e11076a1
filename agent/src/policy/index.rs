//! What is known of pods, namespaces, policies and nodes, and whose each address is.
//!
//! ```text
//!   apply, delete: one object     reset: all of a kind      settle: what is attached here
//!        │
//!        └──▶ endpoints: address ──▶ pod      touched: addresses whose pod has changed since they were taken
//! ```
//! Pods are known by UID, so that a late delete does not hit the successor. An address belongs to the pod that is attached
//! with it on this node, else to the pod that has claimed it last.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    convert::NAME_LABEL,
    model::{Block, ClusterPolicy, Namespace, Namespaces, Pod, PodPeer, Policy, PolicyId, Tier, Uid},
};
use crate::types::PodRef;
use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::IpAddr,
    sync::Arc,
};

/// Addresses of other nodes by the address that stands for the node in the overlay.
pub type Nodes = BTreeMap<IpAddr, BTreeSet<IpAddr>>;

#[derive(Clone, Debug, Default)]
pub struct Index {
    /// Pods that nobody describes are pods without labels.
    plain: bool,
    /// All there is has been heard once.
    complete: bool,
    pods: BTreeMap<Uid, Arc<Pod>>,
    /// Who says that an address is its own, the last one last.
    claims: BTreeMap<IpAddr, Vec<Uid>>,
    /// This node's pods.
    attached: BTreeMap<IpAddr, PodRef>,
    namespaces: BTreeMap<String, Namespace>,
    policies: BTreeMap<PolicyId, Arc<Policy>>,
    /// In the order in which they are asked.
    cluster_policies: BTreeMap<(Tier, u16, String), Arc<ClusterPolicy>>,
    nodes: Nodes,
    /// Addresses of this node itself.
    own: BTreeSet<IpAddr>,
    endpoints: BTreeMap<IpAddr, Arc<Pod>>,
    touched: Touched,
}

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Nothing but whose these addresses are, or what those are like.
    Addresses(BTreeSet<IpAddr>),
    Everything,
}

impl Index {
    /// Without an API server nobody describes pods unless somebody says what is to be known of them.
    pub fn new(plain: bool) -> Self {
        Self { plain, complete: plain, ..Self::default() }
    }

    /// What has been taken in so far is all there is: it can be enforced.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether nothing has been said yet of pods, namespaces and policies.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.namespaces.is_empty() && self.policies.is_empty()
    }

    pub fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.namespaces.values()
    }

    pub fn apply_pod(&mut self, pod: Pod) {
        let uid = pod.uids[0].clone();
        if self.pods.get(&uid).is_some_and(|known| **known == pod) {
            return;
        }
        let claimed = if pod.matchable { pod.addresses.clone() } else { BTreeSet::new() };
        let mut concerned = self.withdraw(&uid, &claimed);
        for address in claimed {
            let claims = self.claims.entry(address).or_default();
            if !claims.contains(&uid) {
                claims.push(uid.clone());
            }
            concerned.insert(address);
        }
        concerned.extend(self.seats(&pod));
        self.pods.insert(uid, Arc::new(pod));
        self.reassign(concerned);
    }

    /// Only the pod of that UID; another of its name stays.
    pub fn delete_pod(&mut self, uid: &Uid) {
        if let Some(pod) = self.pods.remove(uid) {
            let mut concerned = self.withdraw(uid, &BTreeSet::new());
            concerned.extend(self.seats(&pod));
            self.reassign(concerned);
        }
    }

    pub fn reset_pods(&mut self, pods: Vec<Pod>) {
        let kept: BTreeSet<Uid> = pods.iter().map(|pod| pod.uids[0].clone()).collect();
        let gone: Vec<Uid> = self.pods.keys().filter(|uid| !kept.contains(uid)).cloned().collect();
        gone.iter().for_each(|uid| self.delete_pod(uid));
        pods.into_iter().for_each(|pod| self.apply_pod(pod));
    }

    pub fn apply_namespace(&mut self, namespace: Namespace) {
        let known = self.namespaces.get(&namespace.name);
        if known.map(|known| &known.labels) != Some(&namespace.labels) {
            self.touched = Touched::Everything;
        }
        self.namespaces.insert(namespace.name.clone(), namespace);
    }

    pub fn delete_namespace(&mut self, name: &str, uid: &Uid) {
        if self.namespaces.get(name).is_some_and(|known| known.uid == *uid) {
            self.namespaces.remove(name);
            self.touched = Touched::Everything;
        }
    }

    pub fn reset_namespaces(&mut self, namespaces: Vec<Namespace>) {
        let kept: BTreeSet<_> = namespaces.iter().map(|namespace| namespace.name.clone()).collect();
        let before = self.namespaces.len();
        self.namespaces.retain(|name, _| kept.contains(name));
        if self.namespaces.len() != before {
            self.touched = Touched::Everything;
        }
        namespaces.into_iter().for_each(|namespace| self.apply_namespace(namespace));
    }

    pub fn apply_policy(&mut self, policy: Policy) {
        if self.policies.get(&policy.id).is_none_or(|known| **known != policy) {
            self.policies.insert(policy.id.clone(), Arc::new(policy));
            self.touched = Touched::Everything;
        }
    }

    pub fn delete_policy(&mut self, id: &PolicyId, uid: &Uid) {
        if self.policies.get(id).is_some_and(|known| known.uid == *uid) {
            self.policies.remove(id);
            self.touched = Touched::Everything;
        }
    }

    pub fn reset_policies(&mut self, policies: Vec<Policy>) {
        let kept: BTreeSet<_> = policies.iter().map(|policy| policy.id.clone()).collect();
        let before = self.policies.len();
        self.policies.retain(|id, _| kept.contains(id));
        if self.policies.len() != before {
            self.touched = Touched::Everything;
        }
        policies.into_iter().for_each(|policy| self.apply_policy(policy));
    }

    pub fn apply_cluster_policy(&mut self, policy: ClusterPolicy) {
        let same = |known: &&Arc<ClusterPolicy>| known.name == policy.name;
        if self.cluster_policies.values().find(same).is_none_or(|known| **known != policy) {
            self.cluster_policies.retain(|_, known| known.name != policy.name);
            let rank = (policy.tier, policy.priority, policy.name.clone());
            self.cluster_policies.insert(rank, Arc::new(policy));
            self.touched = Touched::Everything;
        }
    }

    pub fn delete_cluster_policy(&mut self, name: &str, uid: &Uid) {
        let before = self.cluster_policies.len();
        self.cluster_policies.retain(|_, known| known.name != name || known.uid != *uid);
        if self.cluster_policies.len() != before {
            self.touched = Touched::Everything;
        }
    }

    pub fn reset_cluster_policies(&mut self, policies: Vec<ClusterPolicy>) {
        let kept: BTreeSet<_> = policies.iter().map(|policy| policy.name.clone()).collect();
        let before = self.cluster_policies.len();
        self.cluster_policies.retain(|_, known| kept.contains(&known.name));
        if self.cluster_policies.len() != before {
            self.touched = Touched::Everything;
        }
        policies.into_iter().for_each(|policy| self.apply_cluster_policy(policy));
    }

    pub fn set_nodes(&mut self, nodes: Nodes) {
        if self.nodes != nodes {
            self.nodes = nodes;
            self.touched = Touched::Everything;
        }
    }

    /// The addresses of this node itself.
    pub fn set_own(&mut self, own: BTreeSet<IpAddr>) {
        self.own = own;
    }

    pub fn own(&self) -> &BTreeSet<IpAddr> {
        &self.own
    }

    /// What is attached on this node.
    pub fn settle(&mut self, attached: BTreeMap<IpAddr, PodRef>) {
        let before = mem::replace(&mut self.attached, attached);
        let differs = |address: &&IpAddr| before.get(*address) != self.attached.get(*address);
        let concerned = before.keys().chain(self.attached.keys()).filter(differs).copied().collect();
        self.reassign(concerned);
    }

    /// What has changed since this was asked last.
    pub fn take_touched(&mut self) -> Touched {
        mem::take(&mut self.touched)
    }

    pub fn attached(&self) -> &BTreeMap<IpAddr, PodRef> {
        &self.attached
    }

    /// Whether it is known what the pod with an address of this node is like.
    pub fn knows(&self, address: IpAddr) -> bool {
        self.attached.get(&address).is_some_and(|pod| self.plain || self.described(pod).is_some())
    }

    pub fn endpoint(&self, address: IpAddr) -> Option<&Arc<Pod>> {
        self.endpoints.get(&address)
    }

    pub fn endpoints(&self) -> &BTreeMap<IpAddr, Arc<Pod>> {
        &self.endpoints
    }

    pub fn policies(&self) -> &BTreeMap<PolicyId, Arc<Policy>> {
        &self.policies
    }

    /// The policies of a pod's namespace that isolate it in some direction.
    pub fn selecting<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = &'a Arc<Policy>> {
        let first = PolicyId { namespace: pod.namespace.clone(), name: String::new() };
        let own = self.policies.range(first..).map(|(_, policy)| policy);
        own.take_while(|policy| policy.id.namespace == pod.namespace).filter(|policy| policy.selects(pod))
    }

    pub fn cluster_policies(&self) -> impl Iterator<Item = &Arc<ClusterPolicy>> {
        self.cluster_policies.values()
    }

    pub fn cluster_policy(&self, name: &str) -> Option<&Arc<ClusterPolicy>> {
        self.cluster_policies().find(|policy| policy.name == name)
    }

    /// A tier's policies that are for a pod, in the order in which they are asked.
    pub fn ruling<'a>(&'a self, tier: Tier, pod: &'a Pod) -> impl Iterator<Item = &'a Arc<ClusterPolicy>> {
        let of_tier = self.cluster_policies().filter(move |policy| policy.tier == tier);
        of_tier.filter(|policy| self.pod_matches(&policy.subject, pod))
    }

    pub fn pod_matches(&self, peer: &PodPeer, pod: &Pod) -> bool {
        self.namespace_matches(&peer.namespaces, &pod.namespace) && peer.pods.matches(&pod.labels)
    }

    /// In a cluster a namespace that is not known (yet) has no labels that could be selected.
    pub fn namespace_matches(&self, wanted: &Namespaces, name: &str) -> bool {
        match wanted {
            Namespaces::Named(own) => own == name,
            Namespaces::Selected(selector) => match self.namespaces.get(name) {
                Some(namespace) => selector.matches(&namespace.labels),
                None => self.plain && selector.matches(&[(NAME_LABEL.into(), name.into())].into()),
            },
        }
    }

    /// The address that stands for a node counts as each of the node's own.
    pub fn block_matches(&self, block: &Block, address: IpAddr) -> bool {
        block.contains(address)
            || self.nodes.get(&address).is_some_and(|own| own.iter().any(|own| block.contains(*own)))
    }

    /// Addresses that stand for nodes of which a block holds an address.
    pub fn nodes_in<'a>(&'a self, block: &'a Block) -> impl Iterator<Item = IpAddr> + 'a {
        self.nodes.keys().copied().filter(|address| self.block_matches(block, *address))
    }

    /// Takes back what a pod has claimed beside `kept`.
    fn withdraw(&mut self, uid: &Uid, kept: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let mut withdrawn = BTreeSet::new();
        let had = self.pods.get(uid).map(|pod| pod.addresses.clone());
        // Of one that was just deleted nothing is left to look at but the claims themselves.
        let had = had.unwrap_or_else(|| self.claims.keys().copied().collect());
        for address in had.difference(kept) {
            let Some(claims) = self.claims.get_mut(address) else { continue };
            if let Some(place) = claims.iter().position(|claim| claim == uid) {
                claims.remove(place);
                withdrawn.insert(*address);
            }
            if claims.is_empty() {
                self.claims.remove(address);
            }
        }
        withdrawn
    }

    /// Addresses of this node that a pod is attached with.
    fn seats(&self, pod: &Pod) -> Vec<IpAddr> {
        let of_pod = |attached: &PodRef| pod.uids.iter().any(|uid| names(uid, attached));
        self.attached.iter().filter(|(_, attached)| of_pod(attached)).map(|(address, _)| *address).collect()
    }

    fn reassign(&mut self, addresses: BTreeSet<IpAddr>) {
        for address in addresses {
            match self.owner(address) {
                Some(pod) => self.endpoints.insert(address, pod),
                None => self.endpoints.remove(&address),
            };
            if let Touched::Addresses(touched) = &mut self.touched {
                touched.insert(address);
            }
        }
    }

    fn owner(&self, address: IpAddr) -> Option<Arc<Pod>> {
        let attached = self.attached.get(&address);
        if let Some(pod) = attached.and_then(|attached| self.described(attached)) {
            return Some(pod.clone()).filter(|pod| pod.matchable);
        }
        let last = self.claims.get(&address).and_then(|claims| claims.last());
        let claimed = last.and_then(|uid| self.pods.get(uid)).cloned();
        claimed
            .or_else(|| attached.filter(|_| self.plain).map(|attached| Arc::new(implied(attached, address))))
    }

    fn described(&self, attached: &PodRef) -> Option<&Arc<Pod>> {
        let first = self.pods.get(&Uid(attached.uid.clone())).filter(|_| !attached.uid.is_empty());
        let by_name = || self.pods.get(&Uid(attached.to_string()));
        let by_other = || self.pods.values().find(|pod| pod.uids[1..].iter().any(|uid| names(uid, attached)));
        first.or_else(by_name).or_else(by_other)
    }
}

/// Whether a UID is that of an attached pod. One that was made up from a name stands for every pod of that name.
fn names(uid: &Uid, attached: &PodRef) -> bool {
    !uid.0.is_empty() && (uid.0 == attached.uid || uid.0 == attached.to_string())
}

/// A pod of which only its attachment is known.
fn implied(attached: &PodRef, address: IpAddr) -> Pod {
    Pod {
        uids: vec![Uid(attached.uid.clone())],
        namespace: attached.namespace.clone(),
        name: attached.name.clone(),
        labels: BTreeMap::new(),
        addresses: [address].into(),
        ports: Vec::new(),
        matchable: true,
    }
}

impl Default for Touched {
    fn default() -> Self {
        Self::Addresses(BTreeSet::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, name: &str, address: &str) -> Pod {
        Pod {
            uids: vec![Uid(uid.into())],
            namespace: "x".into(),
            name: name.into(),
            labels: BTreeMap::new(),
            addresses: [address.parse().unwrap()].into(),
            ports: Vec::new(),
            matchable: true,
        }
    }

    fn name_at(index: &Index, address: &str) -> Option<String> {
        index.endpoint(address.parse().unwrap()).map(|pod| pod.name.clone())
    }

    #[test]
    fn a_late_delete_does_not_take_the_address_from_its_new_pod() {
        let mut index = Index::default();
        index.apply_pod(pod("1", "old", "10.32.0.2"));
        index.apply_pod(pod("2", "new", "10.32.0.2"));
        assert_eq!(name_at(&index, "10.32.0.2").as_deref(), Some("new"));
        index.delete_pod(&Uid("1".into()));
        assert_eq!(name_at(&index, "10.32.0.2").as_deref(), Some("new"));
        index.delete_pod(&Uid("2".into()));
        assert_eq!(name_at(&index, "10.32.0.2"), None);
    }

    #[test]
    fn a_pod_that_completes_gives_its_address_up() {
        let mut index = Index::default();
        index.apply_pod(pod("1", "job", "10.32.0.2"));
        index.apply_pod(Pod { matchable: false, ..pod("1", "job", "10.32.0.2") });
        assert_eq!(name_at(&index, "10.32.0.2"), None);
        index.apply_pod(pod("2", "web", "10.32.0.2"));
        // The first one's object changes once more before it goes.
        index.apply_pod(Pod {
            matchable: false,
            labels: [("a".into(), "b".into())].into(),
            ..pod("1", "job", "10.32.0.2")
        });
        assert_eq!(name_at(&index, "10.32.0.2").as_deref(), Some("web"));
    }

    #[test]
    fn what_is_attached_here_has_its_address_whatever_others_claim() {
        let mut index = Index::new(false);
        let attached = PodRef { uid: "1".into(), namespace: "x".into(), name: "web".into() };
        let address = "10.32.0.2".parse().unwrap();
        index.settle([(address, attached)].into());
        assert!(!index.knows(address) && index.endpoint(address).is_none());
        index.apply_pod(Pod { addresses: BTreeSet::new(), ..pod("1", "web", "10.32.0.2") });
        assert!(index.knows(address));
        index.apply_pod(pod("2", "liar", "10.32.0.2"));
        assert_eq!(name_at(&index, "10.32.0.2").as_deref(), Some("web"));
        index.settle(BTreeMap::new());
        assert_eq!(name_at(&index, "10.32.0.2").as_deref(), Some("liar"));
    }

    #[test]
    fn a_pod_of_a_plain_host_is_known_by_its_name() {
        let mut index = Index::new(true);
        let attached = PodRef { uid: String::new(), namespace: "x".into(), name: "web".into() };
        let address = "10.32.0.2".parse().unwrap();
        index.settle([(address, attached)].into());
        assert!(index.knows(address));
        let labelled = Pod { labels: [("a".into(), "b".into())].into(), ..pod("x/web", "web", "10.32.0.9") };
        index.apply_pod(labelled);
        assert_eq!(index.endpoint(address).unwrap().labels.len(), 1);
    }

    #[test]
    fn a_late_delete_does_not_remove_the_policy_that_has_the_name_now() {
        let (mut index, id) = (Index::default(), PolicyId { namespace: "x".into(), name: "p".into() });
        let policy = |uid: &str| Policy {
            uid: Uid(uid.into()),
            id: id.clone(),
            subject: Default::default(),
            ingress: Some(Vec::new()),
            egress: None,
        };
        index.apply_policy(policy("1"));
        index.apply_policy(policy("2"));
        index.delete_policy(&id, &Uid("1".into()));
        assert_eq!(index.policies()[&id].uid, Uid("2".into()));
        index.delete_policy(&id, &Uid("2".into()));
        assert!(index.policies().is_empty());
    }

    #[test]
    fn one_pods_change_touches_its_addresses_only() {
        let mut index = Index::default();
        index.apply_namespace(Namespace { uid: Uid("n".into()), name: "x".into(), labels: BTreeMap::new() });
        assert_eq!(index.take_touched(), Touched::Everything);
        index.apply_pod(pod("1", "web", "10.32.0.2"));
        assert_eq!(index.take_touched(), Touched::Addresses(["10.32.0.2".parse().unwrap()].into()));
        index.apply_pod(pod("1", "web", "10.32.0.2"));
        assert_eq!(index.take_touched(), Touched::default());
    }
}
