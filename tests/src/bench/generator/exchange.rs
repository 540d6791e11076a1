//! Request and response: one byte there, one byte back, then the next.
use std::{
    net::UdpSocket,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::Way;

/// Round trips of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundTrips {
    pub median: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
}

/// Exchanges datagrams of one byte for `time`, one outstanding.
pub fn exchange(way: Way<'_>, time: Duration) -> anyhow::Result<RoundTrips> {
    let server = way.to.run(|| Ok(UdpSocket::bind((way.address, 0))?))?;
    let target = server.local_addr()?;
    let connect = || {
        let client = UdpSocket::bind(("0.0.0.0", 0))?;
        client.connect(target)?;
        Ok(client)
    };
    let client = way.from.run(connect)?;
    client.set_read_timeout(Some(PATIENCE))?;
    server.set_read_timeout(Some(PATIENCE))?;
    let done = AtomicBool::new(false);
    let (times, lost) = thread::scope(|scope| {
        scope.spawn(|| echo(&server, &done));
        let outcome = ask(&client, time);
        done.store(true, Ordering::Relaxed);
        outcome
    });
    ensure!(lost <= times.len() / 100, "{lost} of {} requests were not answered", times.len() + lost);
    quantiles(times).context("no request was answered")
}

fn ask(client: &UdpSocket, time: Duration) -> (Vec<Duration>, usize) {
    let (mut times, mut lost, mut number) = (Vec::new(), 0, 0u8);
    let start = Instant::now();
    while start.elapsed() < time {
        number = number.wrapping_add(1);
        let asked = Instant::now();
        match round_trip(client, number) {
            Ok(()) => times.push(asked.elapsed()),
            Err(_) => lost += 1,
        }
    }
    (times, lost)
}

fn round_trip(client: &UdpSocket, number: u8) -> std::io::Result<()> {
    client.send(&[number])?;
    let mut answer = [0];
    loop {
        client.recv(&mut answer)?;
        // Late answers to earlier requests are passed over.
        if answer[0] == number {
            return Ok(());
        }
    }
}

fn echo(server: &UdpSocket, done: &AtomicBool) {
    let mut byte = [0];
    while !done.load(Ordering::Relaxed) {
        if let Ok((_, client)) = server.recv_from(&mut byte) {
            // An answer that can't be sent is one that the client misses.
            let _ = server.send_to(&byte, client);
        }
    }
}

fn quantiles(mut times: Vec<Duration>) -> Option<RoundTrips> {
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent).div_ceil(100).saturating_sub(1)).copied();
    Some(RoundTrips { median: at(50)?, p99: at(99)? })
}

/// An answer that takes longer is lost.
const PATIENCE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_times_that_were_measured() {
        let times = (1..=200).rev().map(Duration::from_micros).collect();
        let (median, p99) = (Duration::from_micros(100), Duration::from_micros(198));
        assert_eq!(quantiles(times), Some(RoundTrips { median, p99 }));
        assert_eq!(quantiles(Vec::new()), None);
    }
}
