//! Datagrams on the data port that no agent sends.
use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use anyhow::ensure;
use etherparse::PacketBuilder;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use weft_lab::{Lab, node::Node, pod::Pod, traffic, wait};

use crate::{seen, stranger};

#[test]
fn malformed_and_forged_datagrams_are_dropped_and_counted_by_reason() {
    let lab = Lab::builder().nodes(2).pods(1).arguments(["--encryption", "off"]).start().unwrap();
    let (here, there) = (v4(&lab.pod("n1/p1").unwrap()), v4(&lab.pod("n2/p1").unwrap()));
    let id = stranger::data_id(&lab, lab.node("n1").unwrap().address(), "n2").unwrap();
    are_dropped(lab, &cases(id, here, there));
}

#[test]
fn where_encryption_is_required_clear_and_forged_datagrams_are_dropped() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    let (here, there) = (v4(&lab.pod("n1/p1").unwrap()), v4(&lab.pod("n2/p1").unwrap()));
    let id = stranger::data_id(&lab, lab.node("n1").unwrap().address(), "n2").unwrap();
    let good = udp(there, here);
    let clear = [&[0x11, 0, 0, 0][..], &id.to_be_bytes(), &good].concat();
    let sealed = [&[0x12, 0, 0, 0][..], &id.to_be_bytes(), &[0; 8], &good].concat();
    are_dropped(
        lab,
        &[
            ("clear", vec![clear.clone(), clear[..8].to_vec()]),
            ("no_session", vec![sealed.clone(), sealed[..16].to_vec()]),
            ("malformed", vec![sealed[..15].to_vec(), vec![]]),
        ],
    );
}

