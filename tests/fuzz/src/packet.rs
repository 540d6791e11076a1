//! A datagram from the underlay and a packet of a pod: what comes in comes from who may send it to who lives here, and
//! what is answered is answered to its sender.

use std::{
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
};
use weft::{
    datapath::{
        handshake::message::Message,
        header::{CLEAR_LEN, Envelope, Header},
        icmp,
        packet::Packet,
        relay::{PREFIX_LEN, Prefix, Verdict},
        seal::{Algorithm, OpenKey},
        table::{Home, Inputs, Owner, Peer, Table},
        verdict::{Gate, Sender, outward},
    },
    types::{DataId, PeerName},
};

pub fn run(bytes: &[u8]) {
    let _ = Message::decode(bytes);
    if let Ok(header) = Header::decode(bytes) {
        let mut again = bytes.to_vec();
        header.write(&mut again);
        assert_eq!(again, bytes, "a header says all that is in it");
        match header.envelope {
            Envelope::Clear { sender } => inward(sender, &bytes[CLEAR_LEN..], header.partial),
            Envelope::Sealed { .. } => {
                let (header, sealed) = again.split_first_chunk_mut().expect("it was decoded");
                let key = OpenKey::new(Algorithm::Aes256Gcm, &[7; 32]);
                assert!(key.open(header, sealed).is_err(), "nobody but us has that key");
            }
        }
    }
    if let Some(prefix) = Prefix::decode(bytes) {
        assert_eq!(prefix.encode(), bytes[..PREFIX_LEN], "a prefix says all that is in it");
        onward(prefix);
    }
    out(bytes);
}

fn onward(prefix: Prefix) {
    let peer = |place: u32| &TABLE.peers()[place as usize];
    match prefix.verdict(&TABLE, Some(SENDER)) {
        Ok(Verdict::Here { source }) => {
            assert_eq!((peer(source).data_id, TABLE.me()), (prefix.source, prefix.destination));
        }
        Ok(Verdict::Onward { destination, to }) => {
            assert!(prefix.hops > 0 && TABLE.by_data_id(prefix.source).is_some(), "{prefix:?}");
            assert_eq!(peer(destination).data_id, prefix.destination);
            assert!(peer(destination).endpoint == Some(to) && to != SENDER, "{prefix:?} goes to {to}");
        }
        Err(_) => {}
    }
}

fn inward(sender: DataId, inner: &[u8], partial: bool) {
    let mut gate = Gate::new(&TABLE);
    let by_id = gate.admit(Sender::Says(sender), inner, partial);
    assert_eq!(gate.admit(Sender::Says(sender), inner, partial), by_id, "and once more");
    let by_name = gate.admit(Sender::Is(&THERE), inner, partial);
    for place in [by_id, by_name].into_iter().flatten() {
        let packet = Packet::parse(inner).expect("it was let in");
        assert_eq!(TABLE.home(packet.source), Home::Peer(place));
        assert_eq!(TABLE.home(packet.destination), Home::Local);
        assert!(place == 0 || TABLE.peers()[place as usize].data_id == sender);
    }
}

fn out(bytes: &[u8]) {
    let Some(packet) = Packet::parse(bytes) else { return };
    packet.flow(bytes);
    let Err(refusal) = outward(&TABLE, &packet, bytes.len(), |_| Some(1000)) else {
        return assert!(matches!(TABLE.home(packet.destination), Home::Peer(_)));
    };
    let (Some(problem), mut answer) = (refusal.answer, Vec::new()) else { return };
    let from = BRIDGE.into_iter().find(|from| from.is_ipv4() == packet.source.is_ipv4());
    if icmp::answer(problem, &packet, bytes, from.expect("one of each family"), &mut answer) {
        let answer = Packet::parse(&answer).expect("we make whole packets");
        assert_eq!((Some(answer.source), answer.destination), (from, packet.source));
    }
}

/// On the underlay; its own packets say who it is.
const SENDER: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 3)), 6783);

static THERE: LazyLock<PeerName> = LazyLock::new(|| "there".parse().expect("a name"));

const BRIDGE: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(10, 32, 0, 1)),
    IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1)),
];

/// Two peers, one of which has no endpoint, with ranges of both families; data ids 2 and 3.
static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let endpoint = Some(SocketAddr::from(([192, 0, 2, 2], 6783)));
    let peer = |name: &PeerName, id, endpoint| Peer {
        name: name.clone(),
        data_id: DataId(id),
        endpoint,
        relay: None,
        mtu: 1400,
    };
    let ranges = [
        ("10.32.0.0/24", Owner::Me),
        ("10.32.1.0/24", Owner::Peer(0)),
        ("10.32.2.0/24", Owner::Peer(1)),
        ("fd00:77::/120", Owner::Me),
        ("fd00:77::100/120", Owner::Peer(0)),
        ("fd00:77::200/120", Owner::Peer(1)),
    ];
    Table::new(Inputs {
        me: DataId(1),
        peers: [peer(&THERE, 2, endpoint), peer(&"lost".parse().expect("a name"), 3, None)].into(),
        ranges: ranges.map(|(prefix, owner)| (prefix.parse().expect("a prefix"), owner)).into(),
        held: vec![([10, 32, 0, 9].into(), Owner::Peer(0))],
        bridge: BRIDGE.into(),
        pods: vec![[10, 32, 0, 2].into(), "fd00:77::2".parse().expect("an address")],
    })
});
