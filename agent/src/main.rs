//! `weft`: picks a command and turns its result into an exit code.

use std::process::ExitCode;
use weft::cli::{self, Cli, Command};

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
        Command::Ask(ask) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(ask.run())?)
        }
        Command::Version => Ok(cli::print(&format!("{}\n", cli::SOFTWARE))?),
    }
}
