//! A dialer on a clock of its own; nobody is really called.

use super::*;
use rand::SeedableRng;

fn names(n: usize) -> Vec<PeerName> {
    (0..n).map(|i| format!("node-{i}").parse().unwrap()).collect()
}

fn ring(names: &[PeerName]) -> BTreeSet<Place> {
    names.iter().map(place).collect()
}

#[test]
fn who_joins_changes_the_links_of_few() {
    let everyone = names(1000);
    let (before, after) = (ring(&everyone[..999]), ring(&everyone));
    let wanted = |places: &BTreeSet<Place>, name| -> BTreeSet<PeerName> {
        neighbours(&places.iter().collect::<Vec<_>>(), name, 56).into_iter().cloned().collect()
    };
    let changed = everyone[..999].iter().filter(|name| wanted(&before, name) != wanted(&after, name));
    let changed = changed.count();
    assert!((1..=20).contains(&changed), "{changed}");
}

#[test]
fn both_ends_want_the_same_links_and_the_graph_is_shallow() {
    for (n, limit) in [(2, 56), (5, 56), (16, 56), (17, 56), (100, 56), (100, 6), (1000, 56), (1000, 3)] {
        let names = ring(&names(n));
        let refs: Vec<_> = names.iter().collect();
        let links: BTreeMap<_, _> =
            names.iter().map(|(_, name)| (name, neighbours(&refs, name, limit))).collect();
        for (name, linked) in &links {
            assert!(linked.iter().all(|other| links[other].contains(name)), "symmetric");
            assert!(linked.len() <= limit.max(2) && linked.len() <= 15.max(2 * n.ilog2() as usize + 2));
            assert!(!linked.contains(name));
        }
        let mut reached = BTreeSet::from([&refs[0].1]);
        let mut hops = 0;
        while reached.len() < n {
            reached = reached.iter().flat_map(|name| links[name].iter().copied().chain([*name])).collect();
            hops += 1;
            assert!(hops <= n, "connected");
        }
        if limit == 56 {
            assert!(hops <= n.ilog2() as usize, "{n}: {hops} hops");
        }
    }
}

struct Bench(Dialer, ChaCha8Rng, Instant);

impl Bench {
    #[expect(clippy::disallowed_methods, reason = "an instant to count from has no other origin")]
    fn new(own: &str, bootstrap: &[&str]) -> Self {
        let bootstrap = bootstrap.iter().map(|text| text.parse().unwrap()).collect();
        Self(Dialer::new(own.parse().unwrap(), bootstrap, 64), ChaCha8Rng::seed_from_u64(1), Instant::now())
    }

    /// Waits until something is due and returns it with the time waited.
    fn wait(&mut self) -> (Vec<Target>, Duration) {
        let start = self.2;
        loop {
            let due = self.0.due(self.2, &mut self.1);
            if !due.is_empty() {
                return (due, self.2 - start);
            }
            self.2 = self.0.next_wake().expect("something is to be tried");
        }
    }

    fn fail(&mut self, targets: &[Target]) {
        targets.iter().for_each(|target| self.0.failed(target, "refused", self.2, &mut self.1));
    }
}

