//! The project's own cases; `cases/README.md` has the format.
use std::path::Path;
use weft_lab::policy::{self, Outcome};

fn hold(outcome: &Outcome) {
    assert!(outcome.cases > 90 && outcome.cells > 10_000, "{outcome:?}");
    assert!(outcome.wrong.is_empty(), "{}", outcome.wrong.join("\n"));
}

fn cases() -> Vec<policy::cases::Case> {
    policy::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("policy/cases/cases.json"), None).unwrap()
}

#[test]
fn the_engine_decides_every_case_as_expected() {
    hold(&policy::pure::run(&cases()).unwrap());
}

#[test]
fn packets_pass_and_are_dropped_as_expected_in_every_case() {
    let outcome = policy::packets::run(&cases()).unwrap();
    assert!(outcome.cases > 90, "{outcome:?}");
    assert!(outcome.wrong.is_empty(), "{}", outcome.wrong.join("\n"));
}
