//! Splitting and coalescing against a plain model that builds every segment by itself, with etherparse.

use super::{
    checksum::Sum,
    coalesce::{Coalescer, Takes},
    headers::Headers,
    split::{Shape, Split, complete},
    virtio::{Gso, Kind, Virtio},
};
use etherparse::{IpHeaders, Ipv4Header, Ipv6FlowLabel, Ipv6Header, TcpHeader, UdpHeader, ip_number};
use proptest::{collection::vec, prelude::*, sample::Index};

/// What a program wrote at once, and how its host would have sent it.
#[derive(Clone, Debug)]
struct Write {
    flow: u8,
    v6: bool,
    tcp: bool,
    options: bool,
    id: u16,
    sequence: u32,
    /// CWR, PSH, FIN.
    marks: [bool; 3],
    size: usize,
    payload: Vec<u8>,
}

impl Write {
    /// A whole packet: `payload` as the segment `index` of `count`, with complete checksums.
    fn packet(&self, index: usize, count: usize, payload: &[u8]) -> Vec<u8> {
        let port = 1000 + u16::from(self.flow);
        let (mut transport, protocol) = (Vec::new(), if self.tcp { ip_number::TCP } else { ip_number::UDP });
        let (source, destination) = ([10, 32, 0, self.flow], [10, 32, 1, 1]);
        let (source6, destination6) = ([0xfd; 16], [0xfc; 16]);
        if self.tcp {
            let sequence = self.sequence.wrapping_add((index * self.size) as u32);
            let mut header = TcpHeader::new(port, 80, sequence, 500);
            header.ack = true;
            header.acknowledgment_number = 7;
            header.cwr = self.marks[0] && index == 0;
            header.psh = self.marks[1] && index + 1 == count;
            header.fin = self.marks[2] && index + 1 == count;
            if self.options {
                header.set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]).unwrap();
            }
            let checksum = match self.v6 {
                true => header.calc_checksum_ipv6_raw(source6, destination6, payload).unwrap(),
                false => header.calc_checksum_ipv4_raw(source, destination, payload).unwrap(),
            };
            // Zero has two forms, and the kernel writes this one (`CSUM_MANGLED_0`).
            header.checksum = if checksum == 0 { 0xffff } else { checksum };
            header.write(&mut transport).unwrap();
        } else {
            let mut header = UdpHeader::without_ipv4_checksum(port, 53, payload.len()).unwrap();
            header.checksum = match self.v6 {
                true => header.calc_checksum_ipv6_raw(source6, destination6, payload).unwrap(),
                false => header.calc_checksum_ipv4_raw(source, destination, payload).unwrap(),
            };
            header.write(&mut transport).unwrap();
        }
        transport.extend_from_slice(payload);
        let ip = if self.v6 {
            IpHeaders::Ipv6(
                Ipv6Header {
                    payload_length: transport.len() as u16,
                    next_header: protocol,
                    hop_limit: 60,
                    source: source6,
                    destination: destination6,
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::try_new(9).unwrap(),
                },
                Default::default(),
            )
        } else {
            let mut header =
                Ipv4Header::new(transport.len() as u16, 64, protocol, source, destination).unwrap();
            header.identification = self.id.wrapping_add(index as u16);
            header.dont_fragment = self.options;
            header.header_checksum = header.calc_header_checksum();
            IpHeaders::Ipv4(header, Default::default())
        };
        let mut packet = Vec::new();
        ip.write(&mut packet).unwrap();
        packet.extend(transport);
        packet
    }

    /// The segments as the model cuts them.
    fn segments(&self) -> Vec<Vec<u8>> {
        let chunks: Vec<_> = self.payload.chunks(self.size).collect();
        chunks.iter().enumerate().map(|(index, chunk)| self.packet(index, chunks.len(), chunk)).collect()
    }

    /// The super-packet as the kernel hands it out.
    fn whole(&self) -> (Virtio, Gso, Vec<u8>) {
        let mut packet = self.packet(0, 1, &self.payload);
        let headers = Headers::plain(&packet).unwrap();
        let kind = headers.kind;
        let gso = Gso { kind, headers: 0, size: self.size as u16, ecn: self.marks[0] };
        packet[headers.checksum_at()..][..2].fill(0xaa);
        (Virtio { partial: Some(headers.checksum()), gso: Some(gso) }, gso, packet)
    }
}

