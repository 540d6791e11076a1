//! What the allocators of a few nodes do together, case by case.

use super::{
    Allocation, Allocator, Config, Found, IpamError, KnownPeer, Now, Owner, Request, Stored, WaitingFor,
    ring::Ring,
    seed::seeds,
    sim::{Op, Sim, key, request},
    span::{Layout, coalesce},
    token::Token,
};
use crate::types::{Incarnation, Mac, PodRef, VethAlias};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

#[test]
fn a_joiner_gets_space_from_the_seed() {
    let mut sim = Sim::new("10.32.0.0/12", "n0", 2);
    assert_eq!(sim.reserve(0, 1), Ok("10.32.0.2".parse().unwrap()));
    assert_eq!(sim.reserve(1, 1), Err(IpamError::NotReady(WaitingFor::FirstContact)));
    sim.sync(0, 1);
    let asked = IpamError::NotReady(WaitingFor::Space { from: "n0".parse().unwrap() });
    assert_eq!(sim.reserve(1, 1), Err(asked));
    sim.run(1);
    let address = sim.reserve(1, 1).unwrap();
    let view = sim.nodes[0].allocator.view();
    let owner = view.ranges.iter().find(|(prefix, _)| prefix.contains(&address)).unwrap();
    assert_eq!(owner.1.as_str(), "n1");
    assert_eq!(sim.nodes[1].allocator.view().counts.owned, 1 << 18, "a quarter: half of an equal share");
}

#[test]
fn a_seed_without_state_waits_for_a_peer() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 2);
    assert_eq!(sim.reserve(0, 1), Err(IpamError::NotReady(WaitingFor::FirstContact)));
    // Also after a restart: what it stored is only what it was told by the flag.
    sim.crash(0, false);
    assert_eq!(sim.reserve(0, 1), Err(IpamError::NotReady(WaitingFor::FirstContact)));
    sim.sync(1, 0);
    assert!(sim.reserve(0, 1).is_ok());
    // Its ring counts on, but it may have been declared dead meanwhile.
    sim.crash(0, false);
    let peers = vec!["n1".parse().unwrap()];
    assert_eq!(sim.reserve(0, 2), Err(IpamError::NotReady(WaitingFor::Return { peers })));
    assert!(sim.reserve(0, 1).is_ok(), "what it has handed out stays as it is");
    sim.sync(1, 0);
    assert!(sim.reserve(0, 2).is_ok());
}

#[test]
fn of_what_was_stored_twice_the_first_counts() {
    let sim = Sim::new("10.32.0.0/16", "n0", 1);
    let allocation = |address: &str, pod| Allocation {
        owner: Owner::Pod(key(0, pod)),
        address: address.parse().unwrap(),
        pod: PodRef::default(),
        mac: Mac([2, 0, 0, 0, 0, 1]),
        reserved_at: 0,
    };
    let allocations =
        vec![allocation("10.32.0.2", 1), allocation("10.32.0.2", 2), allocation("10.32.0.3", 1)];
    let stored = Stored { allocations: allocations.clone(), ..sim.nodes[0].disk.clone() };
    let mut allocator = sim.boot(&sim.nodes[0].name, stored);
    let pods = |allocator: &mut Allocator| {
        let all = allocator.view().allocations.into_values();
        all.filter(|one| one.owner != Owner::Bridge).map(|one| (*one).clone()).collect::<Vec<_>>()
    };
    assert_eq!(pods(&mut allocator), allocations[..1]);
    assert!(allocator.release(&key(0, 2), sim.now).is_none());
    assert!(allocator.release(&key(0, 1), sim.now).is_some());
    assert_eq!(pods(&mut allocator), []);
}

#[test]
fn a_longer_seed_list_does_not_disturb_a_ring() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 3);
    sim.run(1);
    let before = sim.nodes[0].allocator.view().ranges;
    sim.seeds = "n0,n1,n2".into();
    (0..2).for_each(|at| sim.crash(at, false));
    let (name, disk) = (sim.nodes[2].name.clone(), Stored::default());
    sim.nodes[2].allocator = sim.boot(&name, disk.clone());
    sim.nodes[2].disk = disk;
    sim.nodes[2].items.clear();
    sim.hear(2, Vec::new());
    assert_eq!(sim.nodes[0].allocator.view().ranges, before);
    sim.converge();
    sim.run(1);
    assert!(sim.reserve(2, 1).is_ok(), "a new seed asks for space like a joiner");
}

