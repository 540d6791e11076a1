//! Whatever may happen, in any order.

use super::*;
use proptest::prelude::*;

/// What may happen to one of three nodes.
#[derive(Clone, Debug)]
enum Event {
    Send(usize, usize),
    Bytes(usize, Vec<u8>),
    /// A message of the tape, with a byte changed.
    Damaged(prop::sample::Index, usize, u8),
    Surprise(usize, usize),
    Restart(usize),
    Records(usize),
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let message = prop_oneof![Just(INITIATION_LEN), Just(RESPONSE_LEN), Just(COOKIE_LEN), 1..200usize];
    let bytes = (0x10..0x17u8, message).prop_flat_map(|(kind, len)| {
        prop::collection::vec(any::<u8>(), len).prop_map(move |mut bytes| {
            bytes[0] = kind;
            bytes.iter_mut().take(4).skip(1).for_each(|byte| *byte = 0);
            bytes
        })
    });
    prop_oneof![
        8 => (0..3usize, 0..3usize).prop_map(|(from, to)| Event::Send(from, to)),
        4 => (0..3usize, bytes).prop_map(|(node, bytes)| Event::Bytes(node, bytes)),
        4 => (any::<prop::sample::Index>(), 0..INITIATION_LEN, any::<u8>())
            .prop_map(|(index, at, byte)| Event::Damaged(index, at, byte)),
        2 => (0..3usize, 0..3usize).prop_map(|(node, from)| Event::Surprise(node, from)),
        1 => (0..3usize).prop_map(Event::Restart),
        1 => (0..3usize).prop_map(Event::Records),
        4 => (1..400_000u64).prop_map(Event::Wait),
        4 => (1..100u64).prop_map(Event::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nobody_panics_and_all_agree_in_the_end(
        seed: u64,
        events in prop::collection::vec(event(), 1..60),
    ) {
        let mut net = Net::new(3, seed);
        (net.loss, net.copies, net.delay) = (20, 20, (1, 50));
        for event in events {
            match event {
                Event::Send(from, to) if from != to => net.send(from, to, 0),
                Event::Send(..) => {}
                Event::Bytes(node, bytes) if bytes[0] == SEALED && bytes.len() < SEALED_HEADER_LEN => {
                    net.nodes[node].machine.surprised(address(9), net.now);
                }
                Event::Bytes(node, bytes) => net.deliver(address(9), Datagram { to: address(node), bytes }),
                Event::Damaged(index, at, byte) if !net.tape.is_empty() => {
                    let (from, mut datagram) = index.get(&net.tape).clone();
                    let at = at % datagram.bytes.len();
                    datagram.bytes[at] = byte;
                    if datagram.bytes[0] != SEALED {
                        net.deliver(from, datagram);
                    }
                }
                Event::Damaged(..) => {}
                Event::Surprise(node, from) => {
                    net.nodes[node].machine.surprised(address(from), net.now);
                    net.collect(node);
                }
                Event::Restart(node) => net.restart(node),
                Event::Records(node) => net.introduce(node),
                Event::Wait(time) => net.run(ms(time)),
            }
        }
        (net.loss, net.copies, net.delay) = (0, 0, (1, 1));
        (0..3).for_each(|node| net.introduce(node));
        net.nodes.iter_mut().for_each(|node| {
            node.got.clear();
            node.waiting.clear();
        });
        // Until every handshake that was under way has ended, well or not.
        net.run(Duration::from_secs(6));
        for number in 1..=20 {
            for (from, to) in [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)] {
                net.send(from, to, number);
            }
            net.run(Duration::from_secs(1));
        }
        for (a, b) in [(0, 1), (1, 2), (0, 2)] {
            prop_assert!(net.agree(a, b), "after {:?}", net.now - net.start);
        }
        for node in &net.nodes {
            let last = node.got.iter().filter(|number| **number == 20).count();
            prop_assert_eq!(last, 2, "from both others: {:?}", &node.got);
        }
    }
}
