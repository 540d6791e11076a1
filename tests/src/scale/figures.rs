//! What was measured, as a table, and the law that fits it best.
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde::{Deserialize, Serialize};

/// Of one network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figures {
    pub nodes: usize,
    /// All started at once, as after a power cut; else it has grown.
    #[serde(default)]
    pub again: bool,
    /// Frames that an agent sends while nothing happens.
    pub idle_bytes_per_second: f64,
    /// What an agent's mesh and allocator hold.
    pub memory_bytes: f64,
    /// Seconds of a processor that an agent takes in a second while nothing happens, those for reading the clock included.
    pub idle_processor: f64,
    /// Until all know of a joiner and it knows of all, all know of one that has left, and all know after a partition what had been said on either side;
    /// in seconds.
    pub join_s: f64,
    pub leave_s: f64,
    pub heal_s: f64,
    /// How long the simulation took, in seconds.
    pub took_s: f64,
}

/// A measure grows as `factor · nodes ^ exponent`.
#[derive(Clone, Debug, Serialize)]
pub struct Growth {
    pub measure: &'static str,
    pub factor: f64,
    pub exponent: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub networks: Vec<Figures>,
    #[serde(skip_deserializing)]
    pub growth: Vec<Growth>,
}

pub struct Measure {
    pub name: &'static str,
    pub of: fn(&Figures) -> f64,
}

pub const MEASURES: [Measure; 6] = [
    Measure { name: "idle traffic, B/s", of: |figures| figures.idle_bytes_per_second },
    Measure { name: "memory, KiB", of: |figures| figures.memory_bytes / 1024.0 },
    Measure { name: "idle CPU, µs/s", of: |figures| figures.idle_processor * 1e6 },
    Measure { name: "join, s", of: |figures| figures.join_s },
    Measure { name: "leave, s", of: |figures| figures.leave_s },
    Measure { name: "heal, s", of: |figures| figures.heal_s },
];

impl Report {
    #[must_use]
    pub fn of(mut networks: Vec<Figures>) -> Self {
        networks.sort_by_key(|one| one.nodes);
        let growth = MEASURES.iter().map(|measure| {
            let points: Vec<_> = networks.iter().map(|one| (one.nodes as f64, (measure.of)(one))).collect();
            let (factor, exponent) = law(&points);
            Growth { measure: measure.name, factor, exponent }
        });
        Self { growth: growth.collect(), networks }
    }

    pub fn table(&self) -> Table {
        let mut table = Table::new();
        let header = ["nodes"].into_iter().chain(MEASURES.map(|measure| measure.name));
        table.load_style(UTF8_FULL_CONDENSED).set_header(header);
        let digits = |value: f64| if value < 10.0 { 2 } else { 0 };
        for one in &self.networks {
            let values = MEASURES.map(|measure| (measure.of)(one));
            let cells = values.map(|value| format!("{value:.*}", digits(value)));
            let started = if one.again { ", again" } else { "" };
            table.add_row([format!("{}{started}", one.nodes)].into_iter().chain(cells));
        }
        let laws = self.growth.iter().map(|law| format!("{:.3} · n^{:.2}", law.factor, law.exponent));
        table.add_row(["grows as".to_owned()].into_iter().chain(laws));
        table
    }
}

/// Factor and exponent of the power law that fits best: least squares of the logarithms.
fn law(points: &[(f64, f64)]) -> (f64, f64) {
    let logs: Vec<_> = points.iter().filter(|(_, y)| *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / logs.len().max(1) as f64;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = logs.iter().map(|point| (point.0 - x).powi(2)).sum();
    let common: f64 = logs.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let exponent = if spread > 0.0 { common / spread } else { 0.0 };
    ((y - exponent * x).exp(), exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_law_is_found_again() {
        let points = [10.0, 100.0, 1000.0].map(|n: f64| (n, 3.0 * n.powf(1.5)));
        let (factor, exponent) = law(&points);
        assert!((factor - 3.0).abs() < 1e-9 && (exponent - 1.5).abs() < 1e-9);
        assert_eq!(law(&points[..1]).1, 0.0);
    }
}
