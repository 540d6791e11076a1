//! The bench: a tiny run, for what it writes; what it measures is not asserted.
use std::{
    fs,
    process::{Command, Stdio},
};

#[test]
fn a_bench_writes_its_figures_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (json, svg) = (directory.path().join("figures.json"), directory.path().join("figures.svg"));
    let mut bench = Command::new(env!("CARGO_BIN_EXE_weft-lab"));
    bench.args([
        "bench",
        "--only",
        "veth,weft-clear",
        "--wire",
        "plain",
        "--rounds",
        "1",
        "--seconds",
        "0.1",
    ]);
    bench.arg("--json").arg(&json).arg("--svg").arg(&svg).stdin(Stdio::null());
    let output = bench.output().unwrap();
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
