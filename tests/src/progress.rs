//! What a person at a terminal, or a log file, sees while a lab works.
use std::{
    io::{IsTerminal, Write},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

/// One line that changes on a terminal, a line per step elsewhere, or nothing.
pub enum Progress {
    Quiet,
    Lines,
    /// Lines on standard output, for the process that started this one.
    Output,
    Bar(ProgressBar),
}

impl Progress {
    /// For programs: on standard error, because standard output is for results.
    pub fn visible() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines;
        }
        let style =
            ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}").expect("the template is valid");
        let bar = ProgressBar::new_spinner().with_style(style);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self::Bar(bar)
    }

    pub fn step(&self, text: impl Into<String>) {
        match self {
            Self::Quiet => {}
            Self::Lines => eprintln!("{}", text.into()),
            // The reader may be gone.
            Self::Output => drop(writeln!(std::io::stdout(), "{}", text.into())),
            Self::Bar(bar) => bar.set_message(text.into()),
        }
    }

    /// A line that stays.
    pub fn note(&self, text: impl AsRef<str>) {
        match self {
            Self::Quiet => {}
            Self::Lines => eprintln!("{}", text.as_ref()),
            Self::Output => drop(writeln!(std::io::stdout(), "{}", text.as_ref())),
            Self::Bar(bar) => bar.println(text),
        }
    }

    /// Clears the line, for output of another program or for the report.
    pub fn pause<T>(&self, work: impl FnOnce() -> T) -> T {
        match self {
            Self::Bar(bar) => bar.suspend(work),
            _ => work(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
