//! One thing in two ways, measured in turn: the median of the pairs' ratios, with the interval that holds the true median in
//! 95 of 100 cases.
use serde::Serialize;
use std::fmt;

/// Of the first way's figure to the second's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    pub pairs: usize,
    pub median: f64,
    /// In 95 of 100 cases the true median lies between these.
    pub low: f64,
    pub high: f64,
}

/// Measures both ways so often; `measure` is told which by whether it is the first. Who begins changes, as a machine warms up
/// or slows down, and as one pays for what the next finds in caches.
///
/// # Errors
/// The first of a measurement.
pub fn in_turn<T>(
    pairs: usize,
    mut measure: impl FnMut(bool) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<(T, T)>> {
    let pair = |number: usize| {
        let first_begins = number.is_multiple_of(2);
        let (begins, follows) = (measure(first_begins)?, measure(!first_begins)?);
        Ok(if first_begins { (begins, follows) } else { (follows, begins) })
    };
    (0..pairs).map(pair).collect()
}

impl Ratio {
    /// # Panics
    /// Without any pair.
    #[must_use]
    pub fn of(pairs: &[(f64, f64)]) -> Self {
        let mut ratios: Vec<f64> = pairs.iter().map(|(first, second)| first / second).collect();
        ratios.sort_by(f64::total_cmp);
        let (low, high) = interval(ratios.len());
        Self { pairs: pairs.len(), median: ratios[ratios.len() / 2], low: ratios[low], high: ratios[high] }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "pairs              {}", self.pairs)?;
        writeln!(f, "ratio, median      {:.3}", self.median)?;
        write!(f, "95 % interval      {:.3} to {:.3}", self.low, self.high)
    }
}

/// Ranks between which the median of that many values lies in 95 of 100 cases: the binomial distribution, by its normal
/// approximation.
fn interval(count: usize) -> (usize, usize) {
    let half = 0.98 * (count as f64).sqrt();
    let middle = count as f64 / 2.0;
    ((middle - half).floor().max(0.0) as usize, ((middle + half).ceil() as usize).min(count - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_begins_changes_and_each_figure_is_of_its_own_way() {
        let mut order = Vec::new();
        let pairs = in_turn(3, |first| {
            order.push(first);
            Ok(if first { 3.0 } else { 2.0 })
        });
        assert_eq!(order, [true, false, false, true, true, false]);
        assert_eq!(Ratio::of(&pairs.unwrap()), Ratio { pairs: 3, median: 1.5, low: 1.5, high: 1.5 });
    }

    #[test]
    fn the_interval_is_around_the_median_and_within_the_values() {
        assert_eq!(interval(15), (3, 12));
        assert_eq!(interval(30), (9, 21));
        assert_eq!(interval(1), (0, 0));
    }
}
