//! Paths that break, narrow and heal between real agents. Needs root.
#![allow(clippy::unwrap_used)] // a test's unwrap is its assertion

use std::time::Duration;
use weft_lab::{
    progress::Progress,
    scenario::{self, Measured},
    storm,
};

fn holds(measured: anyhow::Result<Vec<Measured>>) {
    let measured = measured.unwrap();
    println!("{measured:?}");
    for Measured { what, took, most } in measured {
        assert!(took <= most, "{what}: {took:?}");
    }
}

#[test]
fn a_third_node_relays_until_two_reach_each_other_again() {
    holds(scenario::relay());
}

#[test]
fn a_lost_peer_is_noticed_and_found_again_also_after_a_long_outage() {
    holds(scenario::outage(Duration::from_secs(30)));
}

#[test]
fn a_dead_node_is_noticed_by_all_others() {
    holds(scenario::kill());
}

#[test]
fn packets_pass_a_chain_of_nodes_that_reach_only_their_neighbours() {
    holds(scenario::chain());
}

#[test]
fn a_node_that_gets_another_address_is_followed_under_tcp() {
    holds(scenario::renumber());
}

#[test]
fn a_path_that_swallows_large_packets_is_found_out_under_tcp_and_grows_again() {
    holds(scenario::mtu());
}

#[test]
fn a_third_node_relays_ipv6_over_ipv6() {
    holds(scenario::relay_ipv6());
}

#[test]
fn a_path_of_jumbo_frames_is_found_out_and_used() {
    holds(scenario::jumbo());
}

#[test]
fn each_peers_path_has_a_size_of_its_own() {
    holds(scenario::differing());
}

#[test]
fn a_second_network_is_used_when_the_first_fails() {
    holds(scenario::endpoints());
}

#[test]
fn whatever_happens_for_a_while_all_is_well_again_in_five_seconds() {
    println!("{}", storm::storm(6, Duration::from_secs(25), 4, &Progress::Lines).unwrap());
}