#[test]
fn who_lost_its_disk_owns_what_it_had_not_given_away() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 3);
    sim.run(3);
    for at in 0..3 {
        assert!(sim.reserve(at, 1).is_ok());
    }
    let before: Vec<_> = sim.nodes.iter_mut().map(|node| node.allocator.view().own).collect();
    let node = &mut sim.nodes[0];
    (node.disk, node.items) = Default::default();
    let pods = std::mem::take(&mut node.pods);
    sim.crash(0, false);
    assert!(sim.reserve(0, 2).is_err());
    sim.run(3);
    assert_eq!(sim.nodes.iter_mut().map(|node| node.allocator.view().own).collect::<Vec<_>>(), before);
    assert_eq!(sim.reserve(0, 1).ok(), pods.get(&1).copied());
}

#[test]
fn a_full_universe_is_told_from_a_slow_one() {
    let mut sim = Sim::new("10.32.0.0/29", "n0", 3);
    let mut addresses = BTreeSet::new();
    // Six addresses, of which each node's bridge takes one.
    for pod in 0..20 {
        sim.run(3);
        for node in 0..3 {
            if let Ok(address) = sim.reserve(node, pod) {
                assert!(sim.nodes[node].allocator.activated(&key(node, pod)));
                assert!(addresses.insert(address), "{address} twice");
            }
        }
    }
    assert_eq!(addresses.len(), 3);
    let full = sim.reserve(1, 99).unwrap_err();
    assert!(matches!(full, IpamError::Full { .. }), "{full}");
    assert!(full.to_string().contains("10.32.0.0/29 is full: n0 owns"), "{full}");
    // One pod leaves anywhere: any node can have its address.
    let (at, pod) = (0..3).find_map(|at| Some((at, *sim.nodes[at].pods.keys().next()?))).unwrap();
    sim.apply(&Op::Release { node: at, pod });
    sim.run(31);
    let _ = sim.reserve((at + 1) % 3, 50);
    sim.run(3);
    assert!(sim.reserve((at + 1) % 3, 50).is_ok());
}

#[test]
fn thousands_of_nodes_fit_a_12() {
    let layout = Layout::new("10.32.0.0/12".parse().unwrap());
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let mut ring = Ring::new(layout, None);
    let mut nodes: Vec<Allocator> = Vec::new();
    let publish = |ring: &mut Ring, node: &mut Allocator| {
        let effects = node.effects();
        for item in &effects.publish {
            ring.merge(Token::from_item(item, &layout).ok().unwrap());
        }
        effects
    };
    for n in 0..3000 {
        let config = Config {
            name: format!("n{n}").parse().unwrap(),
            universe: layout.universe(),
            seeds: seeds(if n == 0 { "n0" } else { "" }),
            sealer: None,
            has_bootstrap: n > 0,
            seeding: super::Seeding::Given,
            assigned: None,
        };
        let name = config.name.clone();
        // A joiner has heard of the greatest free range only, and asks for more than it can get.
        let best = ring.ranges().filter(|(_, token)| token.free).max_by_key(|(span, _)| span.size());
        let tokens: BTreeMap<_, _> =
            best.map(|(_, token)| (token.start, Arc::new(token.clone()))).into_iter().collect();
        let peers: Vec<KnownPeer> = tokens
            .values()
            .map(|token| KnownPeer {
                name: token.owner.clone(),
                reachable: true,
                held: Vec::new(),
                incarnation: Incarnation(1),
                deaths_digest: 0,
                absent: Vec::new(),
                left: false,
            })
            .collect();
        let stored = Stored { in_force: n > 0, tokens, ..Stored::default() };
        let mut joiner = Allocator::new(config, stored, Found::default(), now).unwrap();
        joiner.on_peers(&peers, now);
        for (giver, body) in publish(&mut ring, &mut joiner).unicasts {
            let giver = &mut nodes[giver.as_str()[1..].parse::<usize>().unwrap()];
            giver.on_unicast(&name, &body, now);
            joiner.on_items(&publish(&mut ring, giver).publish, now);
        }
        assert!(joiner.reserve(request(n, 1), now).is_ok(), "node {n} got no address");
        publish(&mut ring, &mut joiner);
        nodes.push(joiner);
    }
    assert_eq!(ring.shares(false).len(), 3000);
    assert_eq!(coalesce(ring.ranges().map(|(span, _)| span)), [layout.whole()]);
}

