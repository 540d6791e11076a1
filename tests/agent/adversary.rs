//! Somebody on the underlay who has no part in the network, one who has had, and one who has and lies: each thing that
//! they try is dropped, for a reason that is counted or told.
//!
//! ```text
//!   p1 ─ n1 ◀── mouth ── says frames    bridge    hears frames ── ear ── n2 ─ p1      they can be kept from arriving
//! ```
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use etherparse::PacketBuilder;
use weft::{ipam::token::Token, mesh::peers::PeerRecord, types::Incarnation};
use weft_lab::{
    Lab,
    adversary::{Datagram, Flood, Wiretap},
    fault::{self, Fault},
    keys,
    node::Node,
    pod::Pod,
    traffic::Stream,
    wait,
};

use crate::{
    insider::{Insider, grants, sealed_token},
    seen,
    stranger::{Link, talk},
};

#[test]
fn a_sealed_packet_that_is_changed_in_any_bit_is_dropped_and_harms_no_other() {
    let scene = Scene::new();
    let caught = scene.catch();
    let sealed = caught.payload();
    let flipped = |bits: &mut dyn Iterator<Item = usize>| -> Vec<Vec<u8>> {
        let flip = |bit: usize| {
            let mut changed = sealed.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            caught.with(&changed)
        };
        bits.map(flip).collect()
    };
    let all = sealed.len() * 8;
    for (what, bits, reasons) in [
        // One of them is a relayed packet's.
        ("kind", 0..4, &["malformed", "unknown_kind"][..]),
        ("version", 4..8, &["unknown_version"]),
        ("partial checksum", 8..9, &["forged"]),
        ("other flags", 9..16, &["malformed"]),
        ("flow", 16..32, &["forged"]),
        // A number that came already is not looked at further.
        ("counter", 64..128, &["forged", "replayed"]),
        ("inner packet and tag", 128..all, &["forged"]),
        // Last: n1 makes new keys with the peer that seems to know others.
        ("session index", 32..64, &["no_session"]),
    ] {
        scene.is_dropped(what, reasons, &flipped(&mut bits.into_iter()));
    }
    let cut = |lengths: std::ops::Range<usize>| {
        lengths.map(|length| caught.with(&sealed[..length])).collect::<Vec<_>>()
    };
    scene.is_dropped("no whole header", &["malformed"], &cut(0..16));
    scene.is_dropped("no whole packet", &["forged"], &cut(16..sealed.len()));
    scene.is_dropped("a byte more", &["forged"], &[caught.with(&[sealed, &[0]].concat())]);

    scene.mouth.say(&caught.with(sealed)).unwrap();
    scene.hears(CAUGHT);
    scene.is_dropped("said again", &["replayed"], &vec![caught.with(sealed); 20]);
    scene.end();
}

#[test]
fn what_is_said_again_or_made_up_leads_no_packet_astray() {
    let scene = Scene::new();
    let caught = scene.catch();
    let sealed = caught.payload();
    scene.mouth.say(&caught.with(sealed)).unwrap();
    scene.hears(CAUGHT);
    // Its session and lane, a counter to come, and what a thief puts behind it.
    let made_up = |n: u8| [&sealed[..9], &[0, 0, 0, 1, 0, 0, n], &[n; 200]].concat();
    let from_thief = |payload: &[u8]| caught.forged(THIEF, payload);
    scene.is_dropped("said again from elsewhere", &["replayed"], &vec![from_thief(sealed); 20]);
    let stolen: Vec<_> = (0..20).map(|n| from_thief(&made_up(n))).collect();
    scene.is_dropped("a stolen session index", &["forged"], &stolen);
    scene.leads_to_n2();

    // As if n2 knew of a session that n1 has forgotten: n1 asks n2, once.
    scene.mouth.clear();
    let unknown =
        (0..200).map(|n: u8| caught.with(&[&[0x12, 0, 0, 0, n, 1, 2, 3], &made_up(n)[8..]].concat()));
    scene.is_dropped("sessions of nobody", &["no_session"], &unknown.collect::<Vec<_>>());
    let calls = || {
        let said = scene.mouth.datagrams();
        let calls = said.iter().filter(|said| said.payload().first() == Some(&INITIATION));
        calls.filter(|said| *said.source().ip() == scene.n1.address()).count()
    };
    // What is heard until then is forgotten there.
    let before = calls();
    scene.leads_to_n2();
    let calls = before + calls();
    assert!(calls <= 2, "n1 was made to call {calls} times");

    // Of a packet that was held back nobody can tell that it was: it moves its sender, who moves back.
    let held = scene.catch();
    scene.mouth.say(&held.forged(THIEF, held.payload())).unwrap();
    scene.hears(CAUGHT);
    scene.reach(Duration::from_secs(20));
    scene.leads_to_n2();
    scene.end();
}