fn write(flows: u8) -> impl Strategy<Value = Write> {
    let shape = (0..flows, any::<[bool; 3]>(), 1usize..1400, 1usize..20);
    (shape, any::<(u16, u32)>(), any::<[bool; 3]>(), any::<u8>()).prop_map(
        |((flow, [v6, tcp, options], size, count), (id, sequence), marks, short)| {
            let len = size * count - usize::from(short) % size;
            let payload = (0..len).map(|at| (at * 7 + usize::from(flow)) as u8).collect();
            Write { flow, v6, tcp, options, id, sequence, marks, size, payload }
        },
    )
}

/// Splits a super-packet that was read as `foreseen`; gives its segments and whether their checksums are partial.
fn split(write: &Write, foreseen: Option<Shape>) -> (Vec<Vec<u8>>, bool) {
    let (virtio, gso, packet) = write.whole();
    let around = (8, 4);
    let whole = Shape { front: around.0, headers: 0, payload: 65_535, back: around.1 };
    let mut buffer = vec![0xee; 1 << 18];
    let foreseen = foreseen.map_or(whole, |shape| Shape { front: around.0, back: around.1, ..shape });
    let mut rest = &packet[..];
    for place in foreseen.places(&mut buffer, 65_535) {
        let (part, behind) = rest.split_at(place.len().min(rest.len()));
        place[..part.len()].copy_from_slice(part);
        rest = behind;
    }
    let head = buffer[around.0..][..packet.len().min(foreseen.headers + foreseen.payload)].to_vec();
    let split = Split::new(&virtio, gso, &head, packet.len(), around).expect("the kernel's account is right");
    let shape = split.shape();
    if shape != foreseen {
        foreseen.gather(&mut buffer, packet.len());
        shape.spread(&mut buffer, packet.len());
    }
    let total = split.segments() * (shape.stride() - shape.payload) + packet.len() - shape.headers;
    let segments = buffer[..total].chunks_mut(shape.stride()).enumerate().map(|(segment, datagram)| {
        let end = datagram.len() - around.1;
        split.write(segment, &mut datagram[around.0..end]);
        datagram[around.0..end].to_vec()
    });
    (segments.collect(), split.is_partial())
}

/// What the receiving kernel makes of a written packet when it cuts it and completes what is partial.
fn cut(virtio: &Virtio, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut packets = match virtio.gso {
        None => vec![packet.to_vec()],
        Some(gso) => {
            let whole = Headers::plain(packet).unwrap();
            assert_eq!(usize::from(gso.headers), whole.len);
            let v6 = packet[0] >> 4 == 6;
            let tcp = gso.kind != Kind::Udp;
            let mark = |bit| tcp && packet[whole.at + 13] & bit != 0;
            assert_eq!(gso.ecn, mark(0x80), "CWR is told");
            let write = Write {
                flow: if v6 { 0 } else { packet[15] },
                v6,
                tcp,
                options: if v6 || tcp { whole.len - whole.at > 20 } else { packet[6] & 0x40 != 0 },
                id: u16::from_be_bytes([packet[4], packet[5]]),
                sequence: u32::from_be_bytes(packet[whole.at + 4..][..4].try_into().unwrap()),
                marks: [mark(0x80), mark(0x08), mark(0x01)],
                size: gso.size.into(),
                payload: packet[whole.len..].to_vec(),
            };
            let flow = u16::from_be_bytes([packet[whole.at], packet[whole.at + 1]]) - 1000;
            return Write { flow: flow as u8, ..write }.segments();
        }
    };
    if let Some(place) = virtio.partial {
        assert!(complete(&mut packets[0], place));
    }
    packets
}

