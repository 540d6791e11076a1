//! `cargo lab scale`: what an agent does and holds in networks of many sizes, as a table and a drawing.
//!
//! The networks are the simulator's (`tests/sim/scale.rs`), built in release.
use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;

use crate::binaries;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many nodes each network has; a thousand take about 3 GiB of memory
    #[arg(long, value_name = "COUNT,...", default_value = "10,30,100,300,1000")]
    sizes: String,
    /// File to draw to
    #[arg(long, value_name = "FILE", default_value = "target/scale.svg")]
    svg: PathBuf,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let svg = std::path::absolute(&options.svg).with_context(|| options.svg.display().to_string())?;
    let status = binaries::cargo()
        .args(["test", "--release", "--package", "weft-lab", "--test", "sim", "--", "scale::", "--nocapture"])
        .env("WEFT_SCALE_SIZES", &options.sizes)
        .env("WEFT_SCALE_SVG", &svg)
        .status()
        .context("run cargo test")?;
    println!("drawn to {}", svg.display());
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