#[test]
fn handshake_messages_that_are_old_or_changed_are_dropped_by_reason() {
    let scene = Scene::new();
    let said = scene.handshake.iter().find(|said| *said.destination().ip() == scene.n1.address()).unwrap();
    let message = said.payload();
    let kind = message[0];
    let changed = |bytes: std::ops::Range<usize>| -> Vec<Vec<u8>> {
        let change = |at: usize| {
            let mut changed = message.to_vec();
            changed[at] ^= 0x40;
            said.with(&changed)
        };
        bytes.map(change).collect()
    };
    scene.is_dropped("another version", &["unknown_version"], &changed(0..1));
    scene.is_dropped("reserved bytes", &["unknown_kind"], &changed(1..4));
    let cut: Vec<_> = (1..message.len()).map(|length| said.with(&message[..length])).collect();
    scene.is_dropped("cut short", &["unknown_kind"], &cut);
    match kind {
        INITIATION => {
            let macs = message.len() - 32..message.len() - 16;
            scene.is_dropped(
                "what the authenticator covers",
                &["handshake_wrong_mac"],
                &changed(4..macs.end),
            );
            scene.is_dropped("said again", &["handshake_replayed"], &vec![said.with(message); 20]);
            let elsewhere = vec![said.forged(THIEF, message); 20];
            scene.is_dropped("said again from elsewhere", &["handshake_replayed"], &elsewhere);
        }
        _ => {
            scene.is_dropped("a changed response", &["handshake_wrong_mac"], &changed(4..message.len()));
        }
    }
    let cookie = [&[0x15, 0, 0, 0][..], &message[4..8], &[7; 40]].concat();
    scene.is_dropped(
        "a cookie for nobody",
        &["handshake_stray", "handshake_unopened"],
        &[said.with(&cookie)],
    );
    scene.leads_to_n2();
    scene.end();
}

#[test]
fn who_has_no_valid_certificate_gets_no_link_and_status_says_why() {
    let lab = Lab::builder().nodes(1).start().unwrap();
    let n1 = lab.node("n1").unwrap();
    // Keys of another CA, for somebody who believes n1's.
    let other = lab.claim().state_dir().join("other");
    keys::make_ca(&other).unwrap();
    let read = |dir: &std::path::Path| fs::read_to_string(dir.join("ca.crt")).unwrap();
    keys::write(&other.join("ca.crt"), &(read(&other) + &read(lab.ca_dir()))).unwrap();
    for (identity, why) in [
        (keys::identity(&other, "stranger"), "of no CA that this node believes"),
        (keys::expired_identity(lab.ca_dir(), "stranger"), "has expired"),
    ] {
        let tls = identity.unwrap().tls().clone();
        let opened = talk(&lab.underlay().netns, async || {
            let mut link = Link::open(n1.address(), &tls).await?;
            link.next().await?.context("n1 hangs up")
        });
        assert!(opened.is_err(), "{why}: {opened:?}");
        n1.wait_warning(why, SOON).unwrap();
    }
    assert_eq!(n1.weft_json("peers").unwrap()["peers"].as_array().unwrap().len(), 1);
    lab.finish().unwrap();
}

