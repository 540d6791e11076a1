//! `cargo lab test`: the workspace's tests, with what they call installed first.
use std::process::ExitCode;

use anyhow::Context;

use crate::{
    binaries::{self, Binaries},
    claim,
    debian::Suite,
    lab,
    tools::{self, Purpose},
};

/// Runs `cargo test --workspace`, with more arguments for it if any.
pub fn run(install: bool, arguments: &[String]) -> anyhow::Result<ExitCode> {
    lab::check_root()?;
    tools::ensure_present(Purpose::Test, install)?;
    claim::sweep()?;
    // Here its progress is seen; in a test's output it would be lost.
    Binaries::get()?;
    for suite in Suite::ALL {
        suite.root()?;
    }
    let status = binaries::cargo()
        .args(["test", "--workspace"])
        .args(arguments)
        .env("PATH", tools::path_variable())
        .status()
        .context("run cargo test")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
