//! `cargo lab test`: the workspace's tests, with what they call installed first.
use std::{
    env,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::Context;

use crate::{
    binaries::Binaries,
    claim, lab,
    tools::{self, Purpose},
};

/// Runs `cargo test --workspace`, with more arguments for it if any.
pub fn run(install: bool, arguments: &[String]) -> anyhow::Result<ExitCode> {
    lab::check_root()?;
    tools::ensure_present(Purpose::Test, install)?;
    claim::sweep()?;
    // Here its progress is seen; in a test's output it would be lost.
    Binaries::get()?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["test", "--workspace"])
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above"))
        .status()
        .context("run cargo test")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
