//! Where others' programs are: in `--peer-bin DIR`, or on `PATH`.
use std::{path::PathBuf, process::Command};

use anyhow::Context;

use super::Path;
use crate::tools;

#[derive(Debug, Default)]
pub struct Programs {
    directory: Option<PathBuf>,
}

impl Programs {
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    pub fn find(&self, program: &str) -> Option<PathBuf> {
        let given = self.directory.iter().map(|directory| directory.join(program));
        given
            .filter(|file| file.is_file())
            .find_map(|file| file.canonicalize().ok())
            .or_else(|| tools::find(program))
    }

    pub fn command(&self, program: &str) -> anyhow::Result<Command> {
        self.find(program).map(Command::new).with_context(|| {
            format!("{program} is neither in --peer-bin nor on PATH: `benches/peers.sh DIR` fetches it")
        })
    }

    /// What the path takes and is not there.
    pub fn missing(&self, path: Path) -> Vec<&'static str> {
        path.needs().iter().copied().filter(|program| self.find(program).is_none()).collect()
    }
}
