//! The topology: joining, loss, partitions, names, leaving.

use rand::RngExt;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use weft::{
    mesh::{
        gossip::{Gossiper, Item, Rejected},
        machine::Input,
    },
    types::PeerName,
};
use weft_lab::sim::net::{App, Outbox, Sim};
pub use weft_lab::sim::{all_equal, all_know_all, running};

type Mesh = Sim<()>;

/// `n` agents that know the first one only, after they have settled.
fn settled(seed: u64, n: usize) -> Mesh {
    let mut sim = Sim::new(seed);
    for i in 0..n {
        let bootstrap: &[usize] = if i == 0 { &[] } else { &[0] };
        sim.start(&format!("node-{i}"), bootstrap, ());
    }
    sim.expect("all know all at the start", SECOND * 10, all_know_all);
    sim.run(SECOND * 5);
    sim
}

fn all_know<A: App>(sim: &Sim<A>, name: &PeerName) -> bool {
    running(sim).all(|n| sim.nodes[n].mesh.peers().get(name).is_some())
}

fn links(sim: &Mesh, n: usize) -> usize {
    sim.nodes[n].mesh.links().iter().filter(|link| link.peer.is_some()).count()
}

#[test]
fn a_hundred_agents_know_a_joiner_within_two_seconds() {
    let mut sim = settled(1, 97);
    join(&mut sim, 3);
}

#[test]
fn and_so_with_thirty_percent_loss() {
    let mut sim = settled(2, 97);
    sim.weather.loss = 0.3;
    join(&mut sim, 3);
    sim.expect("all replicas are equal", SECOND * 10, all_equal);
}

/// Lets some join one after the other, each through any one of those that are there.
fn join(sim: &mut Mesh, joiners: usize) {
    for joiner in 0..joiners {
        let bootstrap = sim.rng.random_range(0..sim.nodes.len());
        sim.start(&format!("joiner-{joiner}"), &[bootstrap], ());
        let took = sim.expect("all know the joiner, and it knows all", SECOND * 2, all_know_all);
        println!("joiner {joiner}: {took:?}");
        sim.run(SECOND);
    }
}

#[test]
fn a_hundred_that_start_at_once_know_each_other_within_two_seconds() {
    let mut sim = Sim::new(1);
    for i in 0..100 {
        sim.start(&format!("node-{i}"), if i == 0 { &[] } else { &[0] }, ());
    }
    let took = sim.expect("all know all", SECOND * 2, all_know_all);
    println!("{took:?}");
    sim.expect("all replicas are equal", SECOND * 10, all_equal);
}

#[test]
fn links_stay_few_and_the_graph_is_whole() {
    let sim = settled(4, 100);
    let most = (0..100).map(|n| links(&sim, n)).max();
    assert!(most <= Some(16), "{most:?}");
    let mut reached = BTreeSet::from([0]);
    for hops in 0.. {
        assert!(hops <= 7, "{} after {hops} hops", reached.len());
        if reached.len() == 100 {
            break;
        }
        let linked =
            |n: &usize| sim.nodes[*n].mesh.links().into_iter().filter_map(|l| l.peer).map(|(name, _)| name);
        let names: BTreeSet<_> = reached.iter().flat_map(linked).collect();
        reached.extend((0..100).filter(|n| names.contains(&sim.nodes[*n].name)));
    }
}

#[test]
fn two_that_call_each_other_settle_on_the_link_that_came_first() {
    for seed in 20..60 {
        let mut sim: Mesh = Sim::new(seed);
        for n in 0..2 {
            sim.start(&format!("node-{n}"), &[], ());
            sim.kill(n);
        }
        let first = sim.rng.random_range(0..2);
        for (n, other) in [(first, 1 - first), (1 - first, first)] {
            sim.revive(n, &[other], Vec::new());
            let pause = sim.rng.random_range(0..2000);
            sim.run(Duration::from_millis(pause));
        }
        sim.expect("they know each other", SECOND * 3, all_know_all);
        sim.run(SECOND / 10);
        let ids = |sim: &Mesh| -> Vec<_> {
            sim.nodes.iter().flat_map(|node| node.mesh.links().into_iter().map(|link| link.id)).collect()
        };
        let settled = ids(&sim);
        assert_eq!((links(&sim, 0), links(&sim, 1)), (1, 1), "seed {seed}");
        sim.run(SECOND * 10);
        assert_eq!(ids(&sim), settled, "seed {seed}: another link took its place");
        for node in &sim.nodes {
            let opened = node.mesh.counters().links_opened;
            assert!(opened <= 2, "seed {seed}: {opened} links were opened");
        }
    }
}

