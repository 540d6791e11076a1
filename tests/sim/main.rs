//! A hundred agents under a virtual clock: the real machines, a made-up network. Replayable: a failure names its seed.

mod ipam;
mod liar;
mod mesh;
mod model;
mod reference;
mod scale;
mod steps;
mod votes;

use weft_lab::sim::net;
