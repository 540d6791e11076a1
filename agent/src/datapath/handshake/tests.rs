//! What two and three agents come to over the simulated network.

mod chaos;
mod roaming;

use super::{message::*, noise::tests::public, peer::SHOW, sim::*, *};
use crate::{
    datapath::{
        seal::{Algorithm, REKEY_AFTER, SEALED_HEADER_LEN},
        sessions::SessionIndex,
    },
    types::{DataKey, Incarnation},
};
use std::{net::SocketAddr, time::Duration};

#[test]
fn the_first_packet_arrives_after_one_round_trip() {
    let mut net = Net::new(2, 1);
    net.delay = (10, 10);
    net.send(0, 1, 7);
    net.run(ms(30));
    assert_eq!(net.nodes[1].got, [7]);
    assert!(net.agree(0, 1));
    net.send(1, 0, 8);
    net.run(ms(10));
    assert_eq!(net.nodes[0].got, [8]);
    assert_eq!(net.tape.len(), 2, "one initiation, one response");
}

#[test]
fn who_was_called_may_send_before_the_caller_has() {
    let mut net = Net::new(2, 1);
    net.nodes[0].machine.wanted(&name(1), net.now);
    net.collect(0);
    net.run(ms(3));
    net.send(1, 0, 5);
    net.run(ms(1));
    assert_eq!(net.nodes[0].got, [5], "the caller's confirmation was enough");
}

#[test]
fn a_processor_without_aes_decides_for_both() {
    let mut net = Net::new(10, 1);
    net.send(0, 9, 1);
    net.send(9, 1, 2);
    net.run(ms(10));
    assert_eq!((&net.nodes[9].got[..], &net.nodes[1].got[..]), (&[1][..], &[2][..]));
}

#[test]
fn losses_copies_and_delays_do_not_keep_peers_apart() {
    for seed in 0..60 {
        let mut net = Net::new(2, seed);
        (net.loss, net.copies, net.delay) = (30, 30, (1, 120));
        net.send(0, 1, 0);
        if seed % 2 == 0 {
            net.send(1, 0, 0);
        }
        net.run(Duration::from_secs(5));
        (net.loss, net.delay) = (0, (1, 1));
        for number in 1..20 {
            net.send(0, 1, number);
            net.send(1, 0, number);
            net.run(ms(100));
        }
        for node in &net.nodes {
            assert!(
                node.got.ends_with(&[10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
                "seed {seed}: {:?}",
                node.got
            );
            assert!(node.waiting.is_empty(), "seed {seed}");
        }
        assert!(net.agree(0, 1), "seed {seed}");
    }
}

#[test]
fn two_that_call_each_other_at_once_agree_on_one_session() {
    for seed in 0..20 {
        let mut net = Net::new(2, seed);
        net.delay = if seed < 10 { (20, 20) } else { (1, 60) };
        net.send(0, 1, 1);
        net.send(1, 0, 2);
        net.run(Duration::from_secs(2));
        assert_eq!((&net.nodes[0].got[..], &net.nodes[1].got[..]), (&[2][..], &[1][..]), "seed {seed}");
        assert!(net.agree(0, 1), "seed {seed}");
        let receiving = |node: usize| net.nodes[node].sessions.receiving_count();
        // A call that comes when the other has been answered is answered too, and comes to nothing.
        let most = if seed < 10 { 1 } else { 2 };
        assert!(receiving(0).max(receiving(1)) <= most, "seed {seed}");
    }
}

#[test]
fn a_restart_costs_less_than_a_quarter_of_a_second_of_traffic() {
    for restarted in 0..2 {
        let mut net = Net::new(2, 1);
        net.delay = (5, 5);
        net.send(0, 1, 0);
        net.run(ms(100));
        net.restart(restarted);
        let mut number = 1;
        net.send(0, 1, number);
        net.run(ms(10));
        while net.nodes[1].got.last() != Some(&number) {
            number += 1;
            net.send(0, 1, number);
            net.run(ms(10));
            assert!(number < 20, "node {restarted} restarted: {:?}", net.nodes[1].got);
        }
        net.run(ms(50));
        net.send(1, 0, 99);
        net.run(ms(50));
        assert_eq!(net.nodes[0].got, [99], "node {restarted} restarted");
    }
}

#[test]
fn a_record_of_a_new_incarnation_makes_a_new_session() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 0);
    net.run(ms(100));
    let before = net.index(0, 1);
    net.restart(1);
    net.introduce(0);
    assert_eq!(net.index(0, 1), None, "nobody has the other end any more");
    net.run(ms(10));
    assert!(net.agree(0, 1) && net.index(0, 1) != before);
    net.introduce(0);
    net.run(ms(10));
    assert_eq!(net.tape.len(), 4, "the same record again changes nothing");
}

