//! Numbers for people.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::Duration;

/// `512 B`, `4.9 KiB`, `3.0 MiB`.
pub(super) fn bytes(n: u64) -> String {
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = units.next().expect("not empty");
    // What would be shown as 1024.0 belongs to the next unit.
    while value >= 1023.95 {
        let Some(next) = units.next() else { break };
        (value, unit) = (value / 1024.0, next);
    }
    format!("{value:.1} {unit}")
}

/// The two greatest units that are not zero: `45s`, `3h 2m`, `2d 3h`.
pub(super) fn duration(time: Duration) -> String {
    let s = time.as_secs();
    let parts = [(s / 86400, "d"), (s / 3600 % 24, "h"), (s / 60 % 60, "m"), (s % 60, "s")];
    let first = parts.iter().position(|(n, _)| *n > 0).unwrap_or(3);
    let shown = parts[first..].iter().take(2).filter(|(n, _)| *n > 0 || s == 0);
    shown.map(|(n, unit)| format!("{n}{unit}")).collect::<Vec<_>>().join(" ")
}

/// `1,048,576`.
pub(super) fn count(n: impl Into<u128>) -> String {
    let digits = n.into().to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

/// `1 packet`, `2 packets`.
pub(super) fn counted(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_binary_units() {
        let shown = [0, 1023, 1024, 5000, (1 << 20) - 1, 3 << 20, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "4.9 KiB", "1.0 MiB", "3.0 MiB", "16.0 EiB"]);
    }

    #[test]
    fn durations_have_two_units() {
        let shown = [0, 45, 60, 125, 10925, 86400 * 2 + 3 * 3600].map(|s| duration(Duration::from_secs(s)));
        assert_eq!(shown, ["0s", "45s", "1m", "2m 5s", "3h 2m", "2d 3h"]);
    }

    #[test]
    fn large_counts_are_grouped() {
        assert_eq!([0u64, 999, 1000, 1 << 20].map(count), ["0", "999", "1,000", "1,048,576"]);
        assert_eq!([counted(1, "peer"), counted(0, "peer")], ["1 peer", "0 peers"]);
    }
}
