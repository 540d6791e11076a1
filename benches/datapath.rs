//! The data path's pure steps: the header, the parse, the table at several sizes, and both decisions whole.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};
use weft::{
    datapath::{
        header::{CLEAR_LEN, Envelope, Header},
        packet::Packet,
        table::{Inputs, Owner, Peer, Table},
        verdict::{Gate, Sender, outward},
    },
    types::{DataId, Prefix},
};

fn header(c: &mut Criterion) {
    let envelope = Envelope::Clear { sender: DataId(0x0102_0304) };
    let header = Header { partial: true, flow: 7, envelope };
    let mut datagram = vec![0; CLEAR_LEN + 1400];
    header.write(&mut datagram);
    let mut group = c.benchmark_group("header");
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode", |b| b.iter(|| header.write(black_box(&mut datagram))));
    group.bench_function("decode", |b| b.iter(|| Header::decode(black_box(&datagram))));
    group.finish();
}

fn packet(c: &mut Criterion) {
    let bytes = udp([10, 0, 0, 1], [10, 0, 1, 1]);
    let mut group = c.benchmark_group("packet");
    group.throughput(Throughput::Elements(1));
    group.bench_function("parse", |b| b.iter(|| Packet::parse(black_box(&bytes))));
    group.finish();
}

/// Addresses that jump about the whole table, so that a lookup's path is not predicted.
fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("table");
    group.throughput(Throughput::Elements(1));
    for ranges in SIZES {
        let table = table(ranges);
        let mut place = 0u32;
        group.bench_function(BenchmarkId::new("home", ranges), |b| {
            b.iter(|| {
                place = place.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                table.home(IpAddr::from(Ipv4Addr::from_bits(UNIVERSE + place % (ranges << 8))))
            })
        });
    }
    for ranges in SIZES {
        group.bench_function(BenchmarkId::new("build", ranges), |b| {
            let inputs = inputs(ranges);
            b.iter(|| Table::new(inputs.clone()))
        });
    }
    group.finish();
}

fn verdicts(c: &mut Criterion) {
    let mut group = c.benchmark_group("verdict");
    group.throughput(Throughput::Elements(1));
    for ranges in SIZES {
        let table = table(ranges);
        let (here, there) = ([10, 0, 0, 1], [10, 0, 1, 1]);
        let (out, back) = (udp(here, there), udp(there, here));
        let outward = |bytes: &[u8]| outward(&table, &Packet::parse(bytes)?, bytes.len(), |_| None).ok();
        let inward = |bytes: &[u8]| Gate::new(&table).admit(Sender::Says(DataId(1)), bytes, false);
        assert!(outward(&out).is_some() && inward(&back).is_ok());
        group.bench_function(BenchmarkId::new("outward", ranges), |b| b.iter(|| outward(black_box(&out))));
        group.bench_function(BenchmarkId::new("inward", ranges), |b| b.iter(|| inward(black_box(&back))));
    }
    group.finish();
}

/// `ranges` blocks of 256 addresses; the first is ours, then each peer has every thousandth.
fn inputs(ranges: u32) -> Inputs {
    let peers: Arc<[Peer]> = (1..=PEERS.min(ranges))
        .map(|id| Peer {
            name: format!("node-{id}").parse().expect("a name"),
            data_id: DataId(id),
            endpoint: Some(SocketAddr::from((Ipv4Addr::from_bits(0xc000_0200 + id), 6783))),
            relay: None,
            mtu: 1464,
        })
        .collect();
    let range = |place: u32| {
        let owner = match place {
            0 => Owner::Me,
            place => Owner::Peer((place as usize - 1) % peers.len()),
        };
        let start = Ipv4Addr::from_bits(UNIVERSE + (place << 8));
        (Prefix::new(start.into(), 24).expect("a length"), owner)
    };
    let ranges = (0..ranges).map(range).collect();
    let pods = (1..100).map(|low| [10, 0, 0, low].into()).collect();
    Inputs { me: DataId(0), peers, ranges, pods, ..Inputs::default() }
}

fn table(ranges: u32) -> Table {
    Table::new(inputs(ranges))
}

/// A UDP packet of 1,400 bytes.
fn udp(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0; 1400];
    bytes[..4].copy_from_slice(&[0x45, 0, 5, 120]);
    bytes[9] = 17;
    bytes[12..16].copy_from_slice(&source);
    bytes[16..20].copy_from_slice(&destination);
    bytes
}

const SIZES: [u32; 3] = [10, 1_000, 100_000];
const PEERS: u32 = 1_000;
const UNIVERSE: u32 = 10 << 24;

criterion_group!(benches, header, packet, lookup, verdicts);
criterion_main!(benches);
