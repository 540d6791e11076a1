//! fastd, with the method that it prefers (Salsa20/12 and UMAC).
use std::fs;

use anyhow::Context;

use super::{
    daemon::Daemon,
    ground::{Ground, Side},
};

pub fn set_up(ground: &Ground<'_>) -> anyhow::Result<Vec<Daemon>> {
    ground.plug_pods(MTU)?;
    let keys = [Keys::generate(ground)?, Keys::generate(ground)?];
    let start = |side: Side| {
        let file = ground.directory(side).join("fastd.conf");
        fs::write(&file, configuration(side, &keys)).with_context(|| format!("write {}", file.display()))?;
        let mut command = ground.command("fastd")?;
        command.arg("--config").arg(&file);
        let daemon = ground.start(side, "fastd", command)?;
        ground
            .route_over_tun(side, DEVICE, MTU)
            .with_context(|| format!("last words of fastd:\n{}", daemon.log_tail()))?;
        Ok(daemon)
    };
    Side::BOTH.into_iter().map(start).collect()
}

struct Keys {
    secret: String,
    public: String,
}

impl Keys {
    fn generate(ground: &Ground<'_>) -> anyhow::Result<Self> {
        let mut command = ground.command("fastd")?;
        command.arg("--generate-key");
        let output = ground.run(command)?;
        let key = |label: &str| {
            let found = output.lines().find_map(|line| line.strip_prefix(label));
            found
                .map(|key| key.trim().to_owned())
                .with_context(|| format!("fastd printed no `{label}`: {output}"))
        };
        Ok(Self { secret: key("Secret:")?, public: key("Public:")? })
    }
}

fn configuration(side: Side, keys: &[Keys; 2]) -> String {
    let other = side.other();
    format!(
        "log level warn;\nmode tun;\ninterface \"{DEVICE}\";\nmtu {MTU};\nmethod \"salsa2012+umac\";\n\
         bind {}:{PORT};\nsecret \"{}\";\npeer \"other\" {{ key \"{}\"; remote {}:{PORT}; }}\n",
        side.underlay(),
        keys[side.index()].secret,
        keys[other.index()].public,
        other.underlay()
    )
}

const DEVICE: &str = "fastd";
const PORT: u16 = 10000;
/// What its manual has for an underlay of 1500.
const MTU: u32 = 1426;
