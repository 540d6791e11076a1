//! What somebody sees who listens on the underlay, and what sealing costs there.
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::ensure;
use weft_lab::{
    Lab,
    adversary::{Datagram, Wiretap},
    fault,
    node::Node,
    pod::Pod,
    wait,
};

use crate::seen;

#[test]
fn by_default_nobody_on_the_underlay_sees_what_pods_say() {
    let (lab, tap) = tapped(&[]);
    let (here, there) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    say(&here, &there);
    say(&there, &here);
    // Somebody joins, and is told everything.
    let joiner = lab.add_node().unwrap();
    joiner.start_agent().unwrap();
    joiner.wait_ready(SOON).unwrap();
    let frames = tap.frames();
    let control = frames.iter().filter(|frame| is_control(frame)).count();
    let data: usize = tap.datagrams().iter().map(|datagram| datagram.payload().len()).sum();
    assert!(control > 10 && data > 2 * STREAM, "{control} control segments, {data} bytes of data are heard");
    assert_eq!(frames.iter().filter(|frame| shows(frame)).count(), 0);
    lab.finish().unwrap();
}

#[test]
fn with_encryption_off_everybody_on_the_underlay_does() {
    let (lab, tap) = tapped(&["--encryption", "off"]);
    say(&lab.pod("n1/p1").unwrap(), &lab.pod("n2/p1").unwrap());
    assert!(tap.frames().iter().any(|frame| shows(frame)));
    lab.finish().unwrap();
}

#[test]
fn a_sealed_packet_takes_sixty_bytes_more_on_the_wire() {
    overhead(&[], SEALED, 60);
}

#[test]
fn a_clear_packet_takes_thirty_six_bytes_more_on_the_wire() {
    overhead(&["--encryption", "off"], CLEAR, 36);
}

#[test]
fn where_one_requires_encryption_and_the_other_has_it_off_nothing_passes_and_both_say_why() {
    let lab = Lab::builder().nodes(2).pods(1).without_agents().start().unwrap();
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    n1.configure(|settings| settings.more.extend(["--encryption", "off"].map(String::from)));
    lab.nodes().iter().for_each(|node| node.start_agent().unwrap());
    lab.nodes().iter().for_each(|node| node.wait_ready(SOON).unwrap());
    lab.pods().iter().for_each(|pod| drop(pod.attach().unwrap()));
    let (a, b) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    for (node, why) in [
        (&n1, "peer n2 requires encryption, which is off here: no packets are exchanged"),
        (&n2, "peer n1 has encryption off, which is required here: no packets are exchanged"),
    ] {
        wait::until("status says why", SOON, || {
            let status = node.weft(&["status"])?;
            let text = String::from_utf8_lossy(&status.stdout);
            ensure!(text.contains(why), "{} says {text}", node.name());
            Ok(())
        })
        .unwrap();
    }
    assert!(a.ping(b.address().unwrap(), SHORT).is_err());
    assert!(b.ping(a.address().unwrap(), SHORT).is_err());
    // What comes in clear, and what waited for a key in vain.
    for reason in ["clear", "no_session"] {
        wait::until(&format!("n2 counts {reason}"), SOON, || {
            ensure!(seen::drops(&n2)?[reason] > 0);
            Ok(())
        })
        .unwrap();
    }
    lab.finish().unwrap();
}

