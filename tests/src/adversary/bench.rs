//! `cargo lab flood-bench`: what a flood of handshakes leaves of a TCP transfer's speed, with the flood on the node and beside
//! it, in turn.
//!
//! ```text
//!   n3 ──flood──▶ n1 data port ┄ or ┄▶ n3's own loopback: to make a flood takes a processor either way
//!                 n1/p1 ◀──── transfer ──── n2/p1
//! ```
use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{Datagram, Flood, Wiretap};
use crate::{
    Lab, claim,
    lab::check_root,
    pairs::{self, Ratio},
    tools::{self, Purpose},
    traffic::Stream,
    wait,
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// How often both are measured
    #[arg(long, value_name = "COUNT", default_value = "15", value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// How long one measurement takes
    #[arg(long, value_name = "SECONDS", default_value = "1.5")]
    seconds: f64,
    /// Handshakes a second
    #[arg(long, value_name = "COUNT", default_value = "100000")]
    rate: u32,
    /// Only name the programs that are missing, and fail
    #[arg(long)]
    no_install: bool,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check_root()?;
    tools::ensure_present(Purpose::Demo, !options.no_install)?;
    claim::sweep()?;
    let lab = Lab::builder().nodes(2).pods(1).start()?;
    let (here, there, n1) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?, lab.node("n1")?);
    let ear = Wiretap::on(&lab.underlay().netns, "n1")?;
    let flooder = lab.add_node()?;
    let sink = flooder.netns().run(|| Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?))?;
    let (victim, nobody) = (SocketAddr::new(n1.address(), 6783), sink.local_addr()?);
    there.ping(here.address()?, SOON)?;
    let known = initiation(&ear, victim)?;
    drop(ear);
    let unknown = [&known[..4], &vec![0xa5; known.len() - 4]].concat();
    let window = Duration::from_secs_f64(options.seconds);
    for (what, message) in [("who does not know its key", unknown), ("who knows its key", known)] {
        let within = window * 4 * (options.pairs + 1) + SOON;
        let to = here.address()?;
        let stream = Stream::start(there.netns(), here.netns(), to, u64::MAX, within)?;
        stream.advances(WARM, SOON)?;
        let mut rates = Vec::new();
        let pairs = pairs::in_turn(options.pairs as usize, |at_it| {
            let to = if at_it { victim } else { nobody };
            let flood = Flood::start(flooder.netns(), to, &message, options.rate)?;
            let (start, from) = (Instant::now(), stream.received());
            thread::sleep(window);
            let speed = (stream.received() - from) as f64 / start.elapsed().as_secs_f64();
            rates.push(flood.stop());
            Ok(speed)
        })?;
        stream.finish()?;
        rates.sort_by(f64::total_cmp);
        println!("flood by {what}: {:.0} to {:.0} a second", rates[0], rates[rates.len() - 1]);
        println!("{}", Ratio::of(&pairs));
    }
    drop((here, there, n1, flooder));
    lab.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// The first message of a handshake with a node, by somebody who knows its key.
fn initiation(ear: &Wiretap, to: SocketAddr) -> anyhow::Result<Vec<u8>> {
    let is_it = |said: &Datagram| {
        said.payload().first() == Some(&INITIATION) && SocketAddr::from(said.destination()) == to
    };
    wait::until("a handshake is heard", SOON, || {
        Ok(ear.datagrams().into_iter().find(is_it).context("none was heard")?.payload().to_vec())
    })
}

/// The first byte of such a message.
const INITIATION: u8 = 0x13;
/// Bytes after which a transfer is under way.
const WARM: u64 = 8 << 20;
const SOON: Duration = Duration::from_secs(10);
