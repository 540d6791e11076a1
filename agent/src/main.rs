//! `weft`: picks a command and turns its result into an exit code.
#![forbid(unsafe_code)]

use std::{alloc::System, process::ExitCode};
use tokio::runtime::{Builder, Runtime};
use weft::{
    cli::{self, Cli, Command},
    linux::{privileges, wiping::Wiping},
    run,
};

/// Copies of keys are everywhere: in files' bytes, in the parts of PEM, TLS and Noise.
#[global_allocator]
static MEMORY: Wiping = Wiping(System);

fn main() -> ExitCode {
    match run(Cli::from_environment().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Agent(args) => {
            // Before there are threads.
            privileges::keep_net_admin_only()?;
            let runtime = Builder::new_multi_thread().worker_threads(CONTROL_THREADS).enable_all().build()?;
            runtime.block_on(run::agent(&args))
        }
        Command::Ask(ask) => Ok(single()?.block_on(ask.run())?),
        Command::Policy(command) => Ok(single()?.block_on(command.run())?),
        Command::Forget(args) => single()?.block_on(cli::forget(args)),
        Command::Reset(args) => single()?.block_on(run::reset(args)),
        Command::InstallCni(args) => run::install_cni(&args),
        Command::Uninstall(args) => single()?.block_on(run::uninstall(args)),
        Command::Probe(args) => single()?.block_on(args.run()),
        Command::Ca(command) => Ok(cli::print(&command.run()?)?),
        Command::Version => Ok(cli::print(&format!("{}\n", weft::SOFTWARE))?),
    }
}

fn single() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Gossip, netlink and the local API need little; packets have threads of their own.
const CONTROL_THREADS: usize = 2;
