//! Configuration by the environment, and the log.
use std::{process::Command, time::Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use weft_lab::{Lab, agent::METRICS, wait};

use crate::harness::{Running, SHORT, SOON, START};

#[test]
fn the_environment_configures_and_the_log_is_json_where_asked() {
    let lab = Lab::builder().without_agents().start().unwrap();
    let node = lab.node("n1").unwrap();
    let mut command = Command::new(&node.binaries().unwrap().weft);
    command.arg("agent").args(["--log", "debug"]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in [
        ("NAME", "Environment-1"),
        ("ADVERTISE", "192.0.2.1:7783"),
        ("LISTEN", "0.0.0.0:7783"),
        ("PEER", ""),
        ("CA_DIR", lab.ca_dir().to_str().unwrap()),
        ("INSECURE", ""),
        ("UNIVERSE", "10.96.0.0/16"),
        ("IPAM_SEED", "environment-1"),
        ("MTU", "1300"),
        ("STATE_DIR", node.state_dir().to_str().unwrap()),
        ("RUN_DIR", node.run_dir().to_str().unwrap()),
        ("METRICS_ADDR", METRICS),
        ("UNDERLAY_FORWARDING", "off"),
        ("NO_MASQUERADE", "198.51.100.0/24,203.0.113.0/24"),
        ("LOG_FORMAT", "json"),
        // The flag wins.
        ("LOG", "error"),
    ] {
        command.env(format!("WEFT_{name}"), value);
    }
    let mut agent = Running::start(&node, command);
    wait::until("it is ready", START, || {
        let (status, body) = node.http("/readyz")?;
        anyhow::ensure!(status == 200, "{body}{}", agent.said());
        Ok(())
    })
    .unwrap();
    let status = node.status().unwrap();
    assert!(status["name"] == "environment-1" && status["universe"] == "10.96.0.0/16", "{status}");
    assert!(status["mtu"] == 1300 && status["endpoints"][0] == "192.0.2.1:7783", "{status}");

    let start = Instant::now();
    kill(agent.pid(), Signal::SIGINT).unwrap();
    assert!(agent.wait_end(SOON).unwrap().success());
    assert!(start.elapsed() < 2 * SHORT, "SIGINT took {:?}", start.elapsed());
    let said = agent.said();
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let told = |text: &str| lines.iter().find(|line| line["fields"]["message"] == text).is_some();
    assert!(told("started") && told("stopped; pods, links and routes stay"), "{said}");
    assert!(lines.iter().any(|line| line["level"] == "DEBUG"), "the flag beats the environment: {said}");
}
