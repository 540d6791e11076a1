//! The bench, in tiny runs: what it writes, and what is left of it; what it measures is not asserted.
use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use weft_lab::{process::Process, wait};

fn bench(directory: &Path, seconds: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-lab"));
    command.args([
        "bench",
        "--only",
        "veth,weft-clear",
        "--wire",
        "plain",
        "--rounds",
        "1",
        "--seconds",
        seconds,
    ]);
    command.env("WEFT_LAB_DIR", directory).stdin(Stdio::null());
    command
}

#[test]
fn a_bench_writes_its_figures_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (json, svg) = (directory.path().join("figures.json"), directory.path().join("figures.svg"));
    let mut bench = bench(&directory.path().join("labs"), "0.1");
    let output = bench.arg("--json").arg(&json).arg("--svg").arg(&svg).output().unwrap();
    // It fails when it leaves anything behind.
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("weft-clear") && table.contains("1 TCP stream"), "{table}");

    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!(report["rounds"], 1);
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> =
        rows.iter().map(|row| (row["path"].as_str().unwrap(), row["wire"].as_str().unwrap())).collect();
    assert_eq!(names, [("veth", "plain"), ("weft-clear", "plain")]);
    for row in rows {
        for key in ["tcp1_gbps", "tcp4_gbps", "flood_kpps", "rr_p50_us", "rr_p99_us", "cpu_s_per_gb"] {
            let [median, min, max] = ["median", "min", "max"].map(|which| row[key][which].as_f64().unwrap());
            assert!(0.0 < min && min <= median && median <= max, "{key}: {row}");
        }
        // A busy machine may lose something at every rate.
        assert!(row["ndr_kpps"]["median"].as_f64().unwrap() >= 0.0, "{row}");
    }
    assert!(rows[0].get("rss_mb").is_none(), "{}", rows[0]);
    assert!(rows[1]["rss_mb"]["median"].as_f64().unwrap() > 1.0, "{}", rows[1]);
    assert!(fs::read_to_string(svg).unwrap().contains("weft-clear"));
}

#[test]
fn a_killed_bench_leaves_no_process() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench =
        bench(directory.path(), "10").stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(bench.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("round 1 of 1")), "it ended without measuring");
    let notes = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path().join("processes"));
    let notes: String = notes.filter_map(|file| fs::read_to_string(file).ok()).collect();
    let processes: Vec<Process> = notes.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(processes.len(), 2, "two agents: {notes}");
    bench.kill().unwrap();
    bench.wait().unwrap();
    wait::until("the agents end", Duration::from_secs(5), || {
        anyhow::ensure!(!processes.iter().any(Process::runs));
        Ok(())
    })
    .unwrap();
}
