//! An agent holds little memory.
use crate::linux::memory::{self, Program};
use std::{mem, time::Duration};
use tokio::time::sleep;
use tracing::debug;

/// Gives back by and by what only the start has needed, or something else that is rare, unless there is much to do: ever more
/// seldom while that changes little.
pub async fn slim() {
    let program = Program::split();
    if let Err(error) = &program {
        debug!(%error, "code that is not run stays in memory");
    }
    let (mut used, mut held, mut pause) = (memory::processor_time(), 0, SLIM);
    loop {
        sleep(pause).await;
        let before = mem::replace(&mut used, memory::processor_time());
        if used.saturating_sub(before) > pause / BUSY {
            pause = SLIM;
            continue;
        }
        let resident = memory::resident().unwrap_or_default();
        let settled = resident.abs_diff(held) < LITTLE;
        held = resident;
        pause = if settled { (2 * pause).min(SELDOM) } else { SLIM };
        memory::release_heap();
        if let Ok(Err(error)) = program.as_ref().map(Program::release) {
            debug!(%error, "code that is not run stays in memory");
        }
    }
}

/// How long what is not used may stay in memory. To map again what is takes a millisecond or two.
const SLIM: Duration = Duration::from_secs(10);
/// And how long at most where little comes and goes, in bytes.
const SELDOM: Duration = Duration::from_secs(160);
const LITTLE: usize = 1 << 20;
/// Who takes more than this part of a core carries packets that would have to wait for that.
const BUSY: u32 = 50;
