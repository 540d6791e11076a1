//! `cargo lab image`: Weft's container image, assembled by `deploy/image.sh` of what the lab builds and fetches.
use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::{
    binaries::Binaries,
    debian::Suite,
    tools::{self, Purpose},
};

/// Writes the archive, replacing what is there.
pub fn assemble(archive: &Path) -> anyhow::Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above");
    let mut command = Command::new("sh");
    command.arg(workspace.join("deploy/image.sh")).arg(archive);
    command.env("WEFT_BIN_DIR", Binaries::get()?.directory()).env("WEFT_CNI", Binaries::static_shim()?);
    command.env("WEFT_PLUGIN_DIR", Suite::plugins()?);
    command.env("NFT", tools::find("nft").context("nft is missing: install the package nftables")?);
    let output = command.stdin(Stdio::null()).output().context("run deploy/image.sh")?;
    ensure!(output.status.success(), "deploy/image.sh: {}", String::from_utf8_lossy(&output.stderr).trim());
    println!("{}", String::from_utf8_lossy(&output.stdout).trim());
    Ok(())
}

/// What `cargo lab image` does: installs what is missing, builds, assembles.
pub fn run(archive: &Path) -> anyhow::Result<()> {
    tools::ensure_present(Purpose::Test, true)?;
    assemble(archive)
}
