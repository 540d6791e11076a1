//! Connections to the control port that are no agent's.
use std::{
    net::{IpAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use prost::Message;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use weft_lab::{Lab, namespace::Netns, node::Node, wait};
use weft_proto::mesh::{
    Digest, Frame, Hello, Item, Items, PeerRecord, Summary, Unicast, digest, frame::Body, summary,
};

use crate::{
    seen,
    stranger::{self, Link, hello, talk},
};

#[test]
fn garbage_on_the_control_port_harms_nobody() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    let n1 = lab.node("n1").unwrap();
    let (process, underlay) = (n1.agent_process().unwrap(), &lab.underlay().netns);
    linked(&n1, "n2");
    let lost_so_far = peer(&n1, "n2");

    let said = raw_garbage();
    let mut streams = stranger::connections(underlay, n1.address(), &said).unwrap();
    for (stream, said) in streams.iter_mut().zip(&said) {
        stranger::hung_up(stream)
            .with_context(|| format!("after {:?}", &said[..said.len().min(40)]))
            .unwrap();
    }
    let before = seen::resident(process).unwrap();
    let keys = stranger::keys(&lab, "stranger").unwrap();
    for (what, frames) in junk_frames() {
        let told = talk(underlay, async || {
            let link = Link::open(n1.address(), &keys).await?;
            for frame in frames {
                // The agent may have hung up at an earlier one.
                let _ = link.outgoing.send(frame).await;
            }
            link.ended().await
        });
        told.with_context(|| format!("a link with {what} goes on")).unwrap();
    }
    let grown = seen::resident(process).unwrap().saturating_sub(before);
    assert!(grown < MEMORY, "the agent has grown by {} KiB", grown >> 10);

    n1.check_agent().unwrap();
    assert!(process.runs());
    assert_eq!(peer(&n1, "n2"), lost_so_far, "the real peer stayed linked");
    let peers = n1.weft_json("peers").unwrap();
    assert_eq!(peers["peers"].as_array().unwrap().len(), 2, "nobody was invented: {peers}");
    joins(&lab);
    lab.finish().unwrap();
}

#[test]
fn connections_that_say_nothing_or_little_keep_nobody_out() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    let n1 = lab.node("n1").unwrap();
    let (target, underlay) = (n1.address(), &lab.underlay().netns);
    let (opened, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        // They go on for as long as the others try to work.
        scope.spawn(|| silent(underlay, target, &opened, &over));
        scope.spawn(|| slow(underlay, target, &opened, &over));
        let _stop = Stop(&over);
        wait::until("hundreds have come", SOON, || {
            ensure!(opened.load(Relaxed) >= SILENT, "{opened:?} connections were made");
            Ok(())
        })
        .unwrap();
        joins(&lab);
    });
    n1.check_agent().unwrap();
    assert!(peer(&n1, "n2").0 && peer(&n1, "n3").0);
    lab.finish().unwrap();
}