#[test]
fn waits_grow_and_news_end_them() {
    let addresses: Vec<_> = (0..40).map(|n| format!("seed-{n}")).collect();
    let mut bench = Bench::new("a", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
    let b: PeerName = "b".parse().unwrap();
    bench.0.heard(&b, bench.2, &mut bench.1);
    let wait_for_b = |bench: &mut Bench| {
        let start = bench.2;
        while bench.2 < start + Duration::from_secs(60) {
            let (due, _) = bench.wait();
            bench.fail(&due);
            if due.contains(&Target::Peer(b.clone())) {
                break;
            }
        }
        (bench.2 - start).as_secs_f64()
    };
    let waits: Vec<_> = (0..9).map(|_| wait_for_b(&mut bench)).collect();
    assert!(waits[0] == 0.0 && (0.25..=0.5).contains(&waits[1]), "{waits:?}");
    assert!((2.0..=4.0).contains(&waits[4]) && (15.0..=30.0).contains(&waits[8]), "{waits:?}");
    bench.0.heard(&b, bench.2, &mut bench.1);
    assert!(wait_for_b(&mut bench) <= 0.7);
}

#[test]
fn the_only_lost_peer_is_called_every_second() {
    let mut bench = Bench::new("a", &[]);
    bench.0.heard(&"b".parse().unwrap(), bench.2, &mut bench.1);
    for _ in 0..10 {
        let (due, waited) = bench.wait();
        assert!(waited <= Duration::from_secs(1), "{waited:?}");
        bench.fail(&due);
    }
    assert_eq!(bench.0.troubles()[0].reason, "refused");
}

#[test]
fn the_smaller_name_calls_first() {
    let mut bench = Bench::new("b", &[]);
    bench.0.heard(&"c".parse().unwrap(), bench.2, &mut bench.1);
    assert_eq!(bench.wait().1, Duration::ZERO);
    let mut bench = Bench::new("b", &[]);
    bench.0.heard(&"a".parse().unwrap(), bench.2, &mut bench.1);
    assert!(bench.wait().1 >= YIELD);
}

#[test]
fn who_has_links_enough_is_left_alone_whatever_it_says() {
    let mut bench = Bench::new("a", &[]);
    let b: PeerName = "b".parse().unwrap();
    bench.0.heard(&b, bench.2, &mut bench.1);
    let (due, _) = bench.wait();
    bench.0.met(&due[0], &b);
    bench.0.up(&b);
    bench.0.down(&b, Duration::from_secs(2), bench.2, &mut bench.1);
    bench.0.unneeded(&b, bench.2, &mut bench.1);
    bench.0.heard(&b, bench.2, &mut bench.1);
    let (due, waited) = bench.wait();
    assert_eq!(due, [Target::Peer(b)]);
    assert!(waited >= MAX_DELAY / 2, "{waited:?}");
}

#[test]
fn an_address_is_tried_until_its_peer_is_known() {
    let mut bench = Bench::new("a", &["seed"]);
    assert!(!bench.0.hopeless());
    let (due, _) = bench.wait();
    assert_eq!(due, [Target::Bootstrap("seed".parse().unwrap())]);
    bench.fail(&due);
    assert!(bench.0.hopeless());
    let (due, _) = bench.wait();
    let b: PeerName = "b".parse().unwrap();
    bench.0.met(&due[0], &b);
    bench.0.up(&b);
    bench.0.heard(&b, bench.2, &mut bench.1);
    assert_eq!(bench.0.due(bench.2, &mut bench.1), []);
    assert_eq!(bench.0.next_wake(), None);
    bench.0.down(&b, Duration::from_secs(60), bench.2, &mut bench.1);
    assert_eq!(bench.wait().0, [Target::Bootstrap("seed".parse().unwrap()), Target::Peer(b)]);
}

#[test]
fn addresses_that_are_replaced_are_called_no_more() {
    let mut bench = Bench::new("a", &["old", "kept"]);
    let (due, _) = bench.wait();
    assert_eq!(due.len(), 2);
    bench.fail(&due);
    bench.0.set_bootstrap(vec!["kept".parse().unwrap(), "new".parse().unwrap()]);
    let at = |name: &str| Target::Bootstrap(name.parse().unwrap());
    assert_eq!(bench.wait(), (vec![at("new")], Duration::ZERO), "it has not failed yet");
    bench.fail(&[at("new")]);
    // An answer to a call of before.
    bench.0.failed(&at("old"), "refused", bench.2, &mut bench.1);
    let mut called: Vec<_> = (0..2).flat_map(|_| bench.wait().0).collect();
    called.sort();
    assert_eq!(called, [at("kept"), at("new")]);
}

#[test]
fn the_dead_are_stepped_over_and_still_called_until_they_are_back() {
    let all = names(40);
    let mut bench = Bench::new("node-0", &[]);
    all[1..].iter().for_each(|name| bench.0.heard(name, bench.2, &mut bench.1));
    let mut linked = BTreeSet::new();
    for _ in 0..200 {
        let (due, _) = bench.wait();
        for target in &due {
            let Target::Peer(name) = target else { panic!("{target:?}") };
            match name.as_str()[5..].parse::<usize>().unwrap() % 2 {
                0 => {
                    bench.0.met(target, name);
                    bench.0.up(name);
                    linked.insert(name.clone());
                }
                _ => bench.fail(std::slice::from_ref(target)),
            }
        }
    }
    let living = ring(&all.iter().step_by(2).cloned().collect::<Vec<_>>());
    let refs: Vec<_> = living.iter().collect();
    assert!(neighbours(&refs, &all[0], 56).into_iter().all(|name| linked.contains(name)));
    assert!(!bench.0.troubles().is_empty());

    all[1..].iter().for_each(|name| bench.0.heard(name, bench.2, &mut bench.1));
    loop {
        let due = bench.0.due(bench.2, &mut bench.1);
        match bench.0.next_wake() {
            Some(next) if due.is_empty() => bench.2 = next,
            None if due.is_empty() => break,
            _ => {}
        }
        for target in due {
            let Target::Peer(name) = &target else { panic!("{target:?}") };
            bench.0.met(&target, name);
            bench.0.up(name);
        }
    }
    let everyone = ring(&all);
    let refs: Vec<_> = everyone.iter().collect();
    assert_eq!(bench.0.wanted.iter().collect::<BTreeSet<_>>(), neighbours(&refs, &all[0], 56));
    assert!(!bench.0.stepped_over);
}