/// Sends the datagrams to n1 and sees that each is counted by its reason, and that the nodes' pods still reach each other.
fn are_dropped(lab: Lab, cases: &[(&str, Vec<Vec<u8>>)]) {
    let (n1, here, there) = (lab.node("n1").unwrap(), lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let socket = stranger::datagrams(&lab.underlay().netns, n1.address()).unwrap();
    for (reason, datagrams) in cases {
        let before = drops(&n1);
        for datagram in datagrams.iter().cycle().take(datagrams.len() * ROUNDS) {
            socket.send(datagram).unwrap();
        }
        let sent = (datagrams.len() * ROUNDS) as u64;
        wait::until(&format!("{sent} are counted as {reason}"), SOON, || {
            let now = drops(&n1);
            let more: BTreeMap<_, _> =
                now.iter().map(|(name, n)| (name, n - before[name])).filter(|(_, more)| *more > 0).collect();
            ensure!(more == BTreeMap::from([(&reason.to_string(), sent)]), "{more:?}");
            Ok(())
        })
        .unwrap();
        let line = format!("weft_drops_total{{reason=\"{reason}\"}} {}", drops(&n1)[*reason]);
        let (status, metrics) = n1.http("/metrics").unwrap();
        assert!(status == 200 && metrics.contains(&line), "no `{line}` in {metrics}");
    }

    n1.check_agent().unwrap();
    reach(&here, &there);
    lab.finish().unwrap();
}

#[test]
fn a_flood_of_garbage_stops_no_traffic_and_takes_no_memory() {
    let lab = Lab::builder().nodes(2).pods(1).arguments(["--encryption", "off"]).start().unwrap();
    let (n1, here, there) = (lab.node("n1").unwrap(), lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let underlay = &lab.underlay().netns;
    let id = stranger::data_id(&lab, n1.address(), "n2").unwrap();
    let socket = stranger::datagrams(underlay, n1.address()).unwrap();
    let process = n1.agent_process().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6783);
    let mut flood = |count: usize| {
        let mut datagram = [0; 1400];
        for n in 0..count {
            let length = rng.random_range(0..datagram.len());
            rng.fill_bytes(&mut datagram[..length]);
            if n % 2 == 0 && length > 8 {
                // As far as the header goes they are from a peer; every fourth is from nobody.
                let id = if n % 4 == 0 { id } else { rng.next_u32() };
                datagram[..4].copy_from_slice(&[0x11, 0, 0, 0]);
                datagram[4..8].copy_from_slice(&id.to_be_bytes());
            }
            socket.send(&datagram[..length]).unwrap();
        }
    };

    let stream =
        traffic::Stream::start(here.netns(), there.netns(), there.address().unwrap(), u64::MAX, SOON * 4)
            .unwrap();
    stream.advances(1 << 20, SOON).unwrap();
    // What is allocated once and kept has been by then.
    flood(FLOOD / 4);
    let before = (drops(&n1).values().sum::<u64>(), seen::resident(process).unwrap());
    flood(FLOOD);
    stream.advances(1 << 20, SOON).unwrap();
    let after = (drops(&n1).values().sum::<u64>(), seen::resident(process).unwrap());
    assert!(after.0 > before.0 + 1000, "{} datagrams were dropped and counted", after.0 - before.0);
    let grown = after.1.saturating_sub(before.1);
    assert!(grown < MEMORY, "the agent has grown by {} KiB", grown >> 10);
    stream.finish().unwrap();
    n1.check_agent().unwrap();
    assert!(process.runs());
    reach(&there, &here);
    lab.finish().unwrap();
}

/// Datagrams to a node with pod `here`, as from a peer with that data id and pod `there`, by the reason to drop them.
fn cases(id: u32, here: Ipv4Addr, there: Ipv4Addr) -> [(&'static str, Vec<Vec<u8>>); 7] {
    let good = udp(there, here);
    let from = |id: u32, packet: &[u8]| [&[0x11, 0, 0, 0], &id.to_be_bytes()[..], packet].concat();
    let changed = |at: usize, value: u8| {
        let mut packet = good.clone();
        packet[at] = value;
        from(id, &packet)
    };
    let first_byte = |value: u8| {
        let mut datagram = from(id, &good);
        datagram[0] = value;
        datagram
    };
    let changed_protocol = [&good[..9], &[47], &good[10..]].concat();
    let nobody = Ipv4Addr::from(here.to_bits() + 200);
    let outside = Ipv4Addr::new(198, 51, 100, 2);
    [
        (
            "malformed",
            vec![
                vec![],
                vec![0x11],
                from(id, &[])[..7].to_vec(),
                from(id, &[]),
                from(id, &good[..10]),
                from(id, &good[..good.len() - 1]),
                from(id, &[&good[..], &[0]].concat()),
                // Not IPv4 or IPv6; a header shorter than its least; one longer than the packet; two wrong lengths.
                changed(0, 0x75),
                changed(0, 0x44),
                changed(0, 0x4f),
                changed(2, 0xff),
                changed(3, 0),
                from(id, &[&[0x60][..], &[0; 47]].concat()),
                [&[0x11, 2, 0, 0][..], &from(id, &good)[4..]].concat(),
                // A partial checksum of what has none.
                [&[0x11, 1, 0, 0][..], &from(id, &changed_protocol)[4..]].concat(),
            ],
        ),
        (
            "unknown_version",
            vec![first_byte(0x01), first_byte(0x21), first_byte(0xff), vec![0], vec![0x31; 3]],
        ),
        ("unknown_kind", vec![first_byte(0x10), first_byte(0x13), first_byte(0x1f), vec![0x14]]),
        ("sealed", vec![first_byte(0x12)]),
        ("unknown_peer", vec![from(!id, &good), from(0, &good)]),
        (
            "spoofed_source",
            // As this node's own pod, as nobody, from outside.
            [here, nobody, outside].map(|source| from(id, &udp(source, here))).into(),
        ),
        (
            "not_local",
            // To nobody, to a pod elsewhere, outside, to everybody, to the node itself.
            [nobody, there, outside, Ipv4Addr::new(224, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 1)]
                .map(|destination| from(id, &udp(there, destination)))
                .into(),
        ),
    ]
}

fn udp(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64).udp(4000, 4000);
    builder.write(&mut packet, b"what a stranger has to say").unwrap();
    packet
}

/// Drops of datagrams by reason, as `weft status` has them.
fn drops(node: &Node) -> BTreeMap<String, u64> {
    let drops = seen::drops(node).unwrap();
    drops.into_iter().filter(|(reason, _)| INWARD.contains(&reason.as_str())).collect()
}

fn v4(pod: &Pod) -> Ipv4Addr {
    pod.address().unwrap().to_string().parse().unwrap()
}

fn reach(from: &Pod, to: &Pod) {
    let address = to.address().unwrap();
    wait::until("the pods reach each other", SOON, || from.ping(address, Duration::from_millis(500)))
        .unwrap();
}

/// The kernel's own multicasts into the TUN are dropped for other reasons.
const INWARD: [&str; 11] = [
    "malformed",
    "unknown_version",
    "unknown_kind",
    "clear",
    "sealed",
    "no_session",
    "unknown_peer",
    "spoofed_source",
    "not_local",
    "probe",
    "relay_unknown_peer",
];
/// Few enough of each that no socket's buffer runs over.
const ROUNDS: usize = 5;
const FLOOD: usize = 40_000;
/// Bytes by which a flood may make an agent grow: batches and buffers, nothing for each datagram.
const MEMORY: u64 = 8 << 20;
const SOON: Duration = Duration::from_secs(10);