#[test]
fn who_leaves_hands_everything_over() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 2);
    sim.run(1);
    let address = sim.reserve(0, 1).unwrap();
    sim.apply(&Op::Release { node: 0, pod: 1 });
    let heir = sim.nodes[0].allocator.heir().unwrap();
    assert_eq!(heir.as_str(), "n1");
    let now = sim.now;
    sim.nodes[0].allocator.leave(&heir, now);
    sim.flush(0);
    sim.run(1);
    assert_eq!(sim.nodes[1].allocator.view().counts.owned, 65_536);
    assert_eq!(sim.reserve(0, 2), Err(IpamError::Left));
    assert_eq!(sim.nodes[0].disk.allocations, []);
    assert_eq!(sim.nodes[0].disk.resting, Vec::<IpAddr>::new());
    assert!(sim.nodes[1].allocator.view().ranges.iter().any(|(prefix, _)| prefix.contains(&address)));
}

#[test]
fn addresses_are_reclaimed_from_veths() {
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let config = Config {
        name: "n0".parse().unwrap(),
        universe: "10.32.0.0/16".parse().unwrap(),
        seeds: seeds("n0"),
        sealer: None,
        has_bootstrap: false,
        seeding: super::Seeding::Given,
        assigned: None,
    };
    let veth = |pod, address: &str| VethAlias {
        attachment: key(0, pod),
        addresses: vec![address.parse().unwrap()],
        pod: PodRef::default(),
    };
    let found = Found {
        veths: vec![veth(1, "10.32.0.2"), veth(2, "10.32.0.4"), veth(3, "10.32.0.4"), veth(4, "192.0.2.1")],
        macs: [("10.32.0.2".parse().unwrap(), Mac([2, 0, 0, 0, 0, 7]))].into(),
        bridge: Some("10.32.0.3".parse().unwrap()),
        ..Found::default()
    };
    let mut allocator = Allocator::new(config.clone(), Stored::default(), found, now).unwrap();
    let view = allocator.view();
    assert_eq!(view.bridge, Some("10.32.0.3".parse().unwrap()), "pods know it as their gateway");
    assert_eq!(view.allocations.len(), 3);
    assert!(view.reserved.is_empty(), "what has a veth is active");
    let mac = |address: &str| view.allocations[&address.parse::<IpAddr>().unwrap()].mac;
    assert_eq!(mac("10.32.0.2"), Mac([2, 0, 0, 0, 0, 7]), "as the kernel still knows it");
    assert_eq!(mac("10.32.0.4"), key(0, 2).pod_mac(), "as the pod has it unless it asked for another");
    assert_eq!(
        allocator.reserve(request(0, 1), now).unwrap().address,
        "10.32.0.2".parse::<IpAddr>().unwrap()
    );
    let next =
        |allocator: &mut Allocator, pod| allocator.reserve(request(0, pod), now).unwrap().address.to_string();
    assert_eq!(next(&mut allocator, 5), "10.32.0.1");
    assert_eq!(next(&mut allocator, 6), "10.32.0.5");

    // The node reboots: pods without a veth are gone, and their addresses rest.
    let mut disk = Stored::default();
    allocator.effects().changes.into_iter().for_each(|change| disk.apply(change));
    let rebooted = Found { veths: vec![veth(6, "10.32.0.5")], rebooted: true, ..Found::default() };
    let mut allocator = Allocator::new(config, disk, rebooted, now).unwrap();
    let owners: Vec<Owner> = allocator.view().allocations.values().map(|a| a.owner.clone()).collect();
    assert_eq!(owners, [Owner::Bridge, Owner::Pod(key(0, 6))]);
    assert_eq!(next(&mut allocator, 7), "10.32.0.6");
}

#[test]
fn a_pod_on_a_lost_address_is_held_and_the_new_owner_leaves_it_alone() {
    let mut sim = Sim::new("10.32.0.0/16", "n0,n1", 2);
    sim.run(1);
    // n1 lost its disk and has come back with a veth on an address of n0's.
    let now = sim.now;
    let veth = VethAlias {
        attachment: key(1, 1),
        addresses: vec!["10.32.0.2".parse().unwrap()],
        pod: PodRef::default(),
    };
    let found = Found { veths: vec![veth], ..Found::default() };
    let config = Config {
        name: "n1".parse().unwrap(),
        universe: sim.layout.universe(),
        seeds: seeds("n0,n1"),
        sealer: None,
        has_bootstrap: true,
        seeding: super::Seeding::Given,
        assigned: None,
    };
    sim.nodes[1].allocator = Allocator::new(config, Stored::default(), found, now).unwrap();
    let held = sim.nodes[1].allocator.view().held;
    assert_eq!(held, ["10.32.0.2".parse::<IpAddr>().unwrap()]);
    let peers = sim.peers();
    sim.nodes[0].allocator.on_peers(&peers, now);
    assert_eq!(sim.reserve(0, 1), Ok("10.32.0.3".parse().unwrap()));
    let wanted = Request { wanted: held, ..request(0, 2) };
    let refused = sim.nodes[0].allocator.reserve(wanted, now).unwrap_err();
    assert_eq!(refused.to_string(), "10.32.0.2 was asked for, but it is in use by a pod on n1");
}