#[test]
fn keys_change_every_two_minutes_and_no_packet_is_lost() {
    for both in [false, true] {
        let mut net = Net::new(2, 1);
        net.delay = (1, 30);
        let (mut indices, mut sent) = (Vec::new(), 0);
        for number in 0..6000 {
            net.send(0, 1, number);
            if both {
                net.send(1, 0, number);
            }
            net.run(ms(100));
            sent = number;
            indices.push(net.index(0, 1));
            assert!(net.nodes.iter().all(|node| node.sessions.receiving_count() <= 3));
        }
        net.run(ms(100));
        indices.dedup();
        let sessions = indices.into_iter().flatten().count();
        assert!((5..=6).contains(&sessions), "{sessions} sessions in ten minutes");
        for node in if both { 0..2 } else { 1..2 } {
            let mut got = net.nodes[node].got.clone();
            got.sort_unstable();
            assert_eq!(got, (0..=sent).collect::<Vec<_>>());
        }
    }
}

#[test]
fn the_called_one_changes_keys_when_only_it_sends() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 0);
    net.run(ms(100));
    for number in 0..400 {
        net.send(1, 0, number);
        net.run(Duration::from_secs(1));
    }
    assert_eq!(net.nodes[0].got, (0..400).collect::<Vec<_>>());
}

#[test]
fn keys_change_when_a_lane_has_used_many_numbers() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 0);
    net.run(ms(100));
    let before = net.index(0, 1);
    net.nodes[0].sessions.sending(&name(1)).unwrap().take(1, REKEY_AFTER).unwrap();
    net.run(Duration::from_secs(2));
    assert!(net.index(0, 1) != before && net.agree(0, 1));
}

#[test]
fn a_confirmation_that_the_worker_could_not_tell_of_is_found() {
    let mut net = Net::new(2, 1);
    net.deaf = true;
    net.send(0, 1, 0);
    net.run(ms(1500));
    assert!(net.agree(0, 1));
}

#[test]
fn sessions_of_idle_peers_end() {
    let mut net = Net::new(2, 1);
    net.nodes[0].machine.wanted(&name(1), net.now);
    net.collect(0);
    net.run(Duration::from_secs(170));
    assert!(net.agree(0, 1));
    assert_eq!(net.tape.len(), 2);
    net.run(Duration::from_secs(15));
    assert_eq!(net.nodes[0].sessions.receiving_count() + net.nodes[1].sessions.receiving_count(), 0);
    assert_eq!(net.nodes[0].machine.next_wake(), None, "nothing is left to do");
    net.send(0, 1, 1);
    net.run(ms(10));
    assert_eq!(net.nodes[1].got, [1]);
}

#[test]
fn a_peer_that_does_not_answer_is_called_for_a_while_only() {
    let mut net = Net::new(2, 1);
    net.loss = 100;
    net.send(0, 1, 1);
    net.run(Duration::from_secs(60));
    assert!((5..10).contains(&net.tape.len()), "{} messages", net.tape.len());
    assert!(net.tape.iter().all(|(_, datagram)| datagram.bytes == net.tape[0].1.bytes));
    assert_eq!(net.nodes[0].sessions.unanswered(), &[(name(1), net.start)].into());
    net.loss = 0;
    net.send(0, 1, 2);
    net.run(ms(10));
    assert_eq!(net.nodes[1].got, [1, 2]);
    assert!(net.nodes[0].sessions.unanswered().is_empty());
}

