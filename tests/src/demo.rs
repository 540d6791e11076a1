//! `cargo lab demo`: three nodes, two pods each, and everything that a user would try.
use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{
    Lab,
    binaries::Binaries,
    claim,
    lab::check_root,
    progress::Progress,
    report::{Quantiles, Report},
    tools::{self, Purpose},
    traffic::{self, Stream},
    wait,
};

#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// Write the report as JSON to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run the agents with CAP_NET_ADMIN as their only capability, on a read-only file system
    #[arg(long)]
    user_caps: bool,
    /// Only name the programs that are missing, and fail
    #[arg(long)]
    no_install: bool,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check_root()?;
    tools::ensure_present(Purpose::Demo, !options.no_install)?;
    let swept = claim::sweep()?;
    if !swept.is_empty() {
        eprintln!("cleaned up behind labs that were killed: {}", swept.join(", "));
    }
    Binaries::get()?;
    let mut report = Report::default();
    let outcome = demonstrate(options, &mut report);
    if let Err(error) = outcome {
        report.check("the lab comes up", Err(error));
    }
    report.conclude();
    println!("{}", report.table());
    if let Some(file) = &options.json {
        report.write(file)?;
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn demonstrate(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let start = Instant::now();
    let builder = Lab::builder().nodes(NODES).underlay_mtu("n3", SMALL_MTU).confined(options.user_caps);
    let lab = builder.progress(Progress::visible()).start()?;
    let progress = Progress::visible();
    (report.nodes, report.pods) = (NODES, NODES * PODS);

    let attached = attach(&lab, report);
    if report.check("pods are attached", attached) {
        for (name, check) in CHECKS {
            progress.step(*name);
            let outcome = check(&lab, report);
            if !report.check(name, outcome) {
                let logs =
                    lab.nodes().into_iter().map(|node| format!("{}:\n{}", node.name(), node.log_tail()));
                progress
                    .note(format!("{name} failed. What the agents said last:\n{}", logs.collect::<String>()));
            }
        }
    }
    progress.step("the end");
    let finished = lab.finish();
    report.check("nothing is left", finished.map(|()| "no link, route, table, mount, process".into()));
    report.took_s = (start.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    Ok(())
}

type CheckFn = fn(&Lab, &mut Report) -> anyhow::Result<String>;

/// In this order.
const CHECKS: &[(&str, CheckFn)] = &[
    ("every pod pings every pod", |lab, _| all_pairs(lab)),
    ("UDP arrives unchanged", |lab, _| udp(lab)),
    ("TCP carries 64 MiB unchanged", tcp),
    ("nodes ping remote pods", |lab, _| host_to_pod(lab)),
    ("pods go outside as their node", |lab, _| masquerade(lab)),
    ("a TCP transfer survives an agent's restart", |lab, _| restart(lab)),
    ("too big a packet gets its ICMP error", |lab, _| path_mtu(lab)),
    ("TCP goes on over the smaller path", |lab, _| tcp_over_smaller_path(lab)),
    ("pods are detached", detach),
];

fn attach(lab: &Lab, report: &mut Report) -> anyhow::Result<String> {
    let mut times = Vec::new();
    for node in lab.nodes() {
        for _ in 0..PODS {
            times.push(lab.add_pod(&node)?.attach()?.took);
        }
    }
    report.add_ms = Quantiles::of(&times);
    let addresses: Vec<_> =
        lab.pods().iter().map(|pod| Ok(pod.address()?.to_string())).collect::<anyhow::Result<_>>()?;
    Ok(addresses.join(" "))
}

fn all_pairs(lab: &Lab) -> anyhow::Result<String> {
    let pods = lab.pods();
    let mut times = Vec::new();
    for from in &pods {
        for to in pods.iter().filter(|to| to.full_name() != from.full_name()) {
            let what = format!("{} reaches {}", from.full_name(), to.full_name());
            let address = to.address()?;
            times.push(wait::until(&what, SOON, || from.ping(address, Duration::from_millis(500)))?);
        }
    }
    Ok(format!("{} pairs, median round trip {:.2} ms", times.len(), Quantiles::of(&times).p50))
}

fn udp(lab: &Lab) -> anyhow::Result<String> {
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    for size in [0, 1, 1000, 8000] {
        traffic::udp_echo(from.netns(), to.netns(), to.address()?, (100, size), SOON)?;
    }
    Ok("400 datagrams of 0 to 8,000 bytes, there and back".into())
}

fn tcp(lab: &Lab, report: &mut Report) -> anyhow::Result<String> {
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p2")?);
    let done = traffic::transfer(from.netns(), to.netns(), to.address()?, TRANSFER, LONG)?;
    report.tcp_gbps = (done.gigabits_per_second() * 100.0).round() / 100.0;
    Ok(format!("{:.2} Gb/s, SHA-256 {}… at both ends", report.tcp_gbps, &done.sha256[..12]))
}

fn host_to_pod(lab: &Lab) -> anyhow::Result<String> {
    let (from, to) = (lab.node("n1")?, lab.pod("n3/p1")?.address()?);
    let took = wait::until("n1 reaches n3/p1", SOON, || {
        traffic::ping(from.netns(), to, Duration::from_millis(500))
    })?;
    Ok(format!("n1 to n3/p1 in {:.2} ms", took.as_secs_f64() * 1e3))
}

fn masquerade(lab: &Lab) -> anyhow::Result<String> {
    let (pod, underlay) = (lab.pod("n2/p1")?, lab.underlay());
    let seen = traffic::seen_as(pod.netns(), &underlay.outside, underlay.outside_address(), SOON)?;
    let node = pod.node().address();
    ensure!(seen == node, "the server outside saw {seen}, not the node's {node}");
    Ok(format!("{} is seen as {seen}", pod.address()?))
}

fn restart(lab: &Lab) -> anyhow::Result<String> {
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    let agent = to.node();
    let stream = Stream::start(from.netns(), to.netns(), to.address()?, u64::MAX, LONG)?;
    stream.advances(8 << 20, SOON).context("before the restart")?;
    agent.stop_agent()?;
    let start = Instant::now();
    agent.start_agent()?;
    stream.advances(1, SOON).context("after the restart")?;
    let back = start.elapsed();
    stream.advances(8 << 20, SOON).context("after the restart")?;
    agent.wait_ready(SOON)?;
    let done = stream.finish()?;
    let mebibytes = done.bytes >> 20;
    Ok(format!("{mebibytes} MiB unchanged; data flowed {} ms after the new process", back.as_millis()))
}

fn path_mtu(lab: &Lab) -> anyhow::Result<String> {
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n3/p1")?);
    let found = traffic::path_mtu(from.netns(), "eth0", to.address()?, SOON)?;
    ensure!(found.path < SMALL_MTU, "the path takes {} bytes, the underlay only {SMALL_MTU}", found.path);
    let (interface, path, took) = (found.interface, found.path, found.took.as_millis());
    Ok(format!("{interface} bytes do not fit, {path} do; told after {took} ms"))
}

fn tcp_over_smaller_path(lab: &Lab) -> anyhow::Result<String> {
    let (big, small) = (lab.pod("n1/p2")?, lab.pod("n3/p2")?);
    let there = traffic::transfer(big.netns(), small.netns(), small.address()?, TRANSFER / 8, LONG)?;
    let back = traffic::transfer(small.netns(), big.netns(), big.address()?, TRANSFER / 8, LONG)?;
    let (there, back) = (there.gigabits_per_second(), back.gigabits_per_second());
    Ok(format!("8 MiB each way: {there:.2} and {back:.2} Gb/s"))
}

fn detach(lab: &Lab, report: &mut Report) -> anyhow::Result<String> {
    let pods = lab.pods();
    let times: Vec<_> = pods.iter().map(|pod| pod.detach()).collect::<Result<_, _>>()?;
    report.del_ms = Quantiles::of(&times);
    for pod in &pods {
        let left = pod.netns().links(async |links| links.names().await)?;
        ensure!(left == ["lo"], "{} still has {}", pod.full_name(), left.join(", "));
        // The second time is no error either.
        pod.detach()?;
    }
    for node in lab.nodes() {
        let left = node.netns().links(async |links| links.names().await)?;
        let veths: Vec<_> = left.into_iter().filter(|name| name.starts_with("wf")).collect();
        ensure!(veths.is_empty(), "{} still has {}", node.name(), veths.join(", "));
    }
    Ok(format!("{} pods, twice", pods.len()))
}

const NODES: usize = 3;
const PODS: usize = 2;
/// Bytes of the big transfer.
const TRANSFER: u64 = 64 << 20;
/// The underlay's MTU on the third node, in bytes.
const SMALL_MTU: u32 = 1300;
/// For what takes milliseconds when all is well.
const SOON: Duration = Duration::from_secs(5);
/// For a whole transfer.
const LONG: Duration = Duration::from_secs(20);