#[test]
fn a_quiet_network_is_quiet() {
    let mut sim = settled(5, 50);
    sim.run(SECOND * 10);
    let bytes = |sim: &Mesh| sim.nodes.iter().map(|node| node.mesh.counters().bytes_out).sum::<u64>();
    let before = bytes(&sim);
    sim.run(SECOND * 10);
    let each = (bytes(&sim) - before) / 50 / 10;
    assert!(each < 2000, "{each} bytes a second and agent");
}

#[test]
fn of_two_with_one_name_the_later_refuses_and_the_elder_stays() {
    let mut sim = settled(6, 5);
    let twin = sim.start("node-3", &[0], ());
    sim.expect("the later one ends", SECOND * 3, |sim| sim.nodes[twin].fatal.is_some());
    let reason = sim.nodes[twin].fatal.clone().unwrap_or_default();
    assert!(reason.contains("node-3") && reason.contains("10.0.0.3:6783"), "{reason}");
    sim.run(SECOND * 5);
    assert!(sim.nodes[..5].iter().all(|node| node.fatal.is_none()));
    let elder = sim.nodes[3].address;
    for node in &sim.nodes[..5] {
        let record = node.mesh.peers().get(&sim.nodes[3].name).unwrap();
        assert_eq!(record.endpoints[0].0, elder);
    }
}

#[test]
fn twins_that_met_after_both_had_joined_part_in_favour_of_the_elder() {
    let mut sim = settled(7, 4);
    sim.weather.groups = vec![(0..4).collect(), (4..6).collect()];
    sim.run(SECOND);
    sim.start("node-1", &[], ());
    let bridge = sim.start("bridge", &[4, 0], ());
    sim.run(SECOND * 3);
    assert!(sim.nodes[4].mesh.joined());
    sim.weather.groups.clear();
    sim.expect("the later one ends", SECOND * 5, |sim| sim.nodes[4].fatal.is_some());
    sim.run(SECOND * 5);
    for n in [0, 1, 2, 3, bridge] {
        assert_eq!(sim.nodes[n].fatal, None);
        let record = sim.nodes[n].mesh.peers().get(&sim.nodes[1].name).unwrap();
        assert_eq!(record.endpoints[0].0, sim.nodes[1].address, "the elder outbids");
    }
}

#[test]
fn a_restart_is_not_a_twin() {
    let mut sim = settled(8, 5);
    for _ in 0..3 {
        sim.restart(2, &[0]);
        let took = sim.expect("it joins", SECOND, |sim| sim.nodes[2].joined.is_some());
        assert!(took < SECOND / 4, "{took:?}");
        sim.expect("all are told", SECOND * 2, all_equal);
        assert_eq!(sim.nodes[2].fatal, None);
    }
}

#[test]
fn a_partition_heals_within_two_seconds() {
    for (seed, n, split) in [(9, 2, 1), (10, 3, 1), (11, 20, 10), (12, 40, 13)] {
        let mut sim = settled(seed, n);
        sim.weather.groups = vec![(0..split).collect(), (split..n).collect()];
        sim.run(SECOND * 30);
        for node in [0, n - 1] {
            sim.handle(node, Input::Update(Box::new(|record| record.mtu += 1)));
        }
        sim.expect("each side goes on", SECOND * 5, |sim| {
            knows_of(sim, 0, split - 1) && knows_of(sim, n - 1, split)
        });
        assert!(!knows_of(&sim, 0, n - 1));
        sim.weather.groups.clear();
        let took = sim.expect("both sides know all", SECOND * 2, |sim| {
            (0..sim.nodes.len()).all(|node| knows_of(sim, 0, node) && knows_of(sim, n - 1, node))
        });
        println!("{n} agents: {took:?}");
        sim.expect("all replicas are equal", SECOND * 30, all_equal);
    }
}

/// Whether `by` knows the newest record of `of`.
fn knows_of(sim: &Mesh, of: usize, by: usize) -> bool {
    let own = sim.nodes[of].mesh.peers().own();
    sim.nodes[by].mesh.peers().get(&own.name).is_some_and(|record| record.mtu == own.mtu)
}

#[test]
fn half_of_them_die_and_the_rest_hold_together() {
    let mut sim = settled(13, 60);
    for n in (0..60).filter(|n| n % 2 == 1) {
        sim.kill(n);
    }
    sim.run(SECOND * 20);
    sim.handle(0, Input::Update(Box::new(|record| record.mtu = 1234)));
    sim.expect("the living hear", SECOND * 2, |sim| (0..60).step_by(2).all(|n| knows_of(sim, 0, n)));
}

