//! Real agents under abuse: what they are sent, what they lose, and what kills them. Needs root.
#![allow(clippy::unwrap_used)]

mod adversary;
mod burst;
mod control;
mod datagrams;
mod full;
mod insider;
mod living;
mod sealed;
mod seen;
mod sessions;
mod state_file;
mod storm;
mod stranger;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Tests that take all of the machine for a while do so one after the other: beside another none sees what it looks for.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}