fn coalesced(batch: &[(Vec<u8>, bool)], takes: Takes) -> Vec<Vec<Vec<u8>>> {
    let mut buffer = Vec::new();
    let mut coalescer = Coalescer::new(takes);
    let mut places = Vec::new();
    for (packet, partial) in batch {
        buffer.extend([0; 8]);
        places.push((buffer.len()..buffer.len() + packet.len(), *partial));
        buffer.extend(packet);
    }
    for (place, partial) in places {
        coalescer.push(&buffer, place, partial, 3);
    }
    let mut written = Vec::new();
    let mut came = 0;
    for run in 0..coalescer.len() {
        let ready = coalescer.finish(run, &mut buffer);
        let mut packet = buffer[ready.head.clone()].to_vec();
        ready.pieces().for_each(|piece| packet.extend_from_slice(&buffer[piece]));
        assert!(packet.len() <= 65_535 && ready.peer == 3);
        came += ready.packets;
        written.push(cut(&ready.virtio, &packet));
        assert_eq!(written.last().unwrap().len(), ready.packets);
        assert_eq!(written.last().unwrap().iter().map(Vec::len).sum::<usize>(), ready.bytes);
    }
    assert_eq!(came, batch.len(), "none is lost, none is made up");
    written
}

/// The same packets with complete checksums.
fn completed(mut packet: Vec<u8>, partial: bool) -> Vec<u8> {
    if partial {
        let place = Headers::plain(&packet).unwrap().checksum();
        assert!(complete(&mut packet, place));
    }
    packet
}

/// The id of a packet that must not be fragmented means nothing (RFC 6864, 4): equal ones may come out as a row.
fn without_free_id(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

fn flow(packet: &[u8]) -> Vec<u8> {
    let at = if packet[0] >> 4 == 6 { 40 } else { 20 };
    [&packet[..1], &packet[at - 8..at + 4], &packet[if at == 40 { 6..7 } else { 9..10 }]].concat()
}

const ALL: Takes = Takes { tcp: true, udp: true };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn segments_are_what_the_model_cuts(write in write(3), other in write(3), foresee: bool) {
        let shape = Shape { front: 0, headers: 52, payload: other.size.max(256), back: 0 };
        let (segments, partial) = split(&write, foresee.then_some(shape));
        let segments: Vec<_> = segments.into_iter().map(|packet| completed(packet, partial)).collect();
        prop_assert_eq!(segments, write.segments());
    }

    /// Whatever is lost, doubled or out of order on the wire: what arrives is delivered, unchanged, each flow in the
    /// order of arrival.
    #[test]
    fn all_that_arrives_is_delivered_in_the_order_of_its_flow(
        writes in vec((write(3), any::<bool>()), 1..8),
        swaps in vec(any::<(Index, Index)>(), 0..6),
        losses in vec(any::<Index>(), 0..6),
        doubles in vec(any::<Index>(), 0..3),
        udp: bool,
    ) {
        let mut wire: Vec<(Vec<u8>, bool)> = Vec::new();
        for (write, offloaded) in writes {
            if offloaded {
                let (segments, partial) = split(&write, None);
                wire.extend(segments.into_iter().map(|packet| (packet, partial)));
            } else {
                wire.extend(write.segments().into_iter().map(|packet| (packet, false)));
            }
        }
        for (a, b) in swaps {
            let (a, b) = (a.index(wire.len()), b.index(wire.len()));
            wire.swap(a, b);
        }
        for at in doubles {
            let at = at.index(wire.len());
            wire.insert(at, wire[at].clone());
        }
        for at in losses {
            if wire.len() > 1 {
                wire.remove(at.index(wire.len()));
            }
        }
        let delivered: Vec<_> = coalesced(&wire, Takes { tcp: true, udp }).concat();
        let arrived: Vec<_> = wire.into_iter().map(|(packet, partial)| completed(packet, partial)).collect();
        let flows: std::collections::BTreeSet<_> = arrived.iter().map(|packet| flow(packet)).collect();
        for of in flows {
            let only = |packets: &[Vec<u8>]| {
                packets.iter().filter(|packet| flow(packet) == of).cloned().collect::<Vec<_>>()
            };
            let delivered: Vec<_> = only(&delivered).into_iter().map(without_free_id).collect();
            let arrived: Vec<_> = only(&arrived).into_iter().map(without_free_id).collect();
            prop_assert_eq!(delivered, arrived);
        }
    }

    #[test]
    fn any_bytes_are_handed_on_as_they_are(packets in vec(vec(any::<u8>(), 1..100), 1..8)) {
        let batch: Vec<_> = packets.iter().cloned().map(|packet| (packet, false)).collect();
        prop_assert_eq!(coalesced(&batch, ALL).concat(), packets);
    }

    #[test]
    fn any_account_of_a_packet_splits_or_not(
        bytes in vec(any::<u8>(), 0..200), virtio: [u8; 10], len in 0usize..70_000, version in 4u8..7,
    ) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = version << 4 | *first & 0x0f;
        }
        if let Some(virtio) = Virtio::decode(&virtio) && let Some(gso) = virtio.gso
            && let Some(split) = Split::new(&virtio, gso, &bytes, len, (8, 0))
        {
            prop_assert!(split.segments() >= 1 && split.shape().headers < len);
        }
    }
}

