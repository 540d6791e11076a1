//! Who lives, as far as can be told from here.

use crate::{
    mesh::{peers::PeerSet, task::Status},
    types::PeerName,
};
use std::collections::BTreeSet;

/// The other ends of our links, whom they name as neighbours, and so on: what the dead have said of themselves does not
/// count.
pub fn alive(peers: &PeerSet, mesh: Option<&Status>) -> BTreeSet<PeerName> {
    let links = mesh.into_iter().flat_map(|mesh| &mesh.links);
    let linked = links.filter_map(|link| Some(link.peer.as_ref()?.0.clone()));
    closure(linked.collect(), |name| {
        let neighbours = peers.get(name).into_iter().flat_map(|record| &record.neighbours);
        neighbours.map(|neighbour| neighbour.name.clone()).collect()
    })
}

fn closure(linked: Vec<PeerName>, named: impl Fn(&PeerName) -> Vec<PeerName>) -> BTreeSet<PeerName> {
    let (mut alive, mut next) = (BTreeSet::new(), linked);
    while let Some(name) = next.pop() {
        if alive.insert(name.clone()) {
            next.extend(named(&name));
        }
    }
    alive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_dead_is_not_alive_by_its_own_word() {
        let name = |name: &str| -> PeerName { name.parse().unwrap() };
        let named = |by: &PeerName| -> Vec<PeerName> {
            let named: &[&str] = match by.as_str() {
                "a" => &["me", "b"],
                "b" => &["a"],
                "x" => &["a", "y"],
                "y" => &["b", "x"],
                _ => &[],
            };
            named.iter().map(|n| name(n)).collect()
        };
        assert_eq!(closure(vec![name("a")], named), ["me", "a", "b"].map(name).into());
    }
}