#[test]
fn a_wanted_address_is_given_or_refused_with_the_reason() {
    let mut sim = Sim::new("10.32.0.0/24", "n0,n1", 2);
    sim.run(1);
    let now = sim.now;
    let mut ask = |wanted: &[&str], ranges: &[&str], pod| {
        let parse = |text: &&str| text.parse().unwrap();
        let wanted = wanted.iter().map(parse).collect();
        let ranges = ranges.iter().map(|text| text.parse().unwrap()).collect();
        let request = Request { wanted, ranges, ..request(0, pod) };
        sim.nodes[0].allocator.reserve(request, now).map(|a| a.address.to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(ask(&["10.32.0.9"], &[], 1).unwrap(), "10.32.0.9");
    assert_eq!(ask(&[], &[], 1).unwrap(), "10.32.0.9", "the same attachment");
    assert_eq!(ask(&[], &["10.32.0.64/28"], 2).unwrap(), "10.32.0.64");
    for (wanted, ranges, reason) in [
        (&["10.32.0.9"][..], &[][..], "in use by / (n0p1/eth0)"),
        (&["10.32.0.1"], &[], "in use by the bridge"),
        (&["10.32.0.0"], &[], "first or last address"),
        (&["10.32.0.200"], &[], "but n1 owns it"),
        (&["10.9.0.1"], &[], "10.32.0.0/24 (--universe) does not hold it"),
        (&["fd00::1"], &[], "does not hold it"),
        (&["10.32.0.11", "10.32.0.12"], &[], "only one address"),
        (&["10.32.0.9"], &["10.32.0.64/28"], "10.32.0.9 was asked for, but it does not lie in"),
        (&[], &["10.32.0.128/28"], "lies in the ranges asked for: 10.32.0.128/28"),
        (&[], &["192.0.2.0/24"], "lies in the ranges asked for: 192.0.2.0/24"),
    ] {
        let refused = ask(wanted, ranges, 3).unwrap_err();
        assert!(refused.contains(reason), "{refused}");
    }
    assert!(ask(&["10.32.0.10"], &[], 1).unwrap_err().contains("has 10.32.0.9 already"));
}

#[test]
fn a_reservation_that_is_not_activated_times_out() {
    let mut sim = Sim::new("10.32.0.0/24", "n0", 1);
    let (one, two) = (sim.reserve(0, 1).unwrap(), sim.reserve(0, 2).unwrap());
    assert!(sim.nodes[0].allocator.activated(&key(0, 1)));
    sim.wait(59);
    assert_eq!(sim.reserve(0, 2), Ok(two), "asking again starts the time anew");
    sim.wait(59);
    assert!(sim.nodes[0].allocator.view().allocations.contains_key(&two));
    sim.wait(1);
    let view = sim.nodes[0].allocator.view();
    assert!(view.allocations.contains_key(&one) && view.resting.contains(&two));
}

#[test]
fn assigned_ranges_are_used_and_neither_asked_for_nor_given() {
    let universe = "10.244.0.0/16".parse().unwrap();
    let assigned = |ranges: &[(&str, &str)]| -> super::Assigned {
        ranges.iter().map(|(name, prefix)| (name.parse().unwrap(), prefix.parse().unwrap())).collect()
    };
    let config = Config {
        name: "n0".parse().unwrap(),
        universe,
        seeds: Default::default(),
        sealer: None,
        has_bootstrap: true,
        seeding: super::Seeding::Given,
        assigned: Some(assigned(&[("n1", "10.244.1.0/24")])),
    };
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let mut allocator = Allocator::new(config, Stored::default(), Found::default(), now).unwrap();
    let none = allocator.reserve(request(0, 1), now);
    assert_eq!(none, Err(IpamError::NotReady(WaitingFor::Assignment)));
    let both = [("n0", "10.244.7.0/24"), ("n1", "10.244.1.0/24"), ("n1", "fd00::/64")];
    allocator.on_assigned(&assigned(&both), now);
    let address = allocator.reserve(request(0, 1), now).unwrap().address;
    assert!(assigned(&both)[0].1.contains(&address), "{address}");
    let peer = KnownPeer {
        name: "n1".parse().unwrap(),
        reachable: true,
        held: Vec::new(),
        incarnation: Incarnation(1),
        deaths_digest: 0,
        absent: Vec::new(),
        left: false,
    };
    allocator.on_peers(&[peer], now);
    let ask = weft_proto::mesh::SpaceRequest { count: 256, urgent: true };
    allocator.on_unicast(&"n1".parse().unwrap(), &prost::Message::encode_to_vec(&ask), now);
    let effects = allocator.effects();
    assert!(effects.publish.is_empty() && effects.unicasts.is_empty(), "{effects:?}");
    // Another node has the range now: the pod is served on.
    allocator.on_assigned(&assigned(&[("n0", "10.244.9.0/24"), ("n2", "10.244.7.0/24")]), now);
    let view = allocator.view();
    assert!(
        view.held.contains(&address)
            && view.own == assigned(&[("n0", "10.244.9.0/24")]).iter().map(|r| r.1).collect::<Vec<_>>()
    );
}

#[test]
fn nobody_waits_for_who_has_left_and_an_older_record_is_no_news() {
    let names = ["n1", "n2", "n3"].map(|name| name.parse::<crate::types::PeerName>().unwrap());
    let config = Config {
        name: "n0".parse().unwrap(),
        universe: "10.32.0.0/12".parse().unwrap(),
        seeds: Default::default(),
        sealer: None,
        has_bootstrap: true,
        seeding: super::Seeding::Given,
        assigned: None,
    };
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let members = names.iter().map(|name| (name.clone(), Incarnation(2))).collect();
    let stored = Stored { members, ..Stored::default() };
    let mut allocator = Allocator::new(config, stored, Found::default(), now).unwrap();
    let [n1, n2, n3] = names;
    let old = KnownPeer { incarnation: Incarnation(1), left: false, ..KnownPeer::gone(n1.clone()) };
    let absent = vec![(n3.clone(), Incarnation(5)), (n2.clone(), Incarnation(9))];
    allocator.on_peers(&[KnownPeer { absent, ..old }, KnownPeer::gone(n2)], now);
    let known = allocator.view().members;
    assert_eq!(*known, [(n1, Incarnation(2)), (n3, Incarnation(5))].into());
}

#[test]
fn a_promise_tells_of_everybody_who_is_known_to_live() {
    let [n1, n2, n3] = ["n1", "n2", "n3"].map(|name| name.parse::<crate::types::PeerName>().unwrap());
    let config = Config {
        name: "n0".parse().unwrap(),
        universe: "10.32.0.0/12".parse().unwrap(),
        seeds: seeds("n0,n1"),
        sealer: None,
        has_bootstrap: true,
        seeding: super::Seeding::Given,
        assigned: None,
    };
    let now = Now { at: Instant::now(), unix_ms: 0 };
    let mut allocator = Allocator::new(config, Stored::default(), Found::default(), now).unwrap();
    allocator.on_contact(now);
    let view = allocator.view();
    let ranges = view.ranges.iter().filter(|(_, owner)| *owner == n1).map(|(range, _)| *range).collect();
    let (incarnation, taker) = (Incarnation(1), n2.clone());
    let death =
        super::death::Death { peer: n1, incarnation, epoch: 1, taker, forced: false, ranges, known: 0 };
    allocator.on_items(&[death.to_item(Vec::new())], now);
    let alone = allocator.view().deaths_digest;
    let lives = |name| KnownPeer { incarnation, left: false, ..KnownPeer::gone(name) };
    allocator.on_peers(&[lives(n2.clone())], now);
    let two = allocator.view().deaths_digest;
    allocator.on_peers(&[lives(n2.clone()), lives(n3.clone())], now);
    let three = allocator.view().deaths_digest;
    allocator.on_peers(&[lives(n2), KnownPeer::gone(n3)], now);
    let digests = BTreeSet::from([0, alone, two, three]);
    assert_eq!((digests.len(), allocator.view().deaths_digest), (4, two));
}
