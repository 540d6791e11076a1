//! Peers that are not where their records say, and those who would have us believe so.

use super::*;

#[test]
fn a_peer_is_answered_where_it_is() {
    let mut net = Net::new(2, 1);
    net.nodes[1].address = SocketAddr::from(([203, 0, 113, 9], 4000));
    net.send(1, 0, 1);
    net.run(ms(10));
    assert_eq!(net.nodes[0].got, [1]);
    net.restart(0);
    net.send(0, 1, 2);
    net.run(ms(10));
    assert_eq!(net.nodes[1].got, [2]);
}

#[test]
fn a_peer_that_moves_is_followed_with_its_first_packet() {
    for lane in 0..2 {
        let mut net = Net::new(2, 1);
        for number in 0..4 {
            net.send(1, 0, number);
            net.run(ms(10));
        }
        assert_eq!(net.finds(0, 1), Some(address(1)));
        net.nodes[1].address = SocketAddr::from(([203, 0, 113, 9], 4000));
        let new = net.nodes[1].address;
        net.send(1, 0, 4 + lane);
        net.run(ms(1));
        assert_eq!(net.finds(0, 1), Some(port(new, lane as u8)), "lane {lane}");
        net.send(0, 1, 9);
        net.run(ms(10));
        assert_eq!((&net.nodes[1].got[..], net.finds(0, 1)), (&[9][..], Some(new)), "lane {lane}");
        // One that listens is enough; of another the port is asked for.
        assert_eq!(net.responses(), 1 + lane as usize);
    }
}

#[test]
fn a_peer_that_only_listens_is_followed_when_it_shows_where() {
    let mut net = Net::new(2, 1);
    for number in 0..4 {
        net.send(1, 0, number);
        net.run(ms(10));
    }
    net.run(SHOW);
    net.send(1, 0, 5);
    net.run(ms(10));
    net.nodes[1].address = SocketAddr::from(([203, 0, 113, 9], 4000));
    net.run(SHOW + ms(1000));
    assert_eq!(net.finds(0, 1), Some(net.nodes[1].address));
    let sent = net.sent;
    net.run(SHOW * 3);
    assert_eq!(net.sent, sent, "who does not send shows nothing");
}

#[test]
fn a_packet_that_was_caught_and_sent_from_elsewhere_moves_nobody() {
    let mut net = Net::new(2, 1);
    for number in 0..4 {
        net.send(1, 0, number);
        net.run(ms(10));
    }
    let (_, caught) = net.sealed.clone().unwrap();
    let thief = SocketAddr::from(([198, 51, 100, 1], 6783));
    net.deliver(thief, caught.clone());
    let mut changed = caught;
    changed.bytes[15] ^= 0x10;
    net.deliver(thief, changed);
    assert_eq!((net.finds(0, 1), net.responses()), (Some(address(1)), 1));
}

#[test]
fn a_packet_that_was_held_back_and_sent_from_elsewhere_does_not_keep_a_peer_there() {
    let mut net = Net::new(2, 1);
    for number in 0..4 {
        net.send(1, 0, number);
        net.run(ms(10));
    }
    net.send(1, 0, 4);
    let (_, (_, held)) = net.wire.pop_first().unwrap();
    let thief = SocketAddr::from(([198, 51, 100, 1], 6783));
    net.deliver(thief, held);
    assert_eq!(net.finds(0, 1), Some(thief), "nobody can tell that the peer has not moved");
    net.send(1, 0, 5);
    net.run(SHOW + ms(1000));
    assert_eq!(net.finds(0, 1), Some(address(1)));
}

#[test]
fn a_peer_that_is_back_where_its_record_says_is_found_there() {
    let mut net = Net::new(2, 1);
    net.nodes[1].address = SocketAddr::from(([203, 0, 113, 9], 4000));
    net.send(1, 0, 1);
    net.run(ms(10));
    assert_eq!(net.finds(0, 1), Some(net.nodes[1].address));
    net.nodes[1].address = address(1);
    // By then their session has ended.
    net.run(Duration::from_secs(200));
    net.send(0, 1, 2);
    net.run(ms(500));
    assert_eq!((&net.nodes[1].got[..], net.finds(0, 1)), (&[2][..], Some(address(1))));
}
