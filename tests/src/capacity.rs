//! How many labs run at once on this machine: more would only starve each other's timers.
use std::{
    fs::{self, File},
    thread,
    time::Duration,
};

use anyhow::Context;
use nix::fcntl::Flock;

use crate::claim;

/// A lab's admission, given back when dropped or when its process dies.
pub struct Slot {
    _lock: Flock<File>,
}

/// Waits until fewer than [`LABS_AT_ONCE`] labs run, of this process or of others.
pub fn admit() -> anyhow::Result<Slot> {
    let base = claim::base();
    fs::create_dir_all(&base).with_context(|| format!("create {}", base.display()))?;
    let mut told = false;
    loop {
        for slot in 0..LABS_AT_ONCE {
            if let Some(lock) = claim::try_lock(&base.join(format!("slot-{slot}")))? {
                return Ok(Slot { _lock: lock });
            }
        }
        if !told {
            eprintln!("waiting: {LABS_AT_ONCE} labs run already");
            told = true;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Enough for two runs side by side; each keeps more than one core busy while it moves data.
pub const LABS_AT_ONCE: usize = 2;