#[test]
fn who_leaves_is_known_to_have_left() {
    let mut sim = settled(14, 30);
    let name = sim.nodes[7].name.clone();
    sim.handle(7, Input::Leave);
    sim.expect("it ends", SECOND, |sim| sim.nodes[7].left);
    sim.expect("all know", SECOND * 2, |sim| {
        running(sim).all(|n| sim.nodes[n].mesh.peers().get(&name).is_none())
    });
    sim.run(SECOND * 5);
    assert!(running(&sim).all(|n| sim.nodes[n].mesh.links().iter().all(|link| match &link.peer {
        Some((peer, _)) => *peer != name,
        None => true,
    })));
    let back = sim.start("node-7", &[0], ());
    sim.expect("it may come back", SECOND * 2, |sim| all_know(sim, &sim.nodes[back].name));
}

/// Counts what it is told.
#[derive(Default)]
struct Names {
    told: Vec<Item>,
    unicasts: Vec<(PeerName, Vec<u8>)>,
}

struct NamesGossip;

impl Gossiper for NamesGossip {
    fn channel(&self) -> &'static str {
        "names"
    }

    fn check(&mut self, item: &Item) -> Result<(), Rejected> {
        item.body.starts_with(b"ok").then_some(()).ok_or(Rejected::Undecodable)
    }
}

impl App for Names {
    fn gossipers(&self) -> Vec<Box<dyn Gossiper>> {
        vec![Box::new(NamesGossip)]
    }

    fn items(&mut self, _: &str, items: Vec<Item>, _: Instant, _: &mut Outbox) {
        self.told.extend(items);
    }

    fn unicast(&mut self, from: PeerName, _: &str, body: Vec<u8>, _: Instant, _: &mut Outbox) {
        self.unicasts.push((from, body));
    }
}

fn fact(key: u8, rank: u32) -> Item {
    let (channel, body) = ("names".to_string(), b"ok".to_vec());
    Item { channel, key: vec![key], rank: rank.to_be_bytes().into(), body, signature: Vec::new() }
}

fn named(seed: u64, n: usize) -> Sim<Names> {
    let mut sim = Sim::new(seed);
    for i in 0..n {
        sim.start(&format!("node-{i}"), if i == 0 { &[] } else { &[0] }, Names::default());
    }
    sim.expect("all know all", SECOND * 10, all_know_all);
    // Until links have found their places, and it has been told.
    sim.run(SECOND * 5);
    sim
}

#[test]
fn a_slow_link_merges_and_does_not_queue() {
    let mut sim = named(15, 2);
    sim.nodes[1].slowness = SECOND / 2;
    for rank in 0..1000 {
        sim.handle(0, Input::Publish(vec![fact(1, rank), fact(2, rank)]));
        sim.run(SECOND / 200);
        assert!(sim.nodes[0].mesh.links().iter().all(|link| link.waiting <= 4));
    }
    sim.expect("the last state arrives", SECOND * 5, |sim| {
        sim.nodes[1].app.told.contains(&fact(1, 999)) && sim.nodes[1].app.told.contains(&fact(2, 999))
    });
    let told = sim.nodes[1].app.told.len();
    assert!(told < 60, "1000 states were told in {told}");
}

#[test]
fn news_reach_their_subjects_once_and_bad_ones_nobody() {
    let mut sim = named(16, 20);
    sim.handle(3, Input::Publish(vec![fact(1, 1), Item { body: b"no".into(), ..fact(2, 1) }]));
    sim.run(SECOND * 3);
    assert!(sim.nodes[3].app.told.is_empty(), "a subject is not told what it said");
    assert!((0..20).filter(|n| *n != 3).all(|n| sim.nodes[n].app.told == [fact(1, 1)]));
    assert_eq!(sim.nodes[3].mesh.counters().items_rejected["undecodable"], 1);
}

#[test]
fn unicasts_find_their_way_over_relays() {
    let mut sim = named(17, 60);
    for to in 1..60 {
        let input =
            Input::Unicast { to: sim.nodes[to].name.clone(), channel: "names".into(), body: vec![to as u8] };
        sim.handle(0, input);
    }
    sim.run(SECOND);
    let from = sim.nodes[0].name.clone();
    assert!((1..60).all(|n| sim.nodes[n].app.unicasts == [(from.clone(), vec![n as u8])]));
    assert!(sim.nodes.iter().any(|node| node.mesh.counters().unicasts_relayed > 0));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let mut sim = settled(18, 20);
        sim.weather.loss = 0.2;
        sim.run(SECOND * 5);
        sim.nodes.iter().map(|node| node.mesh.counters().clone()).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

const SECOND: Duration = Duration::from_secs(1);