/// Has a pod talk on cables on which every packet is whole, and compares what the node was given to carry with what is
/// heard of it.
fn overhead(arguments: &[&str], kind: u8, most: usize) {
    let (lab, tap) = tapped(arguments);
    lab.nodes().iter().for_each(|node| fault::segmentation(node, false).unwrap());
    let (n1, here, there) = (lab.node("n1").unwrap(), lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let ours = |datagram: &Datagram| {
        *datagram.source().ip() == n1.address() && datagram.payload().first() == Some(&kind)
    };
    wait::until("the pods reach each other", SOON, || here.ping(there.address()?, SHORT)).unwrap();
    let heard = || -> Vec<_> {
        let heard = tap.datagrams().into_iter();
        heard.filter(|datagram| ours(datagram) && datagram.payload().len() > 32).collect()
    };
    let so_far = wait::until("all that was sent so far is heard", SOON, || {
        let (packets, bytes) = sent(&n1)?;
        ensure!(heard().len() == packets, "{} of {packets} packets", heard().len());
        Ok((packets, bytes))
    });
    let (packets, bytes) = so_far.unwrap();
    tap.clear();
    say(&here, &there);
    let heard = wait::until("all that was sent is heard", SOON, || {
        let (packets, bytes) = sent(&n1).map(|(p, b)| (p - packets, b - bytes))?;
        let heard = heard();
        ensure!(heard.len() == packets, "{} of {packets} packets", heard.len());
        let outer: usize = heard.iter().map(Datagram::ip_len).sum();
        ensure!(outer - bytes <= packets * most, "{} bytes more in {packets} packets", outer - bytes);
        Ok(heard)
    });
    let heard = heard.unwrap();
    let whole = heard.iter().filter(|datagram| datagram.ip_len() > 1400).count();
    assert!(whole > STREAM / 1500, "{whole} packets are segments of super-packets");
    if kind == CLEAR {
        for datagram in heard {
            let inner = &datagram.payload()[8..];
            let length = usize::from(u16::from_be_bytes([inner[2], inner[3]]));
            assert!(datagram.ip_len() - length <= most, "{} around {length}", datagram.ip_len());
        }
    }
    lab.finish().unwrap();
}

/// Two nodes with a pod each that have not yet said anything, and a tap on the first one's cable.
fn tapped(arguments: &[&str]) -> (Lab, Wiretap) {
    let lab = Lab::builder().nodes(2).pods(1).arguments(arguments.iter().copied()).start().unwrap();
    let tap = Wiretap::on(&lab.underlay().netns, "n1").unwrap();
    (lab, tap)
}

/// Says the mark to a pod, in datagrams and in a stream, until all of it is there.
fn say(from: &Pod, to: &Pod) {
    let at = (to.address().unwrap(), 0);
    let (heard, listener) = to.netns().run(|| Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?))).unwrap();
    heard.set_read_timeout(Some(SOON)).unwrap();
    let (udp, tcp) = (heard.local_addr().unwrap(), listener.local_addr().unwrap());
    let words = MARK.repeat(LENGTHS[LENGTHS.len() - 1] / MARK.len() + 1);
    let socket = from.netns().run(|| Ok(UdpSocket::bind("0.0.0.0:0")?)).unwrap();
    let mut buffer = [0; 2048];
    for length in LENGTHS {
        socket.send_to(&words[..length], udp).unwrap();
        assert_eq!(heard.recv(&mut buffer).expect("a datagram"), length);
    }
    let mut stream = from.netns().run(|| Ok(TcpStream::connect_timeout(&tcp, SOON)?)).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    other.set_read_timeout(Some(SOON)).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || stream.write_all(&MARK.repeat(STREAM / MARK.len())).unwrap());
        let mut all = Vec::new();
        other.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), STREAM);
    });
}

/// Whether a part of the mark is in it: what has more than a few bytes of what pods said has that part.
fn shows(frame: &[u8]) -> bool {
    frame.windows(8).any(|bytes| bytes == &MARK[..8])
}

/// TCP to or from the control port, over IPv4.
fn is_control(frame: &[u8]) -> bool {
    let port = |at: usize| frame.get(at..at + 2) == Some(&6783_u16.to_be_bytes());
    frame.get(23) == Some(&6) && (port(34) || port(36))
}

/// Inner packets that the node has sent to others, and their bytes.
fn sent(node: &Node) -> anyhow::Result<(usize, usize)> {
    let metric = |name: &str| seen::metric(node, &format!("{name}{{direction=\"sent\"}}"));
    Ok((metric("weft_packets_total")? as usize, metric("weft_bytes_total")? as usize))
}

/// What pods say, over and over.
const MARK: &[u8; 16] = b"\x8f\xc1Pods say \xe9th\x07\x91";
const STREAM: usize = 1 << 20;
const LENGTHS: [usize; 5] = [1, 16, 100, 999, 1372];
/// First byte of a data packet.
const CLEAR: u8 = 0x11;
const SEALED: u8 = 0x12;
const SHORT: Duration = Duration::from_millis(500);
const SOON: Duration = Duration::from_secs(20);
