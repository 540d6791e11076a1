//! What it costs to seal a record and to check those of others: an agent that joins a thousand peers checks a thousand.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use weft::{
    identity::{
        Ca, Checker, Identity, Sealer, Trust,
        task::{Current, State},
    },
    mesh::{
        gossip::{Gossiper, Item},
        peers::{PeerGossip, PeerRecord},
    },
    types::{Incarnation, PeerName},
};

fn keys(ca: &Ca, bundle: &str, name: &str) -> Current {
    let (name, now): (PeerName, _) = (name.parse().expect("a name"), SystemTime::now());
    let leaf = ca.issue(&name, Duration::from_secs(3600), now).expect("a certificate");
    let trust = Trust::from_pem(bundle.as_bytes(), None).expect("a bundle");
    let identity = Identity::new(name, trust, leaf.cert.as_bytes(), leaf.key.as_bytes(), now);
    watch::channel(State { identity: Arc::new(identity.expect("an identity")), trouble: None }).1
}

fn record(name: &str) -> PeerRecord {
    PeerRecord::new(name.parse().expect("a name"), Incarnation(1))
}

fn records(c: &mut Criterion) {
    let made = Ca::create(SystemTime::now()).expect("a CA");
    let ca = Ca::load(made.cert.as_bytes(), made.key.as_bytes()).expect("the CA");
    let own = keys(&ca, &made.cert, "own");
    let sealed = |n: usize| {
        let name = format!("node-{n}");
        record(&name).to_sealed(Some(&Sealer::new(keys(&ca, &made.cert, &name))))
    };
    let items: Vec<Item> = (0..1000).map(sealed).collect();
    println!("a sealed record has {} bytes, {} of them its seal", items[0].size(), items[0].signature.len());

    let sealer = Sealer::new(own.clone());
    c.bench_function("seal a record", |b| b.iter(|| black_box(record("own")).to_sealed(Some(&sealer))));
    let fresh = || PeerGossip(Some(Checker::new(own.clone())));
    let check = |mut gossip: PeerGossip| {
        items.iter().for_each(|item| gossip.check(item).expect("it is sealed"));
        gossip
    };
    let mut group = c.benchmark_group("check a thousand records");
    group.sample_size(10);
    group.bench_function("for the first time", |b| b.iter_batched(fresh, check, BatchSize::PerIteration));
    group.bench_function("again", |b| b.iter_batched(|| check(fresh()), check, BatchSize::PerIteration));
    group.finish();
}

criterion_group!(benches, records);
criterion_main!(benches);
