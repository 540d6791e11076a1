//! Sealing and opening one datagram, as a worker does it: counters, header and replay window included.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use weft::datapath::{
    seal::{Algorithm, OpenKey, SEALED_HEADER_LEN, SealKey, TAG_LEN},
    sessions::{Receiving, Sending},
};

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    for (algorithm, size) in cases() {
        let sending = sending(algorithm);
        let mut body = vec![0; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new(format!("{algorithm:?}"), size), |b| {
            b.iter(|| {
                let mut tag = [0; TAG_LEN];
                sending.key().seal(&header(&sending), black_box(&mut body), &mut tag);
                tag
            })
        });
    }
    group.finish();
}

/// Copies the packet first, for opening destroys it.
fn open(c: &mut Criterion) {
    let mut group = c.benchmark_group("open");
    for (algorithm, size) in cases() {
        let sending = sending(algorithm);
        let key = OpenKey::new(algorithm, &KEY);
        let receiving = Receiving::new(INDEX, "a".parse().expect("a name"), OpenKey::new(algorithm, &KEY));
        let header = header(&sending);
        let (mut body, mut tag) = (vec![0; size], [0; TAG_LEN]);
        sending.key().seal(&header, &mut body, &mut tag);
        let sealed = [&body[..], &tag].concat();
        let mut packet = sealed.clone();
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new(format!("{algorithm:?}"), size), |b| {
            b.iter(|| {
                packet.copy_from_slice(&sealed);
                key.open(&header, black_box(&mut packet))
            })
        });
        let mut opener = receiving.opener();
        opener.open(&header, &mut sealed.clone()).expect("the first one opens");
        group.bench_function(BenchmarkId::new(format!("{algorithm:?} replayed"), size), |b| {
            b.iter(|| opener.open(&header, black_box(&mut packet)))
        });
    }
    group.finish();
}

fn cases() -> impl Iterator<Item = (Algorithm, usize)> {
    let algorithms = [Algorithm::Aes256Gcm, Algorithm::ChaCha20Poly1305];
    algorithms.into_iter().flat_map(|algorithm| [64, 1400].map(|size| (algorithm, size)))
}

fn sending(algorithm: Algorithm) -> Sending {
    Sending::new(INDEX, SealKey::new(algorithm, &KEY), 1)
}

fn header(sending: &Sending) -> [u8; SEALED_HEADER_LEN] {
    let mut header = [0x12; SEALED_HEADER_LEN];
    header[8..].copy_from_slice(&sending.take(0, 1).expect("numbers are left").encode());
    header
}

const KEY: [u8; 32] = [7; 32];
const INDEX: weft::types::SessionIndex = weft::types::SessionIndex(1);

criterion_group!(benches, seal, open);
criterion_main!(benches);
