//! What a bench has found: medians and ranges as tables for people and as JSON for programs, and Weft's ratios to others.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;

use super::{
    measures::{Figures, Sample},
    paths::Path,
    wires::Wire,
};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub rounds: usize,
    pub rows: Vec<Row>,
}

/// One path on one wire.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub path: Path,
    pub wire: Wire,
    #[serde(flatten)]
    pub figures: Figures<Summary>,
}

/// Of one measure over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Report {
    /// Without paths that have no samples.
    pub fn new(rounds: usize, samples: impl IntoIterator<Item = ((Wire, Path), Vec<Sample>)>) -> Self {
        let rows = samples.into_iter().filter(|(_, samples)| !samples.is_empty());
        let rows = rows.map(|((wire, path), samples)| Row { path, wire, figures: summarise(&samples) });
        Self { rounds, rows: rows.collect() }
    }

    /// A table for each wire, and one of ratios.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for wire in Wire::ALL {
            let rows: Vec<_> = self.of(wire).collect();
            if !rows.is_empty() {
                text += &format!(
                    "wire {wire}, rounds: {}; medians, least–greatest\n{}\n",
                    self.rounds,
                    table(&rows)
                );
            }
        }
        match self.ratios() {
            Some(ratios) => text + &format!("Weft's medians over others'\n{ratios}\n"),
            None => text,
        }
    }

    pub fn of(&self, wire: Wire) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| row.wire == wire)
    }

    fn ratios(&self) -> Option<Table> {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.set_header(["", "over", "wire"].into_iter().chain(RATIOS.iter().map(|(name, _)| *name)));
        for wire in Wire::ALL {
            for ours in self.of(wire).filter(|row| row.path.is_weft()) {
                for theirs in self.of(wire).filter(|row| REFERENCES.contains(&row.path)) {
                    let ratio = |(_, of): &(&str, MeasureFn)| {
                        times(of(&ours.figures).median / of(&theirs.figures).median)
                    };
                    let names = [ours.path.name().to_owned(), theirs.path.name().into(), wire.to_string()];
                    table.add_row(names.into_iter().chain(RATIOS.iter().map(ratio)));
                }
            }
        }
        right_align(&mut table, 3);
        (table.row_iter().count() > 0).then_some(table)
    }
}

impl Summary {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Self {
            median: rounded((low + high) / 2.0),
            min: rounded(sorted[0]),
            max: rounded(sorted[sorted.len() - 1]),
        }
    }

    fn cell(&self) -> String {
        format!("{}\n{}–{}", short(self.median), short(self.min), short(self.max))
    }
}

fn summarise(samples: &[Sample]) -> Figures<Summary> {
    let of = |measure: fn(&Sample) -> f64| Summary::of(&samples.iter().map(measure).collect::<Vec<_>>());
    let memory: Vec<f64> = samples.iter().filter_map(|sample| sample.rss_mb).collect();
    Figures {
        tcp1_gbps: of(|sample| sample.tcp1_gbps),
        tcp4_gbps: of(|sample| sample.tcp4_gbps),
        flood_kpps: of(|sample| sample.flood_kpps),
        ndr_kpps: of(|sample| sample.ndr_kpps),
        rr_p50_us: of(|sample| sample.rr_p50_us),
        rr_p99_us: of(|sample| sample.rr_p99_us),
        cpu_s_per_gb: of(|sample| sample.cpu_s_per_gb),
        rss_mb: (!memory.is_empty()).then(|| Summary::of(&memory)),
    }
}

fn table(rows: &[&Row]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "path",
        "1 TCP stream\nGb/s",
        "4 streams\nGb/s",
        "flood received\nkpps",
        "loss ≤ 0.1 %\nkpps",
        "round trip\np50 µs",
        "\np99 µs",
        "CPU\ns/GB",
        "memory\nMB",
    ]);
    for Row { path, figures, .. } in rows {
        table.add_row([
            path.name().to_owned(),
            figures.tcp1_gbps.cell(),
            figures.tcp4_gbps.cell(),
            figures.flood_kpps.cell(),
            figures.ndr_kpps.cell(),
            figures.rr_p50_us.cell(),
            figures.rr_p99_us.cell(),
            figures.cpu_s_per_gb.cell(),
            figures.rss_mb.map_or_else(String::new, |memory| memory.cell()),
        ]);
    }
    right_align(&mut table, 1);
    table
}