#[test]
fn a_lost_confirmation_is_asked_for_again() {
    let mut net = Net::new(2, 1);
    net.nodes[0].machine.wanted(&name(1), net.now);
    net.collect(0);
    net.run(ms(2));
    assert!(net.index(0, 1).is_some());
    let confirmation = net.wire.pop_first().unwrap();
    assert_eq!(confirmation.1.1.bytes[0], SEALED);
    net.send(1, 0, 3);
    net.run(ms(100));
    assert!(net.nodes[0].got.is_empty());
    net.run(ms(200));
    assert_eq!(net.nodes[0].got, [3]);
    assert_eq!(net.responses(), 2);
}

#[test]
fn what_was_said_before_is_not_taken_again() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 0);
    net.send(1, 0, 0);
    net.run(ms(500));
    let (index, responses) = (net.index(1, 0), net.responses());
    for (from, datagram) in net.tape.clone() {
        net.deliver(from, datagram.clone());
        let thief = SocketAddr::from(([203, 0, 113, 1], 1));
        net.deliver(thief, datagram);
    }
    net.run(Duration::from_secs(1));
    assert!(refused(&net, 0, Refusal::Replayed) + refused(&net, 1, Refusal::Replayed) >= 2);
    assert_eq!((net.index(1, 0), net.responses()), (index, responses));
    net.send(1, 0, 9);
    net.run(ms(10));
    assert_eq!(net.nodes[0].got, [0, 9], "and the peer is where it was");
}

#[test]
fn initiations_from_before_a_restart_are_not_taken() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 0);
    net.run(ms(10));
    net.restart(0);
    net.introduce(1);
    net.run(ms(10));
    net.restart(1);
    let (from, old) = net.tape[0].clone();
    net.deliver(from, old);
    assert_eq!(refused(&net, 1, Refusal::Replayed), 1);
}

#[test]
fn wrong_keys_do_not_agree() {
    let mut net = Net::new(3, 1);
    let impostor = |number: usize, key: DataKey| Peer {
        name: name(number),
        key,
        incarnation: Incarnation(1),
        endpoint: Some(address(number)),
    };
    let other = public(&secret(7));
    net.nodes[0].machine.set_peers(vec![impostor(1, other)], net.now);
    net.send(0, 1, 1);
    net.run(ms(100));
    assert_eq!(refused(&net, 1, Refusal::WrongMac), 1, "the callee's key is another");
    net.nodes[1].machine.set_peers(vec![impostor(2, other)], net.now);
    net.send(2, 1, 1);
    net.run(ms(100));
    assert_eq!(refused(&net, 1, Refusal::UnknownPeer), 1, "the caller's key is another");
    assert!(net.index(0, 1).is_none() && net.index(2, 1).is_none() && net.nodes[1].got.is_empty());
}

#[test]
fn a_peer_that_publishes_anothers_key_does_not_stand_for_it() {
    let mut net = Net::new(3, 1);
    let peer = |number: usize, key: usize, place: usize| Peer {
        name: name(number),
        key: public(&secret(key)),
        incarnation: Incarnation(1),
        endpoint: Some(address(place)),
    };
    // Node 2 says that node 1's key is its own, and passes what comes on to node 1.
    net.nodes[0].machine.set_peers(vec![peer(1, 1, 1), peer(2, 1, 1)], net.now);
    net.send(1, 0, 1);
    net.run(ms(10));
    assert_eq!(net.nodes[0].got, [1]);
    assert!(net.index(0, 1).is_some() && net.index(0, 2).is_none());
    net.send(0, 2, 2);
    net.run(ms(10));
    assert_eq!(refused(&net, 1, Refusal::Unopened), 1, "meant for another name");
    assert!(net.agree(0, 1) && net.index(0, 2).is_none());
}

