//! tinc, in its mode that routes.
use std::fs;

use anyhow::Context;

use super::{
    daemon::Daemon,
    ground::{Ground, Side},
};

pub fn set_up(ground: &Ground<'_>) -> anyhow::Result<Vec<Daemon>> {
    ground.plug_pods(MTU)?;
    for side in Side::BOTH {
        configure(ground, side).with_context(|| format!("configure tinc on {}", ground.node(side).name()))?;
    }
    for side in Side::BOTH {
        let name = name(side.other());
        let from = ground.directory(side.other()).join("hosts").join(name);
        fs::copy(from, ground.directory(side).join("hosts").join(name))
            .context("hand over the public key")?;
    }
    let start = |side: Side| {
        let directory = ground.directory(side);
        let mut command = ground.command("tincd")?;
        command.arg("--no-detach").arg("--config").arg(&directory);
        command.arg("--pidfile").arg(directory.join("pid"));
        let daemon = ground.start(side, "tincd", command)?;
        ground
            .route_over_tun(side, DEVICE, MTU)
            .with_context(|| format!("last words of tincd:\n{}", daemon.log_tail()))?;
        Ok(daemon)
    };
    Side::BOTH.into_iter().map(start).collect()
}

fn configure(ground: &Ground<'_>, side: Side) -> anyhow::Result<()> {
    let (directory, other) = (ground.directory(side), side.other());
    fs::create_dir_all(directory.join("hosts"))?;
    let settings = format!(
        "Name = {}\nConnectTo = {}\nInterface = {DEVICE}\nDevice = /dev/net/tun\nMode = router\nBindToAddress = {}\n",
        name(side),
        name(other),
        side.underlay()
    );
    fs::write(directory.join("tinc.conf"), settings)?;
    // Its default, Blowfish, is no longer in OpenSSL 3 as it comes.
    let host = format!("Address = {}\nSubnet = {}\nCipher = aes-256-cbc\n", side.underlay(), side.pods());
    fs::write(directory.join("hosts").join(name(side)), host)?;
    let mut command = ground.command("tincd")?;
    command.arg("--config").arg(&directory).arg("--generate-keys=2048");
    ground.run(command).map(drop)
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Near => "near",
        Side::Far => "far",
    }
}

const DEVICE: &str = "tinc";
/// Fits into the cable's with everything that tinc adds, padding included.
const MTU: u32 = 1400;
