//! `cargo lab soak`: gigabytes of checked traffic over a bad network, between agents that are killed again and again.
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{
    Lab,
    bench::plain,
    binaries::Binaries,
    disorder::Disorder,
    fault::Fault,
    lab::check_root,
    pod::Pod,
    progress::Progress,
    tools::{self, Purpose},
    traffic::{Arrived, Datagrams, Manner, Stream},
    underlay::UPLINK,
    wait::{self, Deadline},
};

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Options {
    /// Bytes that TCP carries, in GB; UDP goes on meanwhile
    #[arg(long, value_name = "GB", default_value_t = 10.0)]
    pub gigabytes: f64,
    /// Queues of each agent
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub data_threads: u8,
    /// From one killed agent to the next, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub restart_every: f64,
    /// Only name the programs that are missing, and fail
    #[arg(long)]
    pub no_install: bool,
}

/// What went through.
#[derive(Clone, Copy, Debug)]
pub struct Soaked {
    pub tcp_bytes: u64,
    pub udp: Arrived,
    /// Underlay packets that came late.
    pub delayed: u64,
    pub restarts: usize,
    pub took: Duration,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check_root()?;
    tools::ensure_present(Purpose::Demo, !options.no_install)?;
    Binaries::get()?;
    let Soaked { tcp_bytes, udp, delayed, restarts, took } = soak(options, &Progress::visible())?;
    println!(
        "unharmed: {:.2} GB by TCP, {} of {} datagrams ({:.2} % lost), nothing twice; {LOSS} % loss each way, \
         {delayed} packets reordered, {restarts} restarts, {} queues; {:.0} s",
        tcp_bytes as f64 / 1e9,
        udp.received,
        udp.sent,
        udp.loss() * 100.0,
        options.data_threads,
        took.as_secs_f64(),
    );
    Ok(ExitCode::SUCCESS)
}

/// # Errors
/// When a byte arrives changed, a datagram twice, or the traffic stalls.
pub fn soak(options: &Options, progress: &Progress) -> anyhow::Result<Soaked> {
    let threads = options.data_threads.to_string();
    let lab = Lab::builder().nodes(2).pods(1).arguments(["--data-threads", &threads]).start()?;
    let nodes = lab.nodes();
    nodes.iter().try_for_each(|node| plain(node.netns(), UPLINK))?;
    let (a, b) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    wait::until("pods reach each other", SOON, || a.ping(b.address()?, SOON))?;
    let loss = Fault::loss(lab.underlay(), &nodes[0], LOSS)?;
    let disorder = Disorder::start(lab.underlay(), &[&*nodes[0], &*nodes[1]], LATE)?;

    let start = Instant::now();
    let each = (options.gigabytes * 1e9 / (2 * STREAMS) as f64) as u64;
    let within = Duration::from_secs_f64(60.0 + options.gigabytes * 60.0);
    let tcp = |from: &Pod, to: &Pod| Stream::start(from.netns(), to.netns(), to.address()?, each, within);
    let udp = |from: &Pod, to: &Pod| Datagrams::start(from.netns(), to.netns(), to.address()?, DATAGRAMS);
    let datagrams = [udp(&a, &b)?, udp(&b, &a)?];
    let streams: Vec<_> = (0..STREAMS)
        .flat_map(|_| [tcp(&a, &b), tcp(&b, &a)])
        .collect::<anyhow::Result<_>>()
        .context("start the traffic")?;

    let mut restarts = 0;
    while !streams.iter().all(Stream::is_finished) {
        let next = Deadline::after(Duration::from_secs_f64(options.restart_every));
        while !next.passed() && !streams.iter().all(Stream::is_finished) {
            std::thread::sleep(TICK);
        }
        let bytes: u64 = streams.iter().map(Stream::received).sum();
        progress.step(format!("{:.1} GB, {restarts} restarts", bytes as f64 / 1e9));
        let node = &nodes[restarts % 2];
        node.kill_agent()?;
        node.start_agent()?;
        node.wait_ready(START)?;
        restarts += 1;
    }
    let mut tcp_bytes = 0;
    for stream in streams {
        tcp_bytes += stream.join()?.bytes;
    }
    let took = start.elapsed();
    let mut udp = Arrived { sent: 0, received: 0 };
    for flow in datagrams {
        let arrived = flow.finish()?;
        (udp.sent, udp.received) = (udp.sent + arrived.sent, udp.received + arrived.received);
    }
    ensure!(udp.received > 0, "no datagram arrived");
    let delayed = disorder.delayed();
    ensure!(delayed > 0, "no packet was reordered");
    drop((disorder, loss));
    lab.finish()?;
    Ok(Soaked { tcp_bytes, udp, delayed, restarts, took })
}

/// TCP streams each way.
const STREAMS: usize = 4;
const DATAGRAMS: Manner = Manner { per_second: 20_000, size: 1200, at_once: 10 };
/// Percent of the underlay's packets.
const LOSS: u8 = 1;
const LATE: u8 = 1;
const SOON: Duration = Duration::from_secs(5);
const START: Duration = Duration::from_secs(20);
/// Between two looks.
const TICK: Duration = Duration::from_millis(50);