fn example(tcp: bool) -> Write {
    let payload = (0..5000).map(|at| at as u8).collect();
    let marks = [true, true, true];
    Write {
        flow: 1,
        v6: false,
        tcp,
        options: true,
        id: 65_534,
        sequence: u32::MAX - 2000,
        marks,
        size: 1000,
        payload,
    }
}

#[test]
fn a_split_super_packet_becomes_one_again() {
    for tcp in [true, false] {
        let (segments, partial) = split(&example(tcp), None);
        let batch: Vec<_> = segments.iter().cloned().map(|packet| (packet, partial)).collect();
        assert_eq!(coalesced(&batch, ALL), [example(tcp).segments()], "tcp: {tcp}");
        let apart = coalesced(&batch, Takes { tcp: !tcp, udp: tcp });
        assert_eq!(apart.len(), 5, "the kernel does not take what it was not asked for");
    }
}

#[test]
fn flows_that_alternate_are_told_apart() {
    let flows = [0, 1, 2].map(|flow| Write { flow, ..example(false) });
    let segments = flows.clone().map(|write| write.segments());
    let batch: Vec<_> =
        (0..5).flat_map(|at| segments.iter().map(move |of| (of[at].clone(), false))).collect();
    assert_eq!(coalesced(&batch, ALL), flows.map(|write| write.segments()));
}

#[test]
fn nothing_joins_across_what_differs() {
    let whole = example(true).segments();
    let alone = |what: &str, change: &dyn Fn(&mut [u8])| {
        let mut batch: Vec<_> = whole[..3].iter().cloned().map(|packet| (packet, false)).collect();
        change(&mut batch[1].0);
        let packet = &mut batch[1].0;
        packet[10..12].fill(0);
        let sum = Sum::default().over(&packet[..20]).checksum().to_be_bytes();
        packet[10..12].copy_from_slice(&sum);
        packet[36..38].fill(0);
        let headers = Headers::plain(packet).unwrap();
        let transport = packet.len() - 20;
        let sum = headers.pseudo(packet).and(transport as u16).over(&packet[20..]).checksum();
        packet[36..38].copy_from_slice(&sum.to_be_bytes());
        let expected: Vec<_> = batch.iter().map(|(packet, _)| packet.clone()).collect();
        let written = coalesced(&batch, ALL);
        assert_eq!(written.concat(), expected, "{what}");
        assert!(written.len() >= 2, "{what} joined: {} writes", written.len());
    };
    alone("type of service", &|packet| packet[1] ^= 4);
    alone("congestion mark", &|packet| packet[1] ^= 3);
    alone("time to live", &|packet| packet[8] -= 1);
    alone("don't fragment", &|packet| packet[6] ^= 0x40);
    alone("id", &|packet| packet[5] ^= 9);
    alone("sequence", &|packet| packet[27] ^= 1);
    alone("acknowledgement", &|packet| packet[31] ^= 1);
    alone("window", &|packet| packet[34] ^= 1);
    alone("timestamp", &|packet| packet[47] ^= 1);
    alone("echoed congestion", &|packet| packet[33] ^= 0x40);
    alone("a push", &|packet| packet[33] |= 0x08);
    alone("an urgent flag", &|packet| packet[33] |= 0x20);
    alone("a reset", &|packet| packet[33] |= 0x04);
    alone("port", &|packet| packet[21] ^= 1);
}

#[test]
fn damage_is_not_covered_up_by_a_new_checksum() {
    for tcp in [true, false] {
        let mut segments = example(tcp).segments();
        *segments[1].last_mut().unwrap() ^= 1;
        let batch: Vec<_> = segments.iter().cloned().map(|packet| (packet, false)).collect();
        let written = coalesced(&batch, ALL);
        assert!(written.contains(&vec![segments[1].clone()]), "it goes alone, as it came: tcp {tcp}");
    }
}
