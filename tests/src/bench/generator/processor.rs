//! What the machine's processors have done so far.
use std::{fs, time::Duration};

use anyhow::Context;
use nix::unistd::{SysconfVar, sysconf};

/// Time that all processors together were busy since boot: everything but idle, waiting for disks, and what the
/// hypervisor took away.
pub fn busy() -> anyhow::Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks = ticks(&stat).context("/proc/stat has no line for all processors")?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel has no clock tick")?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; guests' time is part of user's.
fn ticks(stat: &str) -> Option<u64> {
    let all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = all.split_whitespace().map_while(|field| field.parse().ok()).collect();
    [0, 1, 2, 5, 6].iter().map(|at| fields.get(*at)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_spent_on_work_counts() {
        let stat = "cpu  1 20 300 4000 50000 600000 7000000 80000000 0 0\ncpu0 9 9 9 9 9 9 9 9 0 0\n";
        assert_eq!(ticks(stat), Some(7_600_321));
        assert_eq!(ticks("cpu0 9 9 9 9 9 9 9 9 0 0\n"), None);
    }
}
