//! Somebody on the underlay who hears all that passes a cable, says what it likes there, and says it often.
//!
//! ```text
//!   n1 eth0 ── n1 ┐                        Wiretap   frames of a cable: heard, changed, said again
//!              tap┤ bridge "wire"          Flood     one datagram, over and over, so many a second
//!   n2 eth0 ── n2 ┘
//! ```

pub mod bench;
mod flood;
mod wiretap;

pub use flood::Flood;
pub use wiretap::{Datagram, Wiretap};
