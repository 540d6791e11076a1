//! Clocks that one agent alone has, and that can be set while it runs: the kernel has one of each for all.
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    offset: PathBuf,
    file: File,
}

impl Clock {
    /// One that is right; it has its files in that directory.
    pub fn new(directory: &Path) -> anyhow::Result<Self> {
        let (source, library) = (directory.join("clock.c"), directory.join("clock.so"));
        fs::write(&source, SOURCE).with_context(|| format!("write {}", source.display()))?;
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O2", "-o"]).args([&library, &source]);
        let output = compiler.output().context("run cc")?;
        ensure!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr).trim());
        let offset = directory.join("clock");
        let file = File::create(&offset).with_context(|| format!("create {}", offset.display()))?;
        let clock = Self { library, offset, file };
        clock.set(0)?;
        clock.pass(0)?;
        Ok(clock)
    }

    /// The wall clock is off by so many seconds from now on.
    pub fn set(&self, seconds: i64) -> anyhow::Result<()> {
        self.file.write_all_at(&seconds.to_ne_bytes(), 0).context("set a clock")
    }

    /// So many seconds have passed at once since the start, beside those that have; the wall clock does not show it.
    pub fn pass(&self, seconds: i64) -> anyhow::Result<()> {
        self.file.write_all_at(&seconds.to_ne_bytes(), size_of::<i64>() as u64).context("let time pass")
    }

    /// Has a program go by this clock.
    pub fn give(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("WEFT_LAB_CLOCK", &self.offset);
    }
}

const SOURCE: &str = include_str!("clock.c");

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{SystemTime, UNIX_EPOCH};

    #[test]
    fn a_program_goes_by_its_own_clock() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::new(directory.path()).unwrap();
        let seconds = || {
            let mut command = Command::new("date");
            clock.give(&mut command);
            let output = command.arg("+%s").output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().parse::<i64>().unwrap()
        };
        for offset in [0, 1_000_000, -1_000_000] {
            clock.set(offset).unwrap();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
            assert!((seconds() - now - offset).abs() <= 2, "{offset}");
        }
    }
}
