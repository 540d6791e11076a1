//! nebula, with certificates made for the occasion; its packets are sealed with AES-256-GCM.
use std::fs;

use anyhow::Context;
use serde_json::json;

use super::{
    daemon::Daemon,
    ground::{Ground, Side},
};

pub fn set_up(ground: &Ground<'_>) -> anyhow::Result<Vec<Daemon>> {
    ground.plug_pods(MTU)?;
    let authority = ground.directory(Side::Near);
    let mut command = ground.command("nebula-cert")?;
    command.current_dir(&authority).args(["ca", "-name", "lab", "-duration", "24h"]);
    ground.run(command)?;
    let start = |side: Side| {
        let directory = ground.directory(side);
        let mut command = ground.command("nebula-cert")?;
        command.current_dir(&authority).args(["sign", "-name", ground.node(side).name()]);
        command.arg("-networks").arg(format!("{}/24", side.overlay()));
        command.arg("-unsafe-networks").arg(side.pods().to_string());
        command
            .arg("-out-crt")
            .arg(directory.join("host.crt"))
            .arg("-out-key")
            .arg(directory.join("host.key"));
        ground.run(command)?;
        let file = directory.join("nebula.yml");
        let configuration = configuration(side, &directory, &authority);
        fs::write(&file, configuration.to_string()).with_context(|| format!("write {}", file.display()))?;
        let mut command = ground.command("nebula")?;
        command.arg("-config").arg(&file);
        let daemon = ground.start(side, "nebula", command)?;
        ground
            .route_over_tun(side, DEVICE, MTU)
            .with_context(|| format!("last words of nebula:\n{}", daemon.log_tail()))?;
        Ok(daemon)
    };
    Side::BOTH.into_iter().map(start).collect()
}

/// JSON is YAML too.
fn configuration(side: Side, directory: &std::path::Path, authority: &std::path::Path) -> serde_json::Value {
    let other = side.other();
    let anything = json!([{ "port": "any", "proto": "any", "host": "any", "local_cidr": "0.0.0.0/0" }]);
    json!({
        "pki": {
            "ca": authority.join("ca.crt"),
            "cert": directory.join("host.crt"),
            "key": directory.join("host.key"),
        },
        "static_host_map": { other.overlay().to_string(): [format!("{}:{PORT}", other.underlay())] },
        "lighthouse": { "am_lighthouse": false, "hosts": [] },
        "listen": { "host": side.underlay(), "port": PORT },
        "cipher": "aes",
        "tun": {
            "dev": DEVICE,
            "mtu": MTU,
            "unsafe_routes": [{ "route": other.pods().to_string(), "via": other.overlay(), "mtu": MTU }],
        },
        "firewall": { "outbound": anything, "inbound": anything },
        "logging": { "level": "warning" },
    })
}

const DEVICE: &str = "nebula";
const PORT: u16 = 4242;
/// The cable's less IPv4 20, UDP 8, header 16 and tag 16; nebula's own default of 1300 is for the Internet.
const MTU: u32 = 1440;
