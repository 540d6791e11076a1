//! `cargo lab policy-cases`: files of NetworkPolicy conformance cases, thought through and as real packets.
//!
//! ```text
//!   FILE ──▶ cases ──▶ pure      the engine's two readings: its explanation, and its rules, step by step and anew
//!                  └─▶ packets   three nodes, real nftables, real packets
//! ```
//! A file is a JSON array of cases; `tests/policy/cases/README.md` has the format.

pub mod bench;
pub mod cases;
mod ground;
pub mod mistakes;
pub mod packets;
pub mod probe;
pub mod pure;

use crate::{claim, lab::check_root};
use anyhow::Context;
use cases::Case;
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// A JSON array of cases
    file: PathBuf,
    /// The model that cases without one of their own start from; model.json beside the file if this is left out
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Also send packets between pods on lab nodes, through real nftables
    #[arg(long)]
    packets: bool,
    /// Only cases whose id contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Write what was found as JSON to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a run over cases found.
#[derive(Debug, Default)]
pub struct Outcome {
    pub cases: usize,
    pub cells: usize,
    /// One line for each wrong cell.
    pub wrong: Vec<String>,
    /// Externals whose cells no packet can answer.
    pub left_out: BTreeSet<String>,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut cases = read(&options.file, options.model.as_deref())?;
    if let Some(only) = &options.only {
        cases.retain(|case| case.id.contains(only));
    }
    let start = Instant::now();
    let pure = pure::run(&cases)?;
    let mut results = vec![told("the engine", &pure, start)];
    let mut wrong = pure.wrong.len();
    if options.packets {
        check_root()?;
        claim::sweep()?;
        let start = Instant::now();
        let packets = packets::run(&cases)?;
        results.push(told("packets", &packets, start));
        wrong += packets.wrong.len();
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&results)?;
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reads a file of cases; those without a model start from the given one.
pub fn read(file: &Path, model: Option<&Path>) -> anyhow::Result<Vec<Case>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let mut cases: Vec<Case> =
        serde_json::from_str(&text).with_context(|| format!("{} is not a file of cases", file.display()))?;
    if cases.iter().any(|case| case.model.is_none()) {
        let beside = file.with_file_name("model.json");
        let model = model.unwrap_or(&beside);
        let text = fs::read_to_string(model).with_context(|| {
            format!("read {}, which cases without a model of their own start from", model.display())
        })?;
        let model: cases::Model =
            serde_json::from_str(&text).with_context(|| format!("{} is not a model", model.display()))?;
        cases.iter_mut().for_each(|case| {
            case.model.get_or_insert_with(|| model.clone());
        });
    }
    Ok(cases)
}

fn told(what: &str, outcome: &Outcome, start: Instant) -> serde_json::Value {
    let Outcome { cases, cells, wrong, left_out } = outcome;
    let seconds = start.elapsed().as_secs_f64();
    wrong.iter().for_each(|line| println!("{line}"));
    left_out.iter().for_each(|who| println!("{what}: left out: {who}"));
    println!("{what}: {cases} cases, {cells} cells, {} wrong, {seconds:.1} s", wrong.len());
    json!({"what": what, "cases": cases, "cells": cells, "wrong": wrong, "left_out": left_out, "seconds": seconds})
}
