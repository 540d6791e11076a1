//! A super-packet of 64 KiB: cut into its segments, and made of them again.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use weft::datapath::{
    header::CLEAR_LEN,
    offload::{
        coalesce::{Coalescer, Takes},
        headers::Headers,
        split::{Shape, Split},
        virtio::{Gso, Kind, Virtio},
    },
};

/// Headers alone where the shape was foreseen; with a copy of all payload where not.
fn split(c: &mut Criterion) {
    let mut group = c.benchmark_group("split");
    group.throughput(Throughput::Bytes(LEN as u64));
    let (virtio, gso, head) = super_packet();
    let mut buffer = vec![0; 2 * LEN];
    for (name, foreseen) in [("foreseen", true), ("not foreseen", false)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let split = Split::new(&virtio, gso, black_box(&head), LEN, (CLEAR_LEN, 0)).expect("it fits");
                if !foreseen {
                    split.shape().spread(&mut buffer, LEN);
                }
                write(&split, &mut buffer);
            })
        });
    }
    group.finish();
}

fn coalesce(c: &mut Criterion) {
    let mut group = c.benchmark_group("coalesce");
    group.throughput(Throughput::Bytes(LEN as u64));
    let (virtio, gso, head) = super_packet();
    let split = Split::new(&virtio, gso, &head, LEN, (CLEAR_LEN, 0)).expect("it fits");
    let mut buffer = vec![0; 2 * LEN];
    write(&split, &mut buffer);
    let places: Vec<_> = places(&split.shape()).collect();
    let mut coalescer = Coalescer::new(Takes { tcp: true, udp: true });
    group.bench_function("64 KiB", |b| {
        b.iter(|| {
            // Finishing writes over the first segment's headers.
            split.write(0, &mut buffer[places[0].clone()]);
            places.iter().for_each(|place| coalescer.push(black_box(&buffer), place.clone(), true, 0));
            assert_eq!(coalescer.len(), 1);
            black_box(coalescer.finish(0, &mut buffer).pieces().count());
            coalescer.clear();
        })
    });
    group.finish();
}

fn write(split: &Split, buffer: &mut [u8]) {
    for (segment, place) in places(&split.shape()).enumerate() {
        split.write(segment, &mut buffer[place]);
    }
}

fn places(shape: &Shape) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
    let shape = *shape;
    (0..shape.segments(LEN)).map(move |segment| {
        let start = segment * shape.stride() + shape.front;
        let payload = shape.payload.min(LEN - shape.headers - segment * shape.payload);
        start..start + shape.headers + payload
    })
}

/// The headers of a TCP super-packet with timestamps.
fn super_packet() -> (Virtio, Gso, Vec<u8>) {
    let mut head = vec![0; 52];
    head[..4].copy_from_slice(&[0x45, 0, (LEN >> 8) as u8, LEN as u8]);
    head[6] = 0x40;
    head[8..10].copy_from_slice(&[64, 6]);
    head[12..20].copy_from_slice(&[10, 32, 0, 2, 10, 32, 1, 2]);
    head[32..34].copy_from_slice(&[0x80, 0x10]);
    let headers = Headers::plain(&head).expect("TCP in IPv4");
    let gso = Gso { kind: Kind::TcpV4, headers: 52, size: 1388, ecn: false };
    (Virtio { partial: Some(headers.checksum()), gso: Some(gso) }, gso, head)
}

const LEN: usize = 65_160;

criterion_group!(benches, split, coalesce);
criterion_main!(benches);
