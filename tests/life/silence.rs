//! A control link that dies without a word.
use std::time::{Duration, Instant};

use anyhow::ensure;
use weft_lab::{fault::Fault, wait};

use crate::harness::{SOON, lab, metric, reaches};

#[test]
fn a_link_that_falls_silent_is_noticed_and_made_anew() {
    let lab = lab(2, 1);
    let nodes = lab.nodes();
    let linked = |count: f64| {
        for node in &nodes {
            let links = metric(node, "weft_links")?;
            ensure!(links == count, "{} has {links} links", node.name());
        }
        Ok(())
    };
    wait::until("they are linked", SOON, || linked(1.0)).unwrap();
    let cut = Fault::partition(lab.underlay(), &[&nodes[0]], &[&nodes[1]]).unwrap();
    let start = Instant::now();
    wait::until("the silence is noticed", Duration::from_secs(5), || linked(0.0)).unwrap();
    let noticed = start.elapsed();
    assert!(nodes.iter().all(|node| node.log().contains("link down")));
    drop(cut);
    let start = Instant::now();
    wait::until("they are linked again", Duration::from_secs(5), || linked(1.0)).unwrap();
    println!("noticed after {noticed:?}, linked again after {:?}", start.elapsed());
    reaches(&lab.pod("n1/p1").unwrap(), &lab.pod("n2/p1").unwrap());
}
