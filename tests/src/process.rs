//! Processes known by more than a number that the kernel uses again.
use std::{fmt, fs, str::FromStr};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A process that once ran: its id and when it started, in clock ticks since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: Pid,
    started: u64,
}

impl Process {
    /// The process that has the id now; none when there is none or when it is only waiting to be reaped.
    pub fn of(pid: Pid) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything (proc(5)); state is third, start the 22nd.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, started })
    }

    pub fn runs(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Sends a signal if the process still runs, and never to a later one of the same id.
    pub fn signal(&self, signal: Signal) -> nix::Result<()> {
        match self.runs() {
            true => kill(self.pid, signal),
            false => Err(Errno::ESRCH),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.started)
    }
}

impl FromStr for Process {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (pid, started) =
            text.trim().split_once(' ').ok_or_else(|| anyhow::anyhow!("`{text}` is no process"))?;
        Ok(Self { pid: Pid::from_raw(pid.parse()?), started: started.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_id() {
        let me = Process::of(Pid::this()).unwrap();
        assert!(me.runs());
        assert_eq!(me.to_string().parse::<Process>().unwrap(), me);
        let before_me = Process { started: me.started - 1, ..me };
        assert!(!before_me.runs());
        assert_eq!(before_me.signal(Signal::SIGKILL), Err(Errno::ESRCH));
    }

    #[test]
    fn a_process_that_ended_does_not_run() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(Pid::from_raw(child.id() as i32)).unwrap();
        process.signal(Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(!process.runs());
    }
}
