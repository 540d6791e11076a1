//! The program: what [`weft_cni::run`] answers, printed.
#![forbid(unsafe_code)]

use std::{
    io::{self, Write},
    process::ExitCode,
};
use weft_cni::{Failure, Version, code, run};

fn main() -> ExitCode {
    let mut version = Version::NEWEST;
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&mut version)));
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
