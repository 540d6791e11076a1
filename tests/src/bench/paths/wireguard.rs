//! WireGuard in user space: wireguard-go and BoringTun, configured over the socket that both have for it.
//!
//! The protocol is that of <https://www.wireguard.com/xplatform/>: `set=1`, a key and a value a line, an empty line.
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};

use super::{
    daemon::Daemon,
    ground::{Ground, STARTED_WITHIN, Side},
};
use crate::wait;

pub fn set_up_wireguard_go(ground: &Ground<'_>) -> anyhow::Result<Vec<Daemon>> {
    set_up(ground, "wireguard-go", &["--foreground"])
}

pub fn set_up_boringtun(ground: &Ground<'_>) -> anyhow::Result<Vec<Daemon>> {
    set_up(ground, "boringtun-cli", &["--foreground", "--disable-drop-privileges"])
}

/// `program FLAGS DEVICE` on both nodes.
fn set_up(ground: &Ground<'_>, program: &str, flags: &[&str]) -> anyhow::Result<Vec<Daemon>> {
    ground.plug_pods(MTU)?;
    // Seen through the daemon's root, an absolute link would lead back to the host's.
    let run = fs::canonicalize("/var/run").context("/var/run")?;
    let start = |side: Side| {
        let mut command = hidden(ground.command(program)?);
        command.args(flags).arg(DEVICE).env("LOG_LEVEL", "error").env("WG_LOG_LEVEL", "error");
        let daemon = ground.start(side, program, command)?;
        let socket = format!("/proc/{}/root{}/wireguard/{DEVICE}.sock", daemon.process().pid, run.display());
        let connect = || Ok(UnixStream::connect(&socket)?);
        let told = wait::until(&format!("{program} listens on {socket}"), STARTED_WITHIN, connect)
            .and_then(|socket| tell(&socket, &configuration(side)))
            .and_then(|()| ground.route_over_tun(side, DEVICE, MTU));
        told.with_context(|| format!("last words of {program}:\n{}", daemon.log_tail()))?;
        Ok(daemon)
    };
    Side::BOTH.into_iter().map(start).collect()
}

/// The command with a `/var/run` of its own: both nodes' programs make their sockets there, under the same name, and the
/// host has its own.
fn hidden(program: Command) -> Command {
    let mut command = Command::new("unshare");
    // The lab's mounts are private already; to make them so again is refused in a chroot.
    command.args(["--mount", "--propagation", "unchanged", "sh", "-c"]);
    command.args(["mount -t tmpfs none /var/run && exec \"$0\" \"$@\""]).arg(program.get_program());
    command
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

const DEVICE: &str = "wg0";
const PORT: u16 = 51820;
/// What the programs and `wg-quick` choose on an underlay of 1500: room for IPv6 outside.
const MTU: u32 = 1420;
