//! Topology and addresses together: a hundred agents in any weather.

use crate::mesh::all_know_all;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use weft::ipam::seed::SeedPlan;
pub use weft_lab::sim::world::{SECOND, World, name, universe};

#[test]
fn a_hundred_agents_share_the_addresses_in_any_weather() {
    std::thread::scope(|scope| {
        (1..=3).for_each(|seed| drop(scope.spawn(move || in_any_weather(seed))));
    });
}

fn in_any_weather(seed: u64) {
    let mut world = World::new(seed, 3, None);
    world.all_have_space(SECOND * 5);
    // Joiners in crowds, each through any one that is there; they wait for space no longer than this.
    while world.sim.nodes.len() < 100 {
        let there = world.sim.nodes.len();
        for _ in 0..50.min(100 - there) {
            let through = world.rng.random_range(0..there);
            world.join(&[through], &SeedPlan::default());
        }
        let took = world.all_have_space(SECOND * 2);
        println!("seed {seed}: {there} and a crowd more have space after {took:?}");
        world.live(SECOND / 4);
    }
    world.sim.expect("all know all", SECOND * 10, all_know_all);

    world.sim.weather.loss = 0.3;
    world.sim.weather.delay = SECOND / 100..SECOND / 5;
    world.live(SECOND);
    for _ in 0..4 {
        let n = world.rng.random_range(0..100);
        world.restart(n);
        world.live(SECOND / 4);
    }
    world.sim.weather.loss = 0.0;

    // Both sides go on, each with what it has.
    world.sim.weather.groups = split(&mut world.rng, 100).into();
    let attached = world.attached;
    world.live(SECOND * 4);
    for _ in 0..3 {
        let n = world.rng.random_range(1..100);
        world.restart(n);
        world.live(SECOND / 4);
    }
    assert!(world.attached > attached);
    world.sim.weather.groups.clear();
    world.live(SECOND * 2);
    for n in 0..100 {
        assert!(world.attach(n), "seed {seed}: node {n} has no address to hand out");
    }
    world.agrees();
    println!("seed {seed}: {} pods were attached, {} refused for now", world.attached, world.refused);
}

/// Two groups that everybody is in one of.
fn split(rng: &mut ChaCha8Rng, nodes: usize) -> [BTreeSet<usize>; 2] {
    let (left, right) = (0..nodes).partition(|_| rng.random_bool(0.5));
    [left, right]
}
