//! A hundred agents converge; `cargo lab scale --sizes 1000` shows the same of a thousand, in some ten minutes.

use weft_lab::{
    progress::Progress,
    scale::{self, Start},
};

#[test]
fn a_hundred_agents_hear_of_joiners_and_leavers_and_are_one_again_after_a_partition() {
    let figures = scale::measure(NODES, 1, Start::Grows { sealed: false }, &Progress::Lines);
    println!("{figures:#?}");
    assert!(figures.join_s <= 2.0 && figures.leave_s <= 2.0 && figures.heal_s <= 5.0, "{figures:?}");
    assert!(figures.idle_bytes_per_second < 2000.0, "{figures:?}");
}

const NODES: usize = 100;
