//! What the API server has said last, as far as it concerns us.
//!
//! ```text
//!   apply, delete: one object        reset: all of a kind, after a list
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Node, Pod, Uid,
    board::{Board, Takeover},
};
use crate::types::PeerName;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A snapshot of what is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Nodes as last heard; from the cache until they have been listed.
    pub nodes: Arc<BTreeMap<PeerName, Node>>,
    /// This node's pods, by `namespace/name`; none until they have been listed.
    pub pods: Option<Arc<BTreeMap<String, Pod>>>,
    /// The nodes have been listed since the start, so that who is not among them is gone.
    pub listed: bool,
    pub board: Board,
    /// Those on the board whose node we know to be gone.
    pub believed: Arc<BTreeSet<Takeover>>,
}

/// Builds the view, one object at a time.
#[derive(Debug, Default)]
pub struct Index {
    view: View,
}

impl Index {
    /// From what was cached: good for calling peers, not for taking anybody for gone.
    pub fn new(nodes: BTreeMap<PeerName, Node>, board: Board) -> Self {
        let believed = Arc::new(board.takeovers.iter().cloned().collect());
        Self { view: View { nodes: Arc::new(nodes), board, believed, ..View::default() } }
    }

    pub fn view(&self) -> &View {
        &self.view
    }

    pub fn apply_node(&mut self, node: Node) {
        // The heartbeats of a thousand nodes change nothing for us.
        if self.view.nodes.get(&node.name) != Some(&node) {
            Arc::make_mut(&mut self.view.nodes).insert(node.name.clone(), node);
        }
    }

    /// A node of that name that has come since stays.
    pub fn delete_node(&mut self, name: &PeerName, uid: &Uid) {
        if self.view.nodes.get(name).is_some_and(|node| node.uid == *uid) {
            Arc::make_mut(&mut self.view.nodes).remove(name);
        }
    }

    pub fn reset_nodes(&mut self, nodes: Vec<Node>) {
        self.view.nodes = Arc::new(nodes.into_iter().map(|node| (node.name.clone(), node)).collect());
        self.view.listed = true;
    }

    pub fn apply_pod(&mut self, pod: Pod) {
        if let Some(pods) = &mut self.view.pods
            && pods.get(&pod.key()) != Some(&pod)
        {
            Arc::make_mut(pods).insert(pod.key(), pod);
        }
    }

    /// A pod of that name that has come since stays.
    pub fn delete_pod(&mut self, pod: &Pod) {
        if let Some(pods) = &mut self.view.pods
            && pods.get(&pod.key()).is_some_and(|known| !known.uids.is_disjoint(&pod.uids))
        {
            Arc::make_mut(pods).remove(&pod.key());
        }
    }

    pub fn reset_pods(&mut self, pods: Vec<Pod>) {
        self.view.pods = Some(Arc::new(pods.into_iter().map(|pod| (pod.key(), pod)).collect()));
    }

    pub fn set_board(&mut self, board: Board) {
        self.view.board = board;
    }

    /// Takeovers that are agreed on, of nodes that are not there by what we have heard: to be made sure of.
    pub fn unconfirmed(&self) -> Vec<Takeover> {
        let View { nodes, board, believed, .. } = &self.view;
        let there = |t: &Takeover| nodes.get(&t.node).is_some_and(|node| node.uid == t.uid);
        let new = board.takeovers.iter().filter(|t| !believed.contains(t) && !there(t));
        new.filter(|_| self.view.listed).cloned().collect()
    }

    pub fn believe(&mut self, takeover: Takeover) {
        Arc::make_mut(&mut self.view.believed).insert(takeover);
    }
}

impl Pod {
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, uid: &str) -> Node {
        Node {
            name: name.parse().unwrap(),
            uid: Uid(uid.into()),
            endpoints: Vec::new(),
            pod_cidrs: Vec::new(),
            tainted: false,
            network_available: false,
        }
    }

    fn pod(name: &str, uid: &str) -> Pod {
        Pod { namespace: "default".into(), name: name.into(), uids: [Uid(uid.into())].into() }
    }

    #[test]
    fn what_was_cached_takes_nobody_for_gone() {
        let cached = BTreeMap::from([("a".parse().unwrap(), node("a", "1"))]);
        let mut index = Index::new(cached, Board::default());
        assert!(!index.view().listed && index.view().nodes.len() == 1);
        index.reset_nodes(vec![node("b", "2")]);
        assert!(index.view().listed);
        assert_eq!(index.view().nodes.keys().map(PeerName::as_str).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_late_delete_does_not_hit_the_successor() {
        let mut index = Index::default();
        index.reset_nodes(vec![node("a", "1")]);
        index.apply_node(node("a", "2"));
        index.delete_node(&"a".parse().unwrap(), &Uid("1".into()));
        assert_eq!(index.view().nodes.len(), 1);
        index.delete_node(&"a".parse().unwrap(), &Uid("2".into()));
        assert!(index.view().nodes.is_empty());

        index.reset_pods(vec![pod("web-0", "1")]);
        index.apply_pod(pod("web-0", "2"));
        index.delete_pod(&pod("web-0", "1"));
        assert_eq!(index.view().pods.as_ref().unwrap().len(), 1);
        index.delete_pod(&pod("web-0", "2"));
        assert!(index.view().pods.as_ref().unwrap().is_empty());
    }

    #[test]
    fn a_takeover_is_believed_only_of_a_node_that_is_gone() {
        let takeover = |uid: &str| Takeover {
            node: "a".parse().unwrap(),
            uid: Uid(uid.into()),
            epoch: 1,
            taker: "b".parse().unwrap(),
        };
        let mut index = Index::default();
        index.set_board(Board { seeds: Vec::new(), takeovers: vec![takeover("1")] });
        assert_eq!(index.unconfirmed(), [], "who is there is not known yet");
        index.reset_nodes(vec![node("a", "1")]);
        assert_eq!(index.unconfirmed(), []);
        // Gone, and come again.
        index.apply_node(node("a", "2"));
        assert_eq!(index.unconfirmed(), [takeover("1")]);
        index.believe(takeover("1"));
        assert_eq!(index.unconfirmed(), []);
        assert!(index.view().believed.contains(&takeover("1")));
    }

    #[test]
    fn no_pods_are_not_the_same_as_none_listed() {
        let mut index = Index::default();
        index.apply_pod(pod("web", "1"));
        assert_eq!(index.view().pods, None);
        index.reset_pods(Vec::new());
        assert_eq!(index.view().pods.as_ref().unwrap().len(), 0);
    }

    #[test]
    fn an_update_that_changes_nothing_leaves_the_view_alone() {
        let mut index = Index::default();
        index.reset_nodes(vec![node("a", "1")]);
        let before = index.view().nodes.clone();
        index.apply_node(node("a", "1"));
        assert!(Arc::ptr_eq(&before, &index.view().nodes));
    }
}
