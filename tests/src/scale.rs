//! `cargo lab scale`: what an agent does and holds in networks of many sizes, with the law by which it grows; as a table, as
//! JSON and as a drawing.
//!
//! The networks are the simulator's (`sim`): real mesh, real allocator, on 1 % of loss and 20 ms of delay. Each is a process
//! of its own, so that none finds memory that another has left.
mod chart;
mod figures;
mod network;

pub use figures::{Figures, Growth, MEASURES, Report};
pub use network::{Start, measure};

use crate::progress::Progress;
use anyhow::{Context, ensure};
use clap::Args;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// How many nodes each network has
    #[arg(long, value_name = "COUNT,...", value_delimiter = ',', default_value = "10,30,100")]
    sizes: Vec<usize>,
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Give each node a certificate, and have it seal what it says: that takes long in large networks
    #[arg(long)]
    sealed: bool,
    /// Start all nodes at once, as after a power cut: each knows the others. Without it a network grows in crowds of joiners, which
    /// takes far longer
    #[arg(long, conflicts_with = "sealed")]
    again: bool,
    /// Add those networks of this file, which `--json` has written before, whose sizes are not measured now: large ones take hours
    #[arg(long, value_name = "FILE")]
    with: Option<PathBuf>,
    /// Write the figures as JSON to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// File to draw to
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Measure one network only, and print its figures as JSON
    #[arg(long, hide = true)]
    alone: bool,
}

impl Options {
    fn start(&self) -> Start {
        if self.again { Start::Again } else { Start::Grows { sealed: self.sealed } }
    }
}

/// # Errors
/// A network did not become one in time, or a file cannot be written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.sizes.iter().all(|size| *size >= LEAST), "--sizes: a network has {LEAST} nodes at least");
    if options.alone {
        for size in &options.sizes {
            let figures = measure(*size, options.seed, options.start(), &Progress::Lines);
            println!("{}", serde_json::to_string(&figures)?);
        }
        return Ok(());
    }
    let mut networks = options.with.as_deref().map(measured_before).transpose()?.unwrap_or_default();
    networks.retain(|one| !options.sizes.contains(&one.nodes));
    for size in &options.sizes {
        networks.push(alone(*size, options)?);
    }
    let report = Report::of(networks);
    println!("{}", report.table());
    let write = |file: &PathBuf, text: String| {
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    };
    if let Some(file) = &options.json {
        write(file, serde_json::to_string_pretty(&report).context("write the figures as JSON")?)?;
    }
    if let Some(file) = &options.svg {
        write(file, chart::draw(&report)?)?;
    }
    Ok(())
}

fn measured_before(file: &Path) -> anyhow::Result<Vec<Figures>> {
    let text = fs::read(file).with_context(|| format!("--with: read {}", file.display()))?;
    let report: Report =
        serde_json::from_slice(&text).with_context(|| format!("--with: {} is no report", file.display()))?;
    Ok(report.networks)
}

/// Measures one network in a process of its own.
fn alone(size: usize, options: &Options) -> anyhow::Result<Figures> {
    let mut command = Command::new(env::current_exe().context("find this program")?);
    command.args(["scale", "--alone", "--sizes", &size.to_string(), "--seed", &options.seed.to_string()]);
    command
        .args(options.sealed.then_some("--sealed"))
        .args(options.again.then_some("--again"))
        .stderr(Stdio::inherit());
    let output = command.output().context("start a process for a network")?;
    ensure!(output.status.success(), "the network of {size} nodes: {}; see above", output.status);
    serde_json::from_slice(&output.stdout).context("read the figures of a network")
}

/// Two seeds and some that join.
const LEAST: usize = 4;