#[test]
fn an_insider_speaks_for_no_other_node_and_sends_as_no_other_pod() {
    let scene = Scene::new();
    let mut insider = Insider::new(&scene.lab, &scene.n1).unwrap();
    insider.agree().unwrap();
    let (here, there) = (v4(&scene.here), v4(&scene.there));
    for (what, reason, inner) in [
        ("as n2's pod", "spoofed_source", udp(there, here)),
        ("as n1's own pod", "spoofed_source", udp(here, here)),
        ("as nobody", "spoofed_source", udp(Ipv4Addr::new(198, 51, 100, 2), here)),
        ("no packet", "malformed", b"junk".to_vec()),
        ("half a packet", "malformed", udp(there, here)[..25].to_vec()),
    ] {
        let send = || (0..10).for_each(|_| insider.send(&inner).unwrap());
        counts(&scene.n1, what, &[reason], 10, send);
    }
    let ranges = scene.n1.weft_json("ipam").unwrap()["ranges"].clone();
    let loot = insider.tokens.iter().find(|token| token.owner.as_str() == "n2").unwrap().clone();
    let steal = |hands: u64| Token {
        owner: insider.node.name().parse().unwrap(),
        hands: loot.hands + hands,
        version: loot.version + 1,
        ..loot.clone()
    };
    let ghost = PeerRecord { mtu: 600, ..PeerRecord::new("n2".parse().unwrap(), Incarnation(u64::MAX / 4)) };
    let lies = vec![
        sealed_token(&insider.sealer, steal(0), grants(&loot).unwrap()).unwrap(),
        sealed_token(&insider.sealer, steal(1), grants(&loot).unwrap()).unwrap(),
        sealed_token(&insider.sealer, steal(1), Vec::new()).unwrap(),
        ghost.to_sealed(Some(&insider.sealer)),
        ghost.to_item(),
    ];
    let forged = || seen::metric(&scene.n1, "weft_gossip_events_total{event=\"items_forged\"}").unwrap();
    let (before, count) = (forged(), lies.len() as f64);
    insider.tell(lies).unwrap();
    wait::until("all lies are counted", SOON, || {
        ensure!(forged() == before + count, "{} of {count}", forged() - before);
        Ok(())
    })
    .unwrap();
    scene.n1.wait_warning(&format!("peer {}", insider.node.name()), SOON).unwrap();
    assert_eq!(scene.n1.weft_json("ipam").unwrap()["ranges"], ranges);
    scene.reach(SOON);
    drop(insider);
    scene.end();
}

#[test]
fn a_flood_of_handshakes_stops_no_transfer() {
    let _machine = crate::one_at_a_time();
    let scene = Scene::new();
    let mut insider = Insider::new(&scene.lab, &scene.n1).unwrap();
    let known = insider.initiation().unwrap();
    let unknown = [&[INITIATION, 0, 0, 0][..], &[0xa5; 165]].concat();
    // Who does not know n1's key, and who does. What they leave of the speed is told by `cargo lab flood-bench`.
    for (what, message, reason) in
        [("unknown key", unknown, "handshake_wrong_mac"), ("known key", known, "handshake_busy")]
    {
        let to = scene.here.address().unwrap();
        let stream = Stream::start(scene.there.netns(), scene.here.netns(), to, u64::MAX, SOON * 6).unwrap();
        stream.advances(8 << 20, SOON).unwrap();
        // Those that come faster than they can be looked at are counted as such.
        let counted = || {
            let drops = seen::drops(&scene.n1).unwrap();
            (drops[reason], drops[reason] + drops["handshake"])
        };
        let before = counted();
        let n1 = SocketAddr::new(scene.n1.address(), 6783);
        let flood = Flood::start(insider.node.netns(), n1, &message, 100_000).unwrap();
        wait::until(&format!("{what}: the flood is counted"), SOON, || {
            let now = counted();
            ensure!(now.0 > before.0 && now.1 > before.1 + 10_000, "{now:?} after {before:?}");
            Ok(())
        })
        .unwrap();
        stream.advances(16 << 20, SOON * 2).unwrap();
        println!("{what}: {:.0} a second", flood.stop());
        stream.finish().unwrap();
        scene.reach(SOON);
    }
    drop(insider);
    scene.end();
}

/// Two nodes whose pods have talked, and somebody who has listened from the start.
struct Scene {
    /// Before the lab, which they are a part of.
    ear: Wiretap,
    mouth: Wiretap,
    /// By which the nodes have agreed on keys.
    handshake: Vec<Datagram>,
    here: Arc<Pod>,
    there: Arc<Pod>,
    server: UdpSocket,
    client: UdpSocket,
    n1: Arc<Node>,
    n2: Arc<Node>,
    lab: Lab,
}