#[test]
fn a_changed_key_ends_the_sessions() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 0);
    net.run(ms(10));
    let peer = |key| Peer { name: name(1), key, incarnation: Incarnation(1), endpoint: Some(address(1)) };
    net.nodes[0].machine.set_peers(vec![peer(public(&secret(5)))], net.now);
    net.collect(0);
    assert_eq!((net.index(0, 1), net.nodes[0].sessions.receiving_count()), (None, 0));
    net.nodes[1].machine.set_peers(vec![], net.now);
    net.collect(1);
    assert_eq!((net.index(1, 0), net.nodes[1].sessions.receiving_count()), (None, 0), "a peer that is gone");
}

#[test]
fn who_both_calls_and_is_called_in_a_flood_still_gets_through() {
    for insider in [false, true] {
        let mut net = Net::new(2, 1);
        let mut flood = random(2);
        let (mut answers, mut number) = (0, 0);
        for round in 0u64..500 {
            // A hundred thousand a second, from one address.
            for _ in 0..100 {
                number += 1;
                let mut bytes = [0; INITIATION_LEN];
                flood(&mut bytes);
                bytes[..4].copy_from_slice(&[INITIATION, 0, 0, 0]);
                if insider {
                    gate::Door::of(&public(&secret(1))).write_macs(&mut bytes, None);
                }
                net.deliver(address(100), Datagram { to: address(1), bytes: bytes.to_vec() });
            }
            if round == 200 {
                net.send(0, 1, 1);
            }
            net.run(ms(1));
        }
        answers += net.tape.iter().filter(|(_, datagram)| datagram.to == address(100)).count();
        assert_eq!(net.nodes[1].got, [1], "insider: {insider}");
        let unopened = refused(&net, 1, Refusal::Unopened);
        let busy = refused(&net, 1, Refusal::Busy);
        if insider {
            assert!(unopened <= 300, "{unopened} times Diffie and Hellman were asked");
            assert!(
                answers <= 1300 && busy + unopened >= number,
                "{answers} answers, {busy} of {number} busy"
            );
        } else {
            assert_eq!((unopened, busy, answers), (0, 0, 0));
            assert_eq!(refused(&net, 1, Refusal::WrongMac), number);
        }
    }
}

#[test]
fn packets_of_unknown_sessions_cause_few_calls() {
    let mut net = Net::new(2, 1);
    net.send(0, 1, 1);
    net.run(Duration::from_secs(10));
    let before = net.tape.len();
    for _ in 0..10_000 {
        net.nodes[0].machine.surprised(address(1), net.now);
        net.nodes[0].machine.surprised(address(77), net.now);
        net.collect(0);
        net.run(ms(1));
    }
    let calls = net.tape.len() - before;
    assert!(calls <= 2 * 3, "{calls} messages in ten seconds");
    net.send(0, 1, 2);
    net.run(ms(10));
    assert_eq!(net.nodes[1].got, [1, 2]);
}

#[test]
fn an_index_that_is_in_use_is_drawn_again() {
    let mut net = Net::new(3, 1);
    let mut rng = random(5);
    let mut draws = 0;
    let config = Config {
        name: name(0),
        secret: secret(0),
        key: public(&secret(0)),
        incarnation: Incarnation(2),
        algorithm: Algorithm::Aes256Gcm,
        lanes: WORKERS,
        random: Box::new(move |bytes| match bytes.len() {
            4 => {
                draws += 1;
                bytes.fill(if draws < 10 { 1 } else { 2 });
            }
            _ => rng(bytes),
        }),
    };
    net.nodes[0].machine = Machine::new(config, net.now);
    net.introduce(0);
    net.send(0, 1, 1);
    net.send(0, 2, 2);
    net.run(ms(10));
    assert_eq!((&net.nodes[1].got[..], &net.nodes[2].got[..]), (&[1][..], &[2][..]));
    let known = |index| net.nodes[0].sessions.receiving(SessionIndex(index)).is_some();
    assert!(known(0x0101_0101) && known(0x0202_0202));
}
