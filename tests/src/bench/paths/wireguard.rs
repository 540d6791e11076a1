//! WireGuard in user space: wireguard-go and BoringTun, configured over the socket that both have for it.
//!
//! The protocol is that of <https://www.wireguard.com/xplatform/>: `set=1`, a key and a value a line, an empty line.
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::mount::{MsFlags, mount};

use super::{
    Side,
    daemon::Daemon,
    ground::{Ground, STARTED_WITHIN},
};
use crate::wait;

/// `program FLAGS DEVICE` on both nodes.
pub fn set_up(ground: &Ground<'_>, program: &str, flags: &[&str]) -> anyhow::Result<Vec<Daemon>> {
    hide_sockets(ground)?;
    let start = |side: Side| {
        // The nodes have their sockets in one directory.
        let device = format!("wg-{}", ground.node(side).name());
        let mut command = ground.command(program)?;
        command.args(flags).arg(&device).env("LOG_LEVEL", "error").env("WG_LOG_LEVEL", "error");
        let daemon = ground.start(side, program, command)?;
        let socket = format!("{SOCKETS}/{device}.sock");
        let connect = || ground.lab.sandbox().run(|| Ok(UnixStream::connect(&socket)?));
        let told = wait::until(&format!("{program} listens on {socket}"), STARTED_WITHIN, connect)
            .and_then(|socket| tell(&socket, &configuration(side)))
            .and_then(|()| ground.route_over_tun(side, &device, MTU));
        told.with_context(|| format!("last words of {program}:\n{}", daemon.log_tail()))?;
        Ok(daemon)
    };
    Side::BOTH.into_iter().map(start).collect()
}

fn configuration(side: Side) -> String {
    let (private, _) = keys(side);
    let (_, public) = keys(side.other());
    format!(
        "set=1\nprivate_key={private}\nlisten_port={PORT}\nreplace_peers=true\npublic_key={public}\n\
         endpoint={}:{PORT}\nallowed_ip={}\n\n",
        side.other().underlay(),
        side.other().pods()
    )
}

fn tell(mut socket: &UnixStream, configuration: &str) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.write_all(configuration.as_bytes()).context("configure")?;
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer).context("configure: no answer")?;
    ensure!(answer.trim() == "errno=0", "configure: it answered {answer:?}");
    Ok(())
}

/// Has the lab's mounts show an empty directory where the sockets are made, so that the host's own are not in the way and
/// none is left.
fn hide_sockets(ground: &Ground<'_>) -> anyhow::Result<()> {
    fs::create_dir_all(SOCKETS).with_context(|| format!("create {SOCKETS}"))?;
    ground.lab.sandbox().run(|| {
        let mounted = fs::read_to_string("/proc/thread-self/mountinfo")?.contains(LABEL);
        if !mounted {
            let (kind, none) = (Some("tmpfs"), MsFlags::empty());
            mount(Some(LABEL), SOCKETS, kind, none, Some("mode=700"))
                .with_context(|| format!("mount a tmpfs on {SOCKETS}"))?;
        }
        Ok(())
    })
}

/// Private and public key: those of Alice and Bob in RFC 7748, section 6.1, which protect nothing and need not.
fn keys(side: Side) -> (&'static str, &'static str) {
    match side {
        Side::Near => (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        ),
        Side::Far => (
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        ),
    }
}

/// Where both programs make their sockets.
const SOCKETS: &str = "/var/run/wireguard";
/// By which the mount is known.
const LABEL: &str = "weft-lab-wireguard";
const PORT: u16 = 51820;
/// What the programs and `wg-quick` choose on an underlay of 1500: room for IPv6 outside.
pub const MTU: u32 = 1420;
