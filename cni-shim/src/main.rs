//! `weft-cni`: attaches pods to the Weft agent of this node, as CNI 0.3.1 to 1.1.0 have it.
//!
//! ```text
//!   CNI_* ─▶ env ─╮                     ╭─▶ agent (unix socket): reserve … activate
//!                 ├─ checked ─▶ verbs ──┤
//!   stdin ▶ config╯             │       ╰─▶ pod: the veth, inside and outside the pod's namespace
//!                               ▼
//!                       result: one JSON document on stdout, exit code
//! ```
//!
//! Everything is checked before the first side effect; what fails later is undone.
#![forbid(unsafe_code)]

mod agent;
mod config;
mod env;
mod failure;
mod pod;
mod prev_result;
mod result;
mod stdin;
mod tombstone;
mod verbs;
mod version;

use failure::{Failure, code};
use std::{
    io::{self, Write},
    process::ExitCode,
};
use version::Version;

fn main() -> ExitCode {
    let mut version = Version::NEWEST;
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| verbs::run(&mut version)));
    let broken = |_| Err(Failure::new(code::INTERNAL, "weft-cni has a bug: see its stack on stderr"));
    let (text, code) = match done.unwrap_or_else(broken) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result.to_string(), ExitCode::SUCCESS),
        Err(failure) => (failure.json(version).to_string(), ExitCode::FAILURE),
    };
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => code,
        Err(error) => {
            eprintln!("weft-cni: write to stdout: {error}");
            ExitCode::FAILURE
        }
    }
}
