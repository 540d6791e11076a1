//! `cargo lab bench`: Weft beside the bare wire, the kernel's overlay and others', in one interleaved run.
//!
//! ```text
//!   options ─▶ plan ─▶ for each wire: build and check all paths ─▶ rounds of visits ─▶ report ─▶ tables, JSON, chart
//!                                     (wires, paths, check)        (measures, generator, search)
//! ```
mod chart;
mod check;
pub(crate) mod ethtool;
pub(crate) mod generator;
mod iperf3;
mod measures;
mod paths;
mod plan;
mod report;
mod search;
mod wires;

pub(crate) use wires::plain;
pub use wires::{CABLE, Wire};

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use clap::ValueEnum;

use self::{
    measures::Sample,
    paths::{Path, Programs, Site},
    plan::Plan,
    report::Report,
};
use crate::{
    Lab,
    binaries::Binaries,
    claim,
    lab::check_root,
    progress::Progress,
    tools::{self, Purpose},
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// How often every path is measured; medians of fewer than five are mostly noise
    #[arg(long, value_name = "COUNT", default_value = "5")]
    rounds: usize,
    /// How long one TCP measurement takes; the others are in proportion
    #[arg(long, value_name = "SECONDS", default_value = "2")]
    seconds: f64,
    /// All in less than 90 seconds: short measurements, as many rounds as fit, three at most
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// Only these paths
    #[arg(long, value_name = "PATH,...", value_delimiter = ',')]
    only: Vec<Path>,
    /// Only this wire
    #[arg(long)]
    wire: Option<Wire>,
    /// Where others' programs are, if not on PATH; `benches/peers.sh DIR` fetches them
    #[arg(long, value_name = "DIR")]
    peer_bin: Option<PathBuf>,
    /// At the end have iperf3 measure one TCP stream on every path too
    #[arg(long)]
    iperf3: bool,
    /// Write the figures as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the figures into this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Only name the programs that are missing, and fail
    #[arg(long)]
    no_install: bool,
    /// Passed on to Weft's agents
    #[arg(last = true, value_name = "FLAG")]
    agent: Vec<String>,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check_root()?;
    ensure!(options.rounds > 0, "--rounds: at least one");
    ensure!(options.seconds >= 0.05, "--seconds: at least 0.05");
    tools::ensure_present(Purpose::Demo, !options.no_install)?;
    let swept = claim::sweep()?;
    if !swept.is_empty() {
        eprintln!("cleaned up behind labs that were killed: {}", swept.join(", "));
    }
    let programs = Programs::new(options.peer_bin.clone());
    if options.iperf3 {
        programs.command("iperf3").context("--iperf3")?;
    }
    let paths = options.paths(&programs)?;
    if paths.iter().any(|path| path.is_weft()) {
        Binaries::get()?;
    }
    let plan = options.plan(paths.len());
    let mut bench = Bench { options, plan, programs, samples: BTreeMap::new(), failures: Vec::new() };
    for wire in options.wires() {
        bench.measure(wire, &paths)?;
    }
    bench.conclude()
}

struct Bench<'a> {
    options: &'a Options,
    plan: Plan,
    programs: Programs,
    samples: BTreeMap<(Wire, Path), Vec<Sample>>,
    /// What went wrong with which path.
    failures: Vec<String>,
}

impl Options {
    fn plan(&self, paths: usize) -> Plan {
        match self.quick {
            true => Plan::quick(paths * self.wires().len(), QUICK),
            false => Plan::full(self.rounds, Duration::from_secs_f64(self.seconds)),
        }
    }

    fn wires(&self) -> Vec<Wire> {
        self.wire.map_or_else(|| Wire::ALL.to_vec(), |wire| vec![wire])
    }

