//! What one visit to a path finds out.
use std::fs;

use anyhow::Context;
use serde::Serialize;

use super::{
    generator::{Flow, exchange, tcp},
    paths::Site,
    plan::Times,
    search::Search,
};
use crate::process::Process;

/// The measures, each as a `T`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures<T> {
    /// One TCP stream, gigabits per second.
    pub tcp1_gbps: T,
    /// Four TCP streams together, gigabits per second.
    pub tcp4_gbps: T,
    /// UDP with 64 bytes that arrives while more is sent than fits, thousands per second.
    pub flood_kpps: T,
    /// The greatest rate of which at most 0.1 % is lost, thousands per second.
    pub ndr_kpps: T,
    /// Request and response of one byte over UDP, microseconds.
    pub rr_p50_us: T,
    pub rr_p99_us: T,
    /// Time that the machine's processors are busy while one TCP stream moves a gigabyte, seconds.
    pub cpu_s_per_gb: T,
    /// Resident memory of the larger of the two daemons, megabytes; none where the kernel does the work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_mb: Option<T>,
}

/// What one visit has found.
pub type Sample = Figures<f64>;

/// Measures a path once.
pub fn visit(site: &Site, times: &Times) -> anyhow::Result<Sample> {
    let way = site.way();
    let one = tcp(way, 1, times.warm_up, times.tcp).context("one TCP stream")?;
    let four = tcp(way, 4, times.warm_up, times.tcp).context("four TCP streams")?;
    let flow = Flow::open(way).context("UDP")?;
    let flood = flow.flood(times.warm_up, times.flood);
    let undisturbed = undisturbed(&flow, flood, times);
    let round_trips = exchange(way, times.exchange).context("request and response")?;
    let memory = site.processes().iter().map(resident).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Figures {
        tcp1_gbps: one.gigabits_per_second(),
        tcp4_gbps: four.gigabits_per_second(),
        flood_kpps: flood / 1e3,
        ndr_kpps: undisturbed / 1e3,
        rr_p50_us: round_trips.median.as_secs_f64() * 1e6,
        rr_p99_us: round_trips.p99.as_secs_f64() * 1e6,
        cpu_s_per_gb: one.seconds_per_gigabyte(),
        rss_mb: memory.into_iter().reduce(f64::max),
    })
}

/// The greatest rate with hardly any loss; what arrives under a flood is the first guess.
fn undisturbed(flow: &Flow, flood: f64, times: &Times) -> f64 {
    let mut search = Search::new(flood);
    for _ in 0..times.trials {
        let Some(rate) = search.next() else { break };
        let trial = flow.trial(rate, times.trial);
        search.judge(trial.rate(), trial.loss());
    }
    search.best()
}

/// In megabytes.
fn resident(process: &Process) -> anyhow::Result<f64> {
    let file = format!("/proc/{}/status", process.pid);
    let status = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let kibibytes =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    kibibytes.map(|kib: f64| kib * 1024e-6).with_context(|| format!("{file} says nothing of resident memory"))
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn this_process_takes_some_memory() {
        let mine = resident(&Process::of(Pid::this()).unwrap()).unwrap();
        assert!((0.5..4000.0).contains(&mine), "{mine} MB");
    }
}
