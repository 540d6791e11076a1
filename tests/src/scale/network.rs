//! One network: it grows, rests, somebody joins, somebody leaves, it is cut in two and becomes one again.
use super::figures::Figures;
use crate::{
    linux,
    progress::Progress,
    sim::{
        keys::Keys,
        net::{App, Sim},
        running,
        world::{SECOND, World},
    },
};
use rand::RngExt;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use weft::{
    ipam::{seed::SeedPlan, token::CHANNEL as RING},
    mesh::machine::Input,
};

/// How a network begins.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    /// From three nodes on, in crowds of joiners.
    Grows { sealed: bool },
    /// All at once, as after a power cut: each node knows the others, and what is whose.
    Again,
}

/// # Panics
/// When the network does not do in time what it should; the message names the seed.
#[must_use]
pub fn measure(nodes: usize, seed: u64, start: Start, progress: &Progress) -> Figures {
    let settles = SETTLES.max(SETTLES_PER_NODE * nodes as u32);
    let (began, memory_before) = (Instant::now(), linux::allocated());
    let step = |what: &str| progress.step(format!("{nodes} nodes, {:.0?}: {what}", began.elapsed()));
    let mut world = match start {
        Start::Grows { sealed } => World::new(seed, SEEDS, sealed.then(Keys::new)),
        Start::Again => World::acquainted(seed, nodes),
    };
    world.sim.weather.delay = DELAY;
    world.sim.weather.loss = LOSS;
    grow(&mut world, nodes, &step);
    step("all find their links");
    world.sim.expect("all know as many as there are", SECOND * 30, counted);
    world.all_have_space(SECOND * 30);
    world.sim.run(settles);
    world.sim.expect("all know the same", SECOND * 60, alike);

    step("nothing happens");
    let bytes = sent(&world);
    world.sim.busy = Some(Duration::ZERO);
    world.sim.run(QUIET);
    let busy = world.sim.busy.take().unwrap_or_default();
    let quiet = QUIET.as_secs_f64() * nodes as f64;
    let idle_bytes_per_second = (sent(&world) - bytes) as f64 / quiet;
    let idle_processor = busy.as_secs_f64() / quiet;
    let memory_bytes = memory(&mut world, memory_before);

    step("one joins");
    let (joiner, through) = (nodes, world.rng.random_range(0..nodes));
    world.join(&[through], &SeedPlan::default());
    let join = world.sim.expect("all know the joiner, and it knows all", SECOND * 30, |sim| {
        let name = &sim.nodes[joiner].name;
        (0..nodes).all(|n| sim.nodes[n].mesh.peers().get(name).is_some()) && counted(sim)
    });
    world.sim.run(SECOND * 5);

    step("one leaves");
    world.sim.call(joiner, |app, now, out| app.leave(now, out));
    world.sim.run(SECOND);
    world.sim.handle(joiner, Input::Leave);
    let leave = world.sim.expect("all know who has left", SECOND * 30, |sim| {
        let name = &sim.nodes[joiner].name;
        sim.nodes[joiner].left && (0..nodes).all(|n| sim.nodes[n].mesh.peers().get(name).is_none())
    });
    world.sim.run(SECOND * 5);

    step("it is cut in two");
    let halves: (BTreeSet<_>, BTreeSet<_>) = (0..nodes).partition(|_| world.rng.random_bool(0.5));
    world.sim.weather.groups = vec![halves.0, halves.1];
    world.sim.run(CUT / 2);
    // Something happens on both sides meanwhile.
    (0..nodes).step_by(nodes / 10).for_each(|n| _ = world.attach(n));
    world.sim.run(CUT / 2);
    step("it is one again");
    world.sim.weather.groups.clear();
    let said: Vec<_> = running(&world.sim).map(|n| world.sim.nodes[n].mesh.peers().own().clone()).collect();
    let heal = world.sim.expect("all know again what all have said", SECOND * 60, |sim| {
        let rings = |n: usize| sim.nodes[n].mesh.digest().channels.into_iter().find(|it| it.channel == RING);
        let newest = |n: usize| {
            let peers = sim.nodes[n].mesh.peers();
            said.iter().all(|own| peers.get(&own.name).is_some_and(|known| known.rank() >= own.rank()))
        };
        let first = rings(0);
        running(sim).all(|n| rings(n) == first && newest(n))
    });
    step("it settles");
    world.sim.run(settles);
    world.sim.expect("all know the same again", SECOND * 60, |sim| counted(sim) && alike(sim));
    world.check();
    step("done");
    Figures {
        nodes,
        again: matches!(start, Start::Again),
        idle_bytes_per_second,
        memory_bytes,
        idle_processor,
        join_s: join.as_secs_f64(),
        leave_s: leave.as_secs_f64(),
        heal_s: heal.as_secs_f64(),
        took_s: began.elapsed().as_secs_f64(),
    }
}

/// More join, until so many nodes are there.
fn grow(world: &mut World, nodes: usize, step: &impl Fn(&str)) {
    while world.sim.nodes.len() < nodes {
        let there = world.sim.nodes.len();
        step(&format!("{there} are there, more join"));
        for _ in 0..(3 * there).min(nodes - there) {
            let through = world.rng.random_range(0..there);
            world.join(&[through], &SeedPlan::default());
        }
        world.sim.run(SECOND * 2);
        world.sim.expect("the joiners are known to all", SECOND * 30, counted);
    }
}

/// What an agent holds, as if it had a process of its own: its part of what all hold, and what it has in common with them.
fn memory(world: &mut World, before: usize) -> f64 {
    let together = linux::allocated();
    let nodes = world.sim.nodes.len();
    let some = || (0..nodes).step_by(nodes.div_ceil(SAMPLE));
    some().for_each(|n| world.sim.nodes[n].mesh.part());
    let common = (linux::allocated() as f64 - together as f64) / some().count() as f64;
    ((together - before) as f64 - common) / nodes as f64 + common
}

/// Everybody knows as many as there are.
fn counted<A: App>(sim: &Sim<A>) -> bool {
    let count = running(sim).count();
    running(sim).all(|n| sim.nodes[n].mesh.joined() && sim.nodes[n].mesh.peers().count() == count)
}

/// All replicas are alike, by their digests.
fn alike<A: App>(sim: &Sim<A>) -> bool {
    let mut digests = running(sim).map(|n| sim.nodes[n].mesh.digest());
    digests.next().is_none_or(|first| digests.all(|other| other == first))
}

/// Bytes of frames by all.
fn sent(world: &World) -> u64 {
    world.sim.nodes.iter().map(|node| node.mesh.counters().bytes_out).sum()
}

const SEEDS: usize = 3;
const DELAY: std::ops::Range<Duration> = Duration::from_millis(19)..Duration::from_millis(21);
/// Of whom it is measured what they have in common.
const SAMPLE: usize = 10;
/// Of frames.
const LOSS: f64 = 0.01;
/// Until links have found their places, and it has been told.
const SETTLES: Duration = Duration::from_secs(45);
/// In large networks links are told more rarely.
const SETTLES_PER_NODE: Duration = Duration::from_millis(45);
const QUIET: Duration = Duration::from_secs(30);
const CUT: Duration = Duration::from_secs(10);