    /// Those asked for, or all whose programs are there.
    fn paths(&self, programs: &Programs) -> anyhow::Result<Vec<Path>> {
        for path in &self.only {
            for program in path.needs() {
                programs.command(program).with_context(|| format!("--only {}", path.name()))?;
            }
        }
        let wanted = |path: &Path| match self.only.is_empty() {
            true => programs.missing(*path).is_empty(),
            false => self.only.contains(path),
        };
        let (paths, absent): (Vec<_>, Vec<_>) = Path::value_variants().iter().copied().partition(wanted);
        if self.only.is_empty() && !absent.is_empty() {
            let names: Vec<_> = absent.into_iter().map(Path::name).collect();
            eprintln!("not here, see --peer-bin: {}", names.join(", "));
        }
        Ok(paths)
    }
}

impl Bench<'_> {
    /// Builds all paths on the wire, measures them in turn, and takes them down again.
    fn measure(&mut self, wire: Wire, paths: &[Path]) -> anyhow::Result<()> {
        let progress = Progress::visible();
        progress.step(format!("wire {wire}: {} nodes", paths.len() * 2));
        let lab = Lab::builder().nodes(paths.len() * 2).pods(1).without_agents().start()?;
        let mut sites = Vec::new();
        for (pair, path) in lab.nodes().chunks_exact(2).zip(paths) {
            progress.step(format!("wire {wire}: set up {}", path.name()));
            let nodes = [pair[0].clone(), pair[1].clone()];
            let built = Site::build(&lab, nodes, *path, wire, &self.programs, &self.options.agent);
            match built.and_then(|site| check::check(&site).map(|()| site)) {
                Ok(site) => sites.push(site),
                Err(error) => self.fail(&progress, wire, *path, &error),
            }
        }
        let visits = self.plan.rounds * sites.len();
        let mut visit = 0;
        for round in 0..self.plan.rounds {
            for at in Plan::order(round, sites.len()) {
                let site = &sites[at];
                visit += 1;
                let (of, name) = (self.plan.rounds, site.path.name());
                progress
                    .step(format!("wire {wire}: {visit} of {visits}, round {} of {of}: {name}", round + 1));
                match measures::visit(site, &self.plan.times) {
                    Ok(sample) => self.samples.entry((wire, site.path)).or_default().push(sample),
                    Err(error) => self.fail(&progress, wire, site.path, &error),
                }
            }
        }
        if self.options.iperf3 {
            for site in &sites {
                progress.step(format!("wire {wire}: iperf3 over {}", site.path.name()));
                self.cross_check(&progress, site)?;
            }
        }
        progress.step(format!("wire {wire}: the end"));
        drop(sites);
        lab.finish()
    }

    /// Goes on without that path's figures of this round.
    fn fail(&mut self, progress: &Progress, wire: Wire, path: Path, error: &anyhow::Error) {
        let failure = format!("{} on wire {wire}: {error:#}", path.name());
        progress.note(&failure);
        self.failures.push(failure);
    }

    fn cross_check(&self, progress: &Progress, site: &Site) -> anyhow::Result<()> {
        let theirs = iperf3::measure(site, &self.programs, self.plan.times.tcp)?;
        let samples = self.samples.get(&(site.wire, site.path)).map_or(&[][..], Vec::as_slice);
        let ours: Vec<_> = samples.iter().map(|sample| format!("{:.2}", sample.tcp1_gbps)).collect();
        let (path, wire) = (site.path.name(), site.wire);
        progress.note(format!(
            "{path} on wire {wire}, 1 TCP stream: iperf3 {theirs:.2} Gb/s; here {}",
            ours.join(" ")
        ));
        Ok(())
    }

    fn conclude(self) -> anyhow::Result<ExitCode> {
        let report = Report::new(self.plan.rounds, self.samples);
        print!("{}", report.tables());
        if let Some(file) = &self.options.json {
            let text = serde_json::to_string_pretty(&report).context("write the report as JSON")?;
            fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))?;
        }
        if let Some(file) = &self.options.svg {
            let drawing = chart::draw(&report).context("draw the chart")?;
            fs::write(file, drawing).with_context(|| format!("write {}", file.display()))?;
        }
        for failure in &self.failures {
            eprintln!("FAILED: {failure}");
        }
        Ok(if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// For the visits of a quick run; what is left of 90 seconds is for setting up.
const QUICK: Duration = Duration::from_secs(60);