#[test]
fn links_that_never_say_hello_give_their_places_back() {
    let lab = Lab::builder().nodes(1).start().unwrap();
    let n1 = lab.node("n1").unwrap();
    let (opened, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let keys = stranger::keys(&lab, "stranger").unwrap();
    let mute = async || {
        let mut links = Vec::new();
        for _ in 0..MUTE {
            // What the agent refuses is no harm to it.
            links.extend(Link::open(n1.address(), &keys).await);
            opened.fetch_add(1, Relaxed);
        }
        while !over.load(Relaxed) {
            // Connections stay up as long as somebody answers the agent's pings.
            tokio::time::sleep(TICK).await;
        }
        Ok(links.len())
    };
    thread::scope(|scope| {
        scope.spawn(|| talk(&lab.underlay().netns, mute).unwrap());
        let _stop = Stop(&over);
        wait::until("all strangers have come", SOON, || {
            ensure!(opened.load(Relaxed) == MUTE);
            Ok(())
        })
        .unwrap();
        joins(&lab);
    });
    n1.check_agent().unwrap();
    lab.finish().unwrap();
}

/// A new node, which knows n1 only, becomes one of them, and its pod reaches another's.
fn joins(lab: &Lab) {
    let node = lab.add_node().unwrap();
    node.start_agent().unwrap();
    node.wait_ready(SOON).unwrap();
    let (n1, name) = (lab.node("n1").unwrap(), node.name());
    linked(&n1, name);
    let pod = lab.add_pod(&node).unwrap();
    pod.attach().unwrap();
    let other = lab.add_pod(&n1).unwrap();
    other.attach().unwrap();
    let address = other.address().unwrap();
    wait::until("the new node's pod is heard", SOON, || pod.ping(address, Duration::from_millis(300)))
        .unwrap();
}

fn linked(node: &Node, name: &str) {
    wait::until(&format!("{name} is linked"), SOON, || {
        let (linked, _) = peer(node, name);
        ensure!(linked);
        Ok(())
    })
    .unwrap();
}

/// Whether a node has a link to a peer, and how often it has lost the last one. Two that call each other at once drop one.
fn peer(node: &Node, name: &str) -> (bool, usize) {
    let peers = node.weft_json("peers").unwrap();
    let peers = peers["peers"].as_array().unwrap();
    let linked = peers.iter().any(|peer| peer["name"] == name && peer["linked"] == true);
    let lost = |line: &&str| line.contains("link down") && line.contains(name) && !line.contains("a double");
    (linked, node.log().lines().filter(lost).count())
}

/// Opens connections by the hundred that say nothing, again whenever they are closed.
fn silent(from: &Netns, to: IpAddr, opened: &AtomicUsize, over: &AtomicBool) {
    let mut held: Vec<TcpStream> = Vec::new();
    while !over.load(Relaxed) {
        held.retain(is_open);
        let wave = (SILENT - held.len()).min(50);
        let more = stranger::connections(from, to, &vec![Vec::new(); wave]).unwrap_or_default();
        opened.fetch_add(more.len(), Relaxed);
        held.extend(more);
        thread::sleep(TICK);
    }
}

/// Opens connections that say what an agent would, a byte at a time.
fn slow(from: &Netns, to: IpAddr, opened: &AtomicUsize, over: &AtomicBool) {
    let mut held: Vec<(TcpStream, usize)> = Vec::new();
    while !over.load(Relaxed) {
        held.retain_mut(|(stream, said)| {
            *said += 1;
            std::io::Write::write_all(stream, &CLIENT_HELLO[*said % CLIENT_HELLO.len()..][..1]).is_ok()
        });
        let more = stranger::connections(from, to, &vec![CLIENT_HELLO[..1].to_vec(); SLOW - held.len()]);
        let more = more.unwrap_or_default();
        opened.fetch_add(more.len(), Relaxed);
        held.extend(more.into_iter().map(|stream| (stream, 0)));
        thread::sleep(TICK);
    }
}

/// Has the strangers stop when it is dropped, also by a test that fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn is_open(stream: &TcpStream) -> bool {
    let mut byte = [0];
    stream.set_nonblocking(true).is_ok()
        && matches!(stream.peek(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// What is no HTTP/2, or not for long.
fn raw_garbage() -> Vec<Vec<u8>> {
    let mut rng = ChaCha8Rng::seed_from_u64(6783);
    let mut random = |length: usize| {
        let mut bytes = vec![0; length];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let http2 = |frames: &[&[u8]]| [PREFACE, SETTINGS, &frames.concat()].concat();
    let mut said: Vec<Vec<u8>> = (0..20).map(|n| random(1 << (n % 14))).collect();
    said.extend([
        b"GET / HTTP/1.1\r\nHost: weft\r\n\r\n".to_vec(),
        b"POST /weft.mesh.v1.Mesh/Link HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n".to_vec(),
        // TLS: a client hello without end, an alert, and a length that is none.
        CLIENT_HELLO.to_vec(),
        b"\x15\x03\x03\x00\x02\x02\x30".to_vec(),
        b"\x16\x03\x01\xff\xff\x01\xff\xff\xff".to_vec(),
        // TLS 1.2, client hello.
        b"\x16\x03\x01\x00\x2e\x01\x00\x00\x2a\x03\x03".to_vec(),
        b"SSH-2.0-OpenSSH_9.9\r\n".to_vec(),
        [PREFACE, &random(4000)].concat(),
        // Frames: length (3), type, flags, stream (4). Too long; of no kind; HEADERS that are no headers, on stream 0, and
        // without end; DATA before them; a window that overflows; a setting that is none; PUSH_PROMISE from a client.
        http2(&[b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"]),
        http2(&[b"\x00\x00\x04\xee\x00\x00\x00\x00\x01junk", &random(999)]),
        http2(&[b"\x00\x00\x10\x01\x05\x00\x00\x00\x01", &random(16)]),
        http2(&[b"\x00\x00\x01\x01\x05\x00\x00\x00\x00\x82"]),
        http2(&[b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82"]),
        http2(&[b"\x00\x00\x04\x00\x00\x00\x00\x00\x01junk"]),
        http2(&[b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\xff\xff"]),
        http2(&[b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x00"]),
        http2(&[b"\x00\x00\x04\x05\x04\x00\x00\x00\x01\x00\x00\x00\x02"]),
    ]);
    said
}

/// Messages of a link, each list of which an agent must not listen to for long.
fn junk_frames() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let mut rng = ChaCha8Rng::seed_from_u64(6784);
    let frame = |body: Body| Frame { body: Some(body) }.encode_to_vec();
    let changed = |change: fn(&mut Hello)| {
        let Body::Hello(mut hello) = hello("stranger") else { unreachable!("it is a hello") };
        change(&mut hello);
        vec![frame(Body::Hello(hello))]
    };
    let after_hello = |body: Body| vec![frame(hello("stranger")), frame(body)];
    let mut random = vec![0; 5000];
    rng.fill_bytes(&mut random);
    let mut lists = vec![
        ("no hello", vec![]),
        ("bytes that are no message", vec![vec![0xff; 100]]),
        ("random bytes", vec![random]),
        ("an empty frame", vec![vec![]]),
        ("an empty frame after hello", vec![frame(hello("stranger")), vec![]]),
        ("two hellos", after_hello(hello("stranger"))),
        ("items before hello", vec![frame(Body::Items(Items::default()))]),
        ("a hello of another than the certificate names", changed(|hello| hello.name = "other".into())),
        ("a hello of another protocol", changed(|hello| hello.protocol = 99)),
        ("a hello of another universe", changed(|hello| hello.universe = "10.0.0.0/8".into())),
        ("a hello without a universe", changed(|hello| hello.universe = "everything".into())),
        ("a hello without a name", changed(|hello| hello.name.clear())),
        ("a hello with a bad name", changed(|hello| hello.name = "../\u{1b}[2J\n".into())),
        ("the name of the agent itself", changed(|hello| hello.name = "n1".into())),
        ("a message of five megabytes", vec![frame(hello("stranger")), vec![0x2a; 5 << 20]]),
        ("a digest of another shape", after_hello(Body::Digest(digest_of(3, 1)))),
        ("a digest of too many channels", after_hello(Body::Digest(digest_of(64, 1000)))),
        ("a summary of another shape", after_hello(Body::Summary(summary_of(u32::MAX)))),
    ];
    // These are answered with silence: an agent drops them, counts them and goes on. The second hello ends the link.
    for (what, body) in [
        ("items that are none", Body::Items(bad_items())),
        ("a thousand unicasts to nobody", Body::Unicast(unicast("nobody", 8))),
        ("a unicast without an end", Body::Unicast(unicast("n2", u32::MAX))),
        ("a unicast that asks for everything", Body::Unicast(unicast("n1", 0))),
    ] {
        let mut frames = vec![frame(hello("stranger"))];
        frames.extend(std::iter::repeat_n(frame(body), 1000));
        frames.push(frame(hello("stranger")));
        lists.push((what, frames));
    }
    lists
}

fn digest_of(buckets: usize, channels: usize) -> Digest {
    let channel = |n: usize| digest::Channel { channel: n.to_string(), buckets: vec![n as u64; buckets] };
    Digest { channels: (0..channels).map(channel).collect() }
}

fn summary_of(bucket: u32) -> Summary {
    let channel = summary::Channel { channel: "ring".into(), buckets: vec![bucket], ..Default::default() };
    Summary { channels: vec![channel], partial: false }
}

fn unicast(to: &str, hop_limit: u32) -> Unicast {
    let body = vec![0xff; 64];
    Unicast {
        source: "stranger".into(),
        destination: to.into(),
        hop_limit,
        channel: "ring".into(),
        body,
        seal: None,
    }
}

/// On channels that are known: what does not decode, whose key, rank and body disagree, or that is too long.
fn bad_items() -> Items {
    let record = PeerRecord { name: "ghost".into(), incarnation: 7, version: 1, ..Default::default() };
    let item = |channel: &str, key: &[u8], rank: &[u8], body: &[u8]| Item {
        channel: channel.into(),
        key: key.into(),
        rank: rank.into(),
        body: body.into(),
        signature: Vec::new(),
    };
    let body = record.encode_to_vec();
    Items {
        items: vec![
            item("peers", b"ghost", &[0; 16], &[0xff; 40]),
            item("peers", b"ghost", &[0; 16], &body),
            item("peers", b"other", &[[0; 7].as_slice(), &[7], &[0; 7], &[1]].concat(), &body),
            item("peers", &[b'x'; 300], &[0; 16], &body),
            item("ring", &[10, 32, 0, 0], &[0xff; 600], b""),
            item("ring", &[10, 32, 0, 0], &[0xff; 20], b"junk"),
            item("ring", b"", b"", b""),
            item(&"c".repeat(100), b"k", b"r", b"b"),
            item("", b"", b"", &[0; 70_000]),
        ],
        complete: true,
    }
}

/// A record of TLS: a client hello of 512 bytes, of which this is the beginning.
const CLIENT_HELLO: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0, 0, 0, 0, 0];
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
/// Connections at a time that say nothing; that say little; and links that don't begin.
const SILENT: usize = 300;
const SLOW: usize = 50;
const MUTE: usize = 150;
/// Bytes by which all of it may make an agent grow.
const MEMORY: u64 = 24 << 20;
const TICK: Duration = Duration::from_millis(50);
const SOON: Duration = Duration::from_secs(20);
