//! nftables through the `nft` program: readable, and a script holds wholly or not at all.
//!
//! The child runs in the network namespace of the thread that polls the future first.

use std::{
    io,
    path::PathBuf,
    process::{Output, Stdio},
};
use tokio::{io::AsyncWriteExt, process::Command};

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("`nft` is not installed; install the package nftables")]
    Missing,
    #[error("run {path}: {errno}", path = path.display())]
    Run { path: PathBuf, errno: io::Error },
    /// What nft wrote to stderr quotes the line that it rejects.
    #[error("nft refused {what}: {stderr}")]
    Refused { what: String, stderr: String },
}

/// The program, found once.
#[derive(Clone, Debug)]
pub struct Nft {
    path: PathBuf,
}

impl Nft {
    /// Looks in `PATH`, then where distributions put it: a daemon's `PATH` may be empty.
    pub fn find() -> Result<Self, NftError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"].map(PathBuf::from);
        std::env::split_paths(&path)
            .chain(usual)
            .map(|folder| folder.join("nft"))
            .find(|path| path.is_file())
            .map(|path| Self { path })
            .ok_or(NftError::Missing)
    }

    /// Runs a script; `spawned` is told the process's id, which its netlink events carry.
    ///
    /// # Errors
    /// [`NftError::Refused`]: then nothing of the script holds.
    pub async fn run(&self, script: &str, spawned: impl FnOnce(u32)) -> Result<(), NftError> {
        let mut child =
            self.command(&["-f", "-"]).stdin(Stdio::piped()).spawn().map_err(|e| self.failed(e))?;
        child.id().map(spawned);
        let mut stdin = child.stdin.take().expect("piped above");
        // A child that fails early closes its end; what it wrote to stderr says more than that.
        let _ = stdin.write_all(script.as_bytes()).await;
        drop(stdin);
        let output = child.wait_with_output().await.map_err(|e| self.failed(e))?;
        let what = || format!("`{}`", script.lines().take(3).collect::<Vec<_>>().join("; "));
        accepted(output, what).map(drop)
    }

    /// The headers of all tables' chains, as JSON. Cheap, however many rules there are.
    pub async fn list_chains(&self) -> Result<String, NftError> {
        let output = self.command(&["-j", "list", "chains"]).output().await.map_err(|e| self.failed(e))?;
        accepted(output, || "to list the chains".into())
    }

    /// One table's sets, chains and rules, as JSON.
    pub async fn list_table(&self, family: &str, name: &str) -> Result<String, NftError> {
        let arguments = ["-j", "list", "table", family, name];
        let output = self.command(&arguments).output().await.map_err(|e| self.failed(e))?;
        accepted(output, || format!("to list table {family} {name}"))
    }

    /// One set with its elements, as JSON.
    pub async fn list_set(&self, family: &str, table: &str, name: &str) -> Result<String, NftError> {
        let arguments = ["-j", "list", "set", family, table, name];
        let output = self.command(&arguments).output().await.map_err(|e| self.failed(e))?;
        accepted(output, || format!("to list set {family} {table} {name}"))
    }

    /// One table's named counters, as JSON.
    pub async fn list_counters(&self, family: &str, table: &str) -> Result<String, NftError> {
        let arguments = ["-j", "list", "counters", "table", family, table];
        let output = self.command(&arguments).output().await.map_err(|e| self.failed(e))?;
        accepted(output, || format!("to list the counters of table {family} {table}"))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true).env("LC_ALL", "C");
        command
    }

    fn failed(&self, errno: io::Error) -> NftError {
        NftError::Run { path: self.path.clone(), errno }
    }
}

fn accepted(output: Output, what: impl FnOnce() -> String) -> Result<String, NftError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(NftError::Refused { what: what(), stderr })
}
