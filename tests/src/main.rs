//! `weft-lab`: a Weft network on one machine, for a look, for tests, for benchmarks.
use std::{path::PathBuf, process::ExitCode, thread};

use clap::{Parser, Subcommand};
use weft_lab::{adversary, bench, chaos, claim, demo, image, policy, sandboxes, scale, soak, suite, up};

/// A Weft network on one machine: nodes are network namespaces, and nothing is left behind
#[derive(Parser)]
#[command(name = "weft-lab", bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build three nodes with two pods each, try everything, print a report
    Demo(demo::Options),
    /// Measure Weft beside other ways from pod to pod: throughput, packet rates, latency, CPU, memory
    Bench(bench::Options),
    /// Measure how fast pods of a real containerd are ready, beside the reference `bridge` plugin
    Sandboxes(sandboxes::Options),
    /// Assemble the container image, as an OCI archive
    Image { archive: PathBuf },
    /// Send gigabytes of checked traffic over a network that loses and reorders, while agents are killed
    Soak(soak::Options),
    /// Cut, narrow and kill, and measure how long the network notices
    Chaos(chaos::Options),
    /// Simulate networks of many sizes: what an agent sends, holds and computes in them, and how soon all know the news
    Scale(scale::Options),
    /// Run NetworkPolicy conformance cases through the engine, and as packets between pods
    PolicyCases(policy::Options),
    /// See whether the tests notice mistakes that are put into a copy of the policy engine
    PolicyMistakes(policy::mistakes::Options),
    /// Measure throughput between pods with a thousand network policies and with none, in turn
    PolicyBench(policy::bench::Options),
    /// Measure throughput between pods while a node is flooded with handshakes, and while it is not, in turn
    FloodBench(adversary::bench::Options),
    /// Install what the tests call, then run all tests of the workspace
    Test {
        /// Only name the programs that are missing, and fail
        #[arg(long)]
        no_install: bool,
        /// Passed on to `cargo test --workspace`
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Start a lab that stays up
    Up(up::Options),
    /// Run a command in a place of that lab
    Exec {
        /// NODE, NODE/POD, `outside` or `underlay`
        place: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Take that lab down
    Down,
    #[command(hide = true)]
    Keep(up::Options),
}

fn main() -> ExitCode {
    let verb = Arguments::parse().command;
    let outcome = match &verb {
        Verb::Demo(options) => clean_up_on_signals().and_then(|()| demo::run(options)),
        Verb::Bench(options) => clean_up_on_signals().and_then(|()| bench::run(options)),
        Verb::Sandboxes(options) => {
            clean_up_on_signals().and_then(|()| sandboxes::run(options)).map(|()| ExitCode::SUCCESS)
        }
        Verb::Image { archive } => image::run(archive).map(|()| ExitCode::SUCCESS),
        Verb::Soak(options) => clean_up_on_signals().and_then(|()| soak::run(options)),
        Verb::Chaos(options) => clean_up_on_signals().and_then(|()| chaos::run(options)),
        Verb::Scale(options) => scale::run(options).map(|()| ExitCode::SUCCESS),
        Verb::PolicyCases(options) => clean_up_on_signals().and_then(|()| policy::run(options)),
        Verb::PolicyMistakes(options) => policy::mistakes::run(options),
        Verb::PolicyBench(options) => clean_up_on_signals().and_then(|()| policy::bench::run(options)),
        Verb::FloodBench(options) => clean_up_on_signals().and_then(|()| adversary::bench::run(options)),
        Verb::Test { no_install, arguments } => suite::run(!no_install, arguments),
        Verb::Up(options) => up::up(options).map(|()| ExitCode::SUCCESS),
        Verb::Exec { place, command } => up::exec(place, command).map(|()| ExitCode::SUCCESS),
        Verb::Down => up::down().map(|()| ExitCode::SUCCESS),
        Verb::Keep(options) => up::keep(options).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

/// On Ctrl-C and SIGTERM: ends the agents, removes the directories, exits. The namespaces go with the process.
fn clean_up_on_signals() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        claim::abandon_all();
        std::process::exit(130);
    })?;
    Ok(())
}
