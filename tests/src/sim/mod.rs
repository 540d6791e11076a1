//! The simulator: many agents, each the real pure code, on a virtual clock and network; replayable from a seed.

pub mod keys;
pub mod net;
pub mod pool;
pub mod world;

use net::{App, Sim};
use std::collections::BTreeSet;

pub fn running<A: App>(sim: &Sim<A>) -> impl Iterator<Item = usize> {
    (0..sim.nodes.len())
        .filter(|n| !sim.nodes[*n].left && !sim.nodes[*n].dead && sim.nodes[*n].fatal.is_none())
}

/// Each running agent knows every other, and its record as it is now.
pub fn all_know_all<A: App>(sim: &Sim<A>) -> bool {
    let names: BTreeSet<_> = running(sim).map(|n| &sim.nodes[n].name).collect();
    running(sim).all(|n| {
        let mesh = &sim.nodes[n].mesh;
        mesh.joined() && mesh.peers().others().count() + 1 == names.len() && {
            mesh.peers().others().all(|record| names.contains(&record.name))
        }
    })
}

/// All replicas are alike, bit by bit.
pub fn all_equal<A: App>(sim: &Sim<A>) -> bool {
    let mut running = running(sim).map(|n| &sim.nodes[n].mesh);
    running.next().is_none_or(|first| running.all(|other| first.items().eq(other.items())))
}
