//! A second opinion on one TCP stream.
use std::{
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};

use super::paths::{Programs, Site};
use crate::{linux, namespace::Netns, wait};

/// One stream from pod to pod, in gigabits per second.
pub fn measure(site: &Site, programs: &Programs, time: Duration) -> anyhow::Result<f64> {
    let way = site.way();
    let mut server = programs.command("iperf3")?;
    server.args(["--server", "--one-off", "--bind"]).arg(way.address.to_string());
    server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = way.to.sandbox().spawn(way.to, server).context("start iperf3's server")?;
    let connect = || {
        let mut client = programs.command("iperf3")?;
        client.args(["--json", "--congestion", "cubic", "--client"]).arg(way.address.to_string());
        client.arg("--time").arg(time.as_secs().max(1).to_string());
        run(way.from, client)
    };
    let measured = wait::until("iperf3 connects", Duration::from_secs(5), connect);
    // Fails only when it has ended by itself, as it should.
    let _ = server.kill();
    server.wait().context("wait for iperf3's server")?;
    measured
}

fn run(netns: &Netns, mut command: Command) -> anyhow::Result<f64> {
    linux::die_with_spawner(&mut command);
    let output = netns.run(|| command.stdin(Stdio::null()).output().context("run iperf3"))?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).context("iperf3's output")?;
    ensure!(output.status.success(), "iperf3: {}", json["error"]);
    let rate = json["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.map(|bits| bits * 1e-9).context("iperf3's output has no rate")
}
