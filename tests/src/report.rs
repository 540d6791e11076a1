//! What a demo found, as a table for people and as JSON for programs.
use std::{fs, path::Path, time::Duration};

use anyhow::Context;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;

#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// All checks held.
    pub ok: bool,
    pub nodes: usize,
    pub pods: usize,
    pub checks: Vec<Check>,
    /// How long the shim took, in milliseconds.
    pub add_ms: Quantiles,
    pub del_ms: Quantiles,
    /// The 64 MiB transfer's, in gigabits per second.
    pub tcp_gbps: f64,
    /// The whole demo, without the build, in seconds.
    pub took_s: f64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    pub detail: String,
}

#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
}

impl Report {
    /// Notes a check's outcome; returns whether it held.
    pub fn check(&mut self, name: &str, outcome: anyhow::Result<String>) -> bool {
        let ok = outcome.is_ok();
        let detail = outcome.unwrap_or_else(|error| format!("{error:#}"));
        self.checks.push(Check { name: name.into(), ok, detail });
        ok
    }

    /// Decides on [`Report::ok`]: at least one check, and none that failed.
    pub fn conclude(&mut self) -> bool {
        self.ok = !self.checks.is_empty() && self.checks.iter().all(|check| check.ok);
        self.ok
    }

    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header(["check", "", "detail"]);
        for Check { name, ok, detail } in &self.checks {
            table.add_row([name.as_str(), if *ok { "ok" } else { "FAILED" }, detail]);
        }
        format!(
            "{table}\n{} nodes, {} pods: {}. ADD {:.1} ms (p99 {:.1}), DEL {:.1} ms (p99 {:.1}), all in {:.1} s.",
            self.nodes,
            self.pods,
            if self.ok { "all checks held" } else { "NOT all checks held" },
            self.add_ms.p50,
            self.add_ms.p99,
            self.del_ms.p50,
            self.del_ms.p99,
            self.took_s,
        )
    }

    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("write the report as JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }
}

impl Quantiles {
    /// Of durations in any order, in milliseconds; zero without any.
    pub fn of(durations: &[Duration]) -> Self {
        let mut sorted = durations.to_vec();
        sorted.sort();
        // The nearest rank: the smallest value that at least that share is not above.
        let at = |share: f64| {
            let rank = (sorted.len() as f64 * share).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).map_or(0.0, |it| (it.as_secs_f64() * 1e5).round() / 100.0)
        };
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let durations: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(Quantiles::of(&durations), Quantiles { p50: 100.0, p99: 198.0 });
        assert_eq!(Quantiles::of(&durations[..1]), Quantiles { p50: 200.0, p99: 200.0 });
        assert_eq!(Quantiles::of(&[]), Quantiles::default());
    }

    #[test]
    fn one_failed_check_fails_the_report() {
        let mut report = Report::default();
        assert!(!report.conclude(), "nothing was checked");
        report.check("a", Ok("fine".into()));
        assert!(report.conclude());
        report.check("b", Err(anyhow::anyhow!("why").context("what")));
        assert!(!report.conclude());
        assert_eq!(report.checks[1], Check { name: "b".into(), ok: false, detail: "what: why".into() });
        assert!(report.table().contains("FAILED"));
    }

    #[test]
    fn programs_find_the_keys_they_were_promised() {
        let mut report = Report { nodes: 3, ..Report::default() };
        report.check("ping", Ok("30 pairs".into()));
        report.conclude();
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["ok"], true);
        assert_eq!(json["nodes"], 3);
        assert_eq!(json["checks"][0]["name"], "ping");
        assert!(json["add_ms"]["p50"].is_number() && json["add_ms"]["p99"].is_number());
    }
}
