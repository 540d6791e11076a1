//! `cargo lab chaos`: what happens to a network, again and again, and how long its users notice; or, with `--minutes`,
//! all that can happen, at random.
use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;

use crate::{
    binaries::Binaries,
    claim,
    lab::check_root,
    progress::Progress,
    report::Quantiles,
    scenario::{self, Measured, Scenario},
    storm,
    tools::{self, Purpose},
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// What happens: relay, relay-ipv6, outage, kill, chain, mtu, jumbo, differing, move, endpoints; all if none is given
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// How often
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    runs: usize,
    /// How long the outage of that name lasts, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    lasting: f64,
    /// Instead: faults at random for so long, under traffic that is checked; all must be well within 5 s after each round
    #[arg(long, conflicts_with_all = ["scenario", "json"])]
    minutes: Option<f64>,
    /// Of the random faults; without it, another one each time
    #[arg(long, requires = "minutes")]
    seed: Option<u64>,
    /// In that storm
    #[arg(long, value_name = "COUNT", requires = "minutes", default_value_t = 4)]
    nodes: usize,
    /// Write the figures as JSON to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only name the programs that are missing, and fail
    #[arg(long)]
    no_install: bool,
}

/// One figure over all runs, in milliseconds.
#[derive(Debug, Serialize)]
struct Figure {
    scenario: &'static str,
    what: &'static str,
    runs: usize,
    median_ms: f64,
    worst_ms: f64,
    most_ms: f64,
    ok: bool,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check_root()?;
    let scenarios = chosen(&options.scenario)?;
    tools::ensure_present(Purpose::Demo, !options.no_install)?;
    claim::sweep()?;
    Binaries::get()?;
    if let Some(minutes) = options.minutes {
        let seed = options.seed.unwrap_or_else(rand::random);
        eprintln!("--seed {seed}");
        let lasting = Duration::from_secs_f64(minutes * 60.0);
        let weathered = storm::storm(seed, lasting, options.nodes, &Progress::Lines)?;
        println!("seed {seed}, {minutes} minutes, {} nodes: {weathered}", options.nodes);
        return Ok(ExitCode::SUCCESS);
    }
    let lasting = Duration::from_secs_f64(options.lasting);
    let mut figures = Vec::new();
    for Scenario { name, run } in scenarios {
        let mut measured: BTreeMap<&str, Vec<Measured>> = BTreeMap::new();
        for number in 1..=options.runs {
            eprintln!("{name}: run {number} of {}", options.runs);
            let outcome = run(lasting).with_context(|| format!("{name}: run {number}"))?;
            outcome.into_iter().for_each(|one| measured.entry(one.what).or_default().push(one));
        }
        figures.extend(measured.into_iter().map(|(what, all)| figure(name, what, &all)));
    }
    println!("{}", table(&figures));
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&figures).context("write the figures as JSON")?;
        std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    Ok(if figures.iter().all(|figure| figure.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<Scenario>> {
    let known: Vec<_> = scenario::ALL.iter().map(|scenario| scenario.name).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("--scenario {unknown}: there is {}", known.join(", "));
    }
    let all = scenario::ALL.into_iter();
    Ok(all.filter(|one| names.is_empty() || names.iter().any(|name| name == one.name)).collect())
}

fn figure(scenario: &'static str, what: &'static str, all: &[Measured]) -> Figure {
    let took: Vec<_> = all.iter().map(|one| one.took).collect();
    let most = all.iter().map(|one| one.most).min().unwrap_or_default();
    let median = Quantiles::of(&took).p50;
    let millis = |time: Duration| (time.as_secs_f64() * 1e5).round() / 100.0;
    Figure {
        scenario,
        what,
        runs: all.len(),
        median_ms: median,
        worst_ms: millis(took.into_iter().max().unwrap_or_default()),
        most_ms: millis(most),
        ok: median <= millis(most),
    }
}

fn table(figures: &[Figure]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(["scenario", "", "median", "worst", "at most", ""]);
    for Figure { scenario, what, median_ms, worst_ms, most_ms, ok, .. } in figures {
        let cells = [median_ms, worst_ms, most_ms].map(|ms| format!("{ms:.0} ms"));
        let [median, worst, most] = cells;
        table.add_row([*scenario, *what, &median, &worst, &most, if *ok { "ok" } else { "TOO LONG" }]);
    }
    table
}
