//! A lab's place on the disk, held by a lock that the kernel releases when the owner dies.
//!
//! ```text
//!   /run/weft-lab/lock              held while labs come and go
//!                /slot-0, slot-1    see `capacity`
//!                /<id>/owner        locked by the lab's process as long as it lives
//!                     /processes    "pid start" of each process it started
//!                     /lab.json     what is in it, for `exec` and `down` (only the lab called "up")
//!                     /state        where the lab's state directories are
//!                     /n1/          run directory of node n1: socket, attachments
//!   /tmp/weft-lab-<id>-<random>/n1/ state directory and log of node n1
//! ```
//!
//! So that a lab is stale is certain, never guessed: its lock is free.
use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};

use crate::process::Process;

pub struct Claim {
    id: String,
    place: Place,
    processes: Mutex<File>,
    _owner: Flock<File>,
}

/// The directories of one lab.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    run: PathBuf,
    state: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum Taken {
    #[error("the lab `{0}` is up already")]
    Up(String),
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl Claim {
    /// Takes a place with a fresh name, after cleaning up behind labs that were killed.
    pub fn fresh() -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self::named(&id).map_err(Into::into)
    }

    /// Takes the place of that name, after cleaning up behind labs that were killed.
    ///
    /// # Errors
    /// [`Taken::Up`] when a living process holds it.
    pub fn named(id: &str) -> Result<Self, Taken> {
        let _exclusive = lock_all()?;
        sweep_locked()?;
        let run = base().join(id);
        fs::create_dir_all(&run).with_context(|| format!("create {}", run.display()))?;
        let owner = match try_lock(&run.join(OWNER))? {
            Some(owner) => owner,
            None => return Err(Taken::Up(id.into())),
        };
        let place = Place::new(run, id)?;
        let processes = OpenOptions::new()
            .create(true)
            .append(true)
            .open(place.run.join("processes"))
            .context("create the list of processes")?;
        living().push(place.clone());
        Ok(Self { id: id.into(), place, processes: Mutex::new(processes), _owner: owner })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Short paths, for sockets.
    pub fn run_dir(&self) -> &Path {
        &self.place.run
    }

    /// On a disk, for state and logs.
    pub fn state_dir(&self) -> &Path {
        &self.place.state
    }

    /// Notes a process that has to die with the lab.
    pub fn note(&self, process: Process) -> io::Result<()> {
        let mut list = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(list, "{process}")
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        living().retain(|place| *place != self.place);
        // A sweep elsewhere must not see it half gone. What could not be removed is found by the next one.
        let _exclusive = lock_all();
        let _ = self.place.clear();
    }
}

impl Place {
    /// Makes the state directory: anybody can write where it lies, so nobody can guess its name.
    fn new(run: PathBuf, id: &str) -> anyhow::Result<Self> {
        let state = match env::var_os(BASE) {
            Some(_) => {
                let state = run.join("disk");
                fs::create_dir_all(&state).with_context(|| format!("create {}", state.display()))?;
                state
            }
            None => {
                let made = tempfile::Builder::new().prefix(&format!("{STATE}{id}-")).tempdir();
                made.context("create a directory for state")?.keep()
            }
        };
        fs::write(run.join("state"), state.as_os_str().as_encoded_bytes())
            .context("note the state directory")?;
        Ok(Self { run, state })
    }

    /// The place with that run directory, whose state may lie where this process would not put it.
    fn at(run: PathBuf) -> Self {
        let noted = PathBuf::from(fs::read_to_string(run.join("state")).unwrap_or_default());
        let named = |path: &Path| path.file_name().is_some_and(|it| it.to_string_lossy().starts_with(STATE));
        // A damaged note must not have anything else removed.
        let state = if named(&noted) { noted } else { run.join("disk") };
        Self { run, state }
    }

    fn try_lock(&self) -> anyhow::Result<Option<Flock<File>>> {
        try_lock(&self.run.join(OWNER))
    }

    fn processes(&self) -> Vec<Process> {
        let noted = fs::read_to_string(self.run.join("processes")).unwrap_or_default();
        noted.lines().filter_map(|line| line.parse().ok()).filter(Process::runs).collect()
    }

    /// Ends the place's processes and removes its directories.
    fn clear(&self) -> anyhow::Result<()> {
        while let Some(process) = self.processes().into_iter().next() {
            // Gone between the look and the signal: just as well.
            let _ = process.signal(Signal::SIGKILL);
            thread::sleep(Duration::from_millis(1));
        }
        for path in [&self.state, &self.run] {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Cleans up behind labs whose process was killed; returns their names.
pub fn sweep() -> anyhow::Result<Vec<String>> {
    let _exclusive = lock_all()?;
    sweep_locked()
}

/// Ends and removes all labs of this process, for the moment before it exits on a signal.
pub fn abandon_all() {
    let _exclusive = lock_all();
    for place in living().drain(..) {
        if let Err(error) = place.clear() {
            eprintln!("{error:#}");
        }
    }
}

/// The directory that holds everything of all labs: `/run/weft-lab`, or what `WEFT_LAB_DIR` says.
pub fn base() -> PathBuf {
    env::var_os(BASE).map_or_else(|| "/run/weft-lab".into(), PathBuf::from)
}

/// Locks a file unless another has it.
pub fn try_lock(path: &Path) -> anyhow::Result<Option<Flock<File>>> {
    let file = File::create(path).with_context(|| format!("open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// Locks a file, waiting for whoever has it.
pub fn lock(path: &Path) -> anyhow::Result<Flock<File>> {
    let file = File::create(path).with_context(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("lock {}", path.display()))
}

fn lock_all() -> anyhow::Result<Flock<File>> {
    let base = base();
    fs::create_dir_all(&base).with_context(|| format!("create {}", base.display()))?;
    lock(&base.join("lock"))
}

fn sweep_locked() -> anyhow::Result<Vec<String>> {
    let mut swept = Vec::new();
    for entry in fs::read_dir(base()).context("list the labs")? {
        let entry = entry.context("list the labs")?;
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let place = Place::at(entry.path());
        // What never was a lab's is not ours to remove, wherever the variable points.
        if !place.run.join(OWNER).exists() {
            continue;
        }
        if let Some(_owner) = place.try_lock()? {
            place.clear()?;
            swept.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(swept)
}

fn living() -> MutexGuard<'static, Vec<Place>> {
    static LIVING: Mutex<Vec<Place>> = Mutex::new(Vec::new());
    LIVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Environment variable for a directory other than `/run/weft-lab`, which then holds the labs' states too.
const BASE: &str = "WEFT_LAB_DIR";
/// The file that a lab's process holds locked.
const OWNER: &str = "owner";
/// How the names of state directories begin.
const STATE: &str = "weft-lab-";