/// All columns from that one on.
fn right_align(table: &mut Table, from: usize) {
    table.column_iter_mut().skip(from).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
}

fn times(ratio: f64) -> String {
    format!("{ratio:.2} ×")
}

/// Three digits that mean something.
fn short(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// To four significant digits: more would only be noise in files that are kept.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

type MeasureFn = fn(&Figures<Summary>) -> Summary;

const RATIOS: &[(&str, MeasureFn)] = &[
    ("1 TCP stream", |figures| figures.tcp1_gbps),
    ("4 streams", |figures| figures.tcp4_gbps),
    ("flood received", |figures| figures.flood_kpps),
    ("loss ≤ 0.1 %", |figures| figures.ndr_kpps),
    ("round trip p50", |figures| figures.rr_p50_us),
    ("CPU per GB", |figures| figures.cpu_s_per_gb),
];

/// Whom Weft is compared with.
const REFERENCES: [Path; 3] = [Path::Vxlan, Path::WireguardGo, Path::Nebula];

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(value: f64, memory: Option<f64>) -> Sample {
        Figures {
            tcp1_gbps: value,
            tcp4_gbps: value,
            flood_kpps: value,
            ndr_kpps: value,
            rr_p50_us: value,
            rr_p99_us: value,
            cpu_s_per_gb: value,
            rss_mb: memory,
        }
    }

    #[test]
    fn a_summary_is_the_median_and_the_range() {
        assert_eq!(Summary::of(&[3.0, 1.0, 2.0]), Summary { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Summary::of(&[4.0, 1.0]), Summary { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(
            Summary::of(&[1.23456, 123456.0, 0.0]),
            Summary { median: 1.235, min: 0.0, max: 123500.0 }
        );
    }

    #[test]
    fn programs_find_the_keys_they_were_promised() {
        let samples = [
            ((Wire::Offload, Path::Veth), vec![sample(20.0, None)]),
            ((Wire::Plain, Path::WeftClear), vec![sample(8.0, Some(12.5)), sample(9.0, Some(12.7))]),
            ((Wire::Plain, Path::Tinc), vec![]),
        ];
        let json = serde_json::to_value(Report::new(2, samples)).unwrap();
        let figure =
            |median: f64, min: f64, max: f64| serde_json::json!({ "median": median, "min": min, "max": max });
        assert_eq!(json["rounds"], 2);
        let rows = json["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!((&rows[0]["path"], &rows[0]["wire"]), (&"veth".into(), &"offload".into()));
        assert!(rows[0].get("rss_mb").is_none());
        assert_eq!((&rows[1]["path"], &rows[1]["wire"]), (&"weft-clear".into(), &"plain".into()));
        for key in
            ["tcp1_gbps", "tcp4_gbps", "flood_kpps", "ndr_kpps", "rr_p50_us", "rr_p99_us", "cpu_s_per_gb"]
        {
            assert_eq!(rows[1][key], figure(8.5, 8.0, 9.0), "{key}");
        }
        assert_eq!(rows[1]["rss_mb"], figure(12.6, 12.5, 12.7));
    }

    #[test]
    fn ratios_are_ours_over_theirs_on_the_same_wire() {
        let samples = [
            ((Wire::Plain, Path::WeftClear), vec![sample(8.0, Some(12.5))]),
            ((Wire::Plain, Path::WireguardGo), vec![sample(2.0, Some(20.0))]),
            ((Wire::Offload, Path::Nebula), vec![sample(1.0, Some(20.0))]),
        ];
        let report = Report::new(1, samples);
        let ratios = report.ratios().unwrap().to_string();
        assert!(ratios.contains("4.00 ×") && ratios.contains("wireguard-go"), "{ratios}");
        assert!(!ratios.contains("nebula"), "{ratios}");
        assert!(report.tables().contains("wire plain, rounds: 1"));
        assert!(Report::new(1, []).ratios().is_none());
    }
}