impl Scene {
    fn new() -> Self {
        let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
        let [n1, n2] = ["n1", "n2"].map(|name| lab.node(name).unwrap());
        let [here, there] = ["n1/p1", "n2/p1"].map(|name| lab.pod(name).unwrap());
        // Each packet is a frame of its own.
        fault::segmentation(&n2, false).unwrap();
        let [mouth, ear] = ["n1", "n2"].map(|port| Wiretap::on(&lab.underlay().netns, port).unwrap());
        let bind = |pod: &Pod| pod.netns().run(|| Ok(UdpSocket::bind((pod.address()?, 0))?)).unwrap();
        let (server, client) = (bind(&here), bind(&there));
        server.set_read_timeout(Some(SOON)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let mut scene = Self { ear, mouth, handshake: Vec::new(), here, there, server, client, n1, n2, lab };
        scene.reach(SOON);
        let is_it = |said: &Datagram| matches!(said.payload().first(), Some(&(INITIATION | RESPONSE)));
        let heard = wait::until("both messages of the handshake are heard", SOON, || {
            let heard: Vec<_> = scene.ear.datagrams().into_iter().filter(is_it).collect();
            let to: BTreeSet<_> = heard.iter().map(|said| *said.destination().ip()).collect();
            ensure!(to.len() == 2, "only what goes to {to:?}");
            Ok(heard)
        });
        scene.handshake = heard.unwrap();
        scene
    }

    /// A sealed packet with `CAUGHT` in it for the pod of n1, which has not got it.
    fn catch(&self) -> Datagram {
        let _mute = Fault::mute(self.lab.underlay(), &self.n2).unwrap();
        self.ear.clear();
        self.client.send(CAUGHT).unwrap();
        let is_it = |said: &Datagram| {
            *said.source().ip() == self.n2.address()
                && said.payload().first() == Some(&SEALED)
                && said.payload().len() == 16 + 28 + CAUGHT.len() + 16
        };
        wait::until("a packet is caught", SOON, || {
            self.ear.datagrams().into_iter().find(is_it).context("none was heard")
        })
        .unwrap()
    }

    fn hears(&self, words: &[u8]) {
        let mut buffer = [0; 2048];
        let length = self.server.recv(&mut buffer).expect("the pod hears it");
        assert_eq!(&buffer[..length], words);
    }

    /// Says the frames to n1, which counts each for one of the reasons.
    fn is_dropped(&self, what: &str, reasons: &[&str], frames: &[Vec<u8>]) {
        let say = || frames.iter().for_each(|frame| self.mouth.say(frame).unwrap());
        counts(&self.n1, what, reasons, frames.len() as u64, say);
    }

    fn reach(&self, within: Duration) {
        let to = self.here.address().unwrap();
        wait::until("the pods reach each other", within, || self.there.ping(to, SHORT)).unwrap();
    }

    /// What n1 sends goes to n2 and nowhere else.
    fn leads_to_n2(&self) {
        self.mouth.clear();
        self.reach(SOON);
        let to = wait::until("n1 is heard", SOON, || {
            let said = self.mouth.datagrams();
            let sealed = said.iter().filter(|said| said.payload().first() == Some(&SEALED));
            let of_n1 = sealed.filter(|said| *said.source().ip() == self.n1.address());
            let to: Vec<_> = of_n1.map(Datagram::destination).collect();
            ensure!(!to.is_empty(), "it has sent nothing");
            Ok(to)
        });
        let to = to.unwrap();
        assert!(to.iter().all(|to| *to.ip() == self.n2.address()), "{to:?}");
    }

    fn end(self) {
        self.n1.check_agent().unwrap();
        self.n2.check_agent().unwrap();
        let Self { lab, ear, mouth, here, there, server, client, n1, n2, .. } = self;
        drop((ear, mouth, here, there, server, client, n1, n2));
        lab.finish().unwrap();
    }
}

/// Does something to a node, which then has dropped so many packets more for the reasons, and none for another.
fn counts(node: &Node, what: &str, reasons: &[&str], count: u64, work: impl FnOnce()) {
    let before = seen::drops(node).unwrap();
    work();
    let counted = wait::until(&format!("{what}: {count} are counted as {reasons:?}"), SOON, || {
        let after = seen::drops(node)?;
        let more = after.iter().map(|(reason, n)| (reason.as_str(), n - before[reason]));
        let more: BTreeMap<_, _> = more.filter(|(reason, n)| *n > 0 && !OUTWARD.contains(reason)).collect();
        let of_reasons = more.keys().all(|reason| reasons.contains(reason));
        ensure!(of_reasons && more.values().sum::<u64>() == count, "{more:?}");
        Ok(())
    });
    counted.unwrap();
}

fn udp(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64).udp(4000, 4000);
    builder.write(&mut packet, b"what an insider has to say").unwrap();
    packet
}

fn v4(pod: &Pod) -> Ipv4Addr {
    match pod.address().unwrap() {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address} is no IPv4 address"),
    }
}

/// Its packet is as long as no handshake message.
const CAUGHT: &[u8] = b"caught on its way";
/// On the underlay, but no node's.
const THIEF: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 99), 4000);
/// First bytes of datagrams.
const SEALED: u8 = 0x12;
const INITIATION: u8 = 0x13;
const RESPONSE: u8 = 0x14;
/// Of what the node itself sends, as the kernel's own multicasts.
const OUTWARD: [&str; 6] =
    ["martian", "no_route", "no_endpoint", "too_big", "send_buffer_full", "send_refused"];
const SHORT: Duration = Duration::from_millis(500);
const SOON: Duration = Duration::from_secs(10);
