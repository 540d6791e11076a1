//! nftables through the `nft` program: readable, and a script holds wholly or not at all.
//!
//! The child runs in the network namespace of the thread that polls the future first.

use std::{
    fs, io,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::unix::pipe,
    process::{Child, ChildStdin, Command},
    time::timeout,
};

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
    /// How long it may take to answer; then it is ended.
    patience: Duration,
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
            .map(|path| Self { path, patience: PATIENCE })
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
        let ran = async move {
            // A child that fails early closes its end; what it wrote to stderr says more than that.
            let _ = stdin.write_all(script.as_bytes()).await;
            drop(stdin);
            child.wait_with_output().await
        };
        let output = self.answer(ran).await?;
        let what = || format!("`{}`", script.lines().take(3).collect::<Vec<_>>().join("; "));
        accepted(output, what).map(drop)
    }

    /// The headers of all tables' chains, as JSON. Cheap, however many rules there are.
    pub async fn list_chains(&self) -> Result<String, NftError> {
        self.list(&["chains"]).await
    }

    /// One table's sets, chains and rules, as JSON.
    pub async fn list_table(&self, family: &str, name: &str) -> Result<String, NftError> {
        self.list(&["table", family, name]).await
    }

    /// One table's named counters, as JSON.
    pub async fn list_counters(&self, family: &str, table: &str) -> Result<String, NftError> {
        self.list(&["counters", "table", family, table]).await
    }

    /// One set with its elements, as JSON.
    pub async fn list_set(&self, family: &str, table: &str, name: &str) -> Result<String, NftError> {
        self.list(&["set", family, table, name]).await
    }

    async fn list(&self, what: &[&str]) -> Result<String, NftError> {
        let output = self.answer(self.command(&["-j", "list"]).args(what).output()).await?;
        accepted(output, || format!("to list {}", what.join(" ")))
    }

    /// Whether `nft` and kernel know tables that only their owner changes, and that outlive it.
    pub async fn knows_owners(&self) -> bool {
        // The kernel is asked, too, but nothing is done.
        let check = self.answer(self.command(&["--check", OWNED]).output()).await;
        check.is_ok_and(|output| output.status.success())
    }

    /// Starts one that stays; its scripts go through a file.
    pub fn session(&self, script: PathBuf) -> Result<Session, NftError> {
        let start = || {
            let (answers, out) = io::pipe()?;
            let mut command = self.command(&["-j", "-i"]);
            let mut child = command.stdin(Stdio::piped()).stdout(out.try_clone()?).stderr(out).spawn()?;
            let stdin = child.stdin.take().expect("piped above");
            let answers = BufReader::new(pipe::Receiver::from_owned_fd(answers.into())?).lines();
            Ok(Session { nft: self.clone(), script, child, stdin, answers })
        };
        start().map_err(|errno| self.failed(errno))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true).env("LC_ALL", "C");
        command
    }

    /// A child that is waited for no longer is killed.
    async fn answer<T>(&self, answer: impl Future<Output = io::Result<T>>) -> Result<T, NftError> {
        let silent = |_| Err(io::Error::other(format!("no answer within {:?}", self.patience)));
        timeout(self.patience, answer).await.unwrap_or_else(silent).map_err(|errno| self.failed(errno))
    }

    fn failed(&self, errno: io::Error) -> NftError {
        NftError::Run { path: self.path.clone(), errno }
    }
}

/// An `nft` that stays, so that tables can be its own. It ends with its handle, or with this process.
///
/// Before 1.1 such an `nft` reads all tables again for each line, and is slower than one for each script.
#[derive(Debug)]
pub struct Session {
    nft: Nft,
    script: PathBuf,
    child: Child,
    stdin: ChildStdin,
    /// What it writes to stdout and stderr, in its order.
    answers: Lines<BufReader<pipe::Receiver>>,
}

impl Session {
    /// The process, which its netlink events name; none if it has ended.
    pub fn process(&self) -> Option<u32> {
        self.child.id()
    }

    /// Runs a script.
    ///
    /// # Errors
    /// [`NftError::Refused`]: then nothing of the script holds. After any error a new session is to be started.
    pub async fn run(&mut self, script: &str) -> Result<(), NftError> {
        fs::write(&self.script, script).map_err(|errno| self.failed(errno))?;
        // Each line is a transaction, an included file is in one.
        let said = self.ask(&format!("include \"{}\"", self.script.display())).await?;
        if !said.is_empty() {
            let what = format!("what is in {}", self.script.display());
            return Err(NftError::Refused { what, stderr: said.join("\n") });
        }
        Ok(())
    }

    /// One set with its elements, as JSON.
    pub async fn list_set(&mut self, family: &str, table: &str, name: &str) -> Result<String, NftError> {
        let said = self.ask(&format!("list set {family} {table} {name}")).await?;
        said.iter().find(|line| line.starts_with(ANSWER)).cloned().ok_or_else(|| NftError::Refused {
            what: format!("to list set {family} {table} {name}"),
            stderr: said.join("\n"),
        })
    }

    /// What one line is answered with.
    async fn ask(&mut self, line: &str) -> Result<Vec<String>, NftError> {
        let ask = async {
            // To the last one there is an answer in any case, and it is one line.
            self.stdin.write_all(format!("{line}\n{LAST}\n").as_bytes()).await?;
            let mut answers = Vec::new();
            while let Some(answer) = self.answers.next_line().await? {
                if answer.starts_with(ANSWER) && !answer.contains(LISTED_SET) {
                    return Ok(answers);
                }
                answers.push(answer);
            }
            Err(io::Error::other(format!("it has ended: {}", answers.join("; "))))
        };
        self.nft.answer(ask).await
    }

    fn failed(&self, errno: io::Error) -> NftError {
        self.nft.failed(errno)
    }
}

fn accepted(output: Output, what: impl FnOnce() -> String) -> Result<String, NftError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(NftError::Refused { what: what(), stderr })
}

/// Many times what tens of thousands of rules take.
const PATIENCE: Duration = Duration::from_secs(60);
/// A command line.
const OWNED: &str = "table inet weft-probe { flags owner, persist; }";
/// Lists no set.
const LAST: &str = "list tables ip6";
/// How listings begin, and what only those of sets contain.
const ANSWER: &str = "{\"nftables\": [";
const LISTED_SET: &str = "{\"set\": {";

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_that_never_answers_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nft");
        // Not written by this process: a child of another thread might still have it open, and it could not be run.
        let written = std::process::Command::new("sh")
            .args(["-c", r#"printf '#!/bin/sh\nexec sleep 1000\n' > "$1" && chmod 755 "$1""#, "sh"])
            .arg(&path)
            .status();
        assert!(written.unwrap().success());
        let nft = Nft { path, patience: Duration::from_millis(100) };
        let silent = |outcome: Result<(), NftError>| {
            let said = outcome.unwrap_err().to_string();
            assert!(said.ends_with("/nft: no answer within 100ms"), "{said}");
        };
        silent(nft.run("list tables", drop).await);
        silent(nft.list_chains().await.map(drop));
        let mut session = nft.session(directory.path().join("script")).unwrap();
        silent(session.run("list tables").await);
    }
}
