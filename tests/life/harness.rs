//! What several of these tests need: agents run by hand, metrics read, and what a pod is told by ICMP.
use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use weft_lab::{
    Lab,
    agent::tail,
    namespace::Netns,
    node::Node,
    pod::Pod,
    wait::{self, Deadline},
};

/// For what takes milliseconds when all is well.
pub const SOON: Duration = Duration::from_secs(5);
/// For one echo.
pub const SHORT: Duration = Duration::from_millis(500);
/// From an agent's start until ADD would work, on a busy machine.
pub const START: Duration = Duration::from_secs(20);

/// A process on a node, ended when dropped; its output goes to a file.
pub struct Running {
    child: Child,
    output: tempfile::NamedTempFile,
}

impl Running {
    /// Starts it in the node's namespace and the lab's mounts.
    pub fn start(node: &Node, mut command: Command) -> Self {
        let output = tempfile::NamedTempFile::new().unwrap();
        let file = || Stdio::from(File::options().append(true).open(output.path()).unwrap());
        command.stdin(Stdio::null()).stdout(file()).stderr(file());
        let child = node.netns().sandbox().spawn(node.netns(), command).unwrap();
        Self { child, output }
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id().cast_signed())
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.output.path()).unwrap()
    }

    pub fn wait_end(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        let ended = wait::until("it ends", within, || self.child.try_wait()?.context("it still runs"));
        ended.with_context(|| format!("it said:\n{}", tail(self.output.path())))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A lab with that many nodes, each with an agent and so many pods.
pub fn lab(nodes: usize, pods: usize) -> Lab {
    Lab::builder().nodes(nodes).pods(pods).start().unwrap()
}

/// Waits until the one pod answers the other.
pub fn reaches(from: &Pod, to: &Pod) {
    let what = format!("{} reaches {}", from.full_name(), to.full_name());
    let address = to.address().unwrap();
    wait::until(&what, SOON, || from.ping(address, SHORT)).unwrap();
}

/// Adds an attached pod.
pub fn attached(lab: &Lab, node: &Arc<Node>) -> Arc<Pod> {
    let pod = lab.add_pod(node).unwrap();
    pod.attach().unwrap();
    pod
}

/// One number of `/metrics`; `name` comes with its labels, if it has any.
pub fn metric(node: &Node, name: &str) -> anyhow::Result<f64> {
    let (_, page) = node.http("/metrics")?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("there is no {name} in\n{page}"))?.parse()?)
}

/// What a command of `weft` printed, if it succeeded.
pub fn printed(output: Output) -> anyhow::Result<String> {
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{}: {out}{err}", output.status);
    Ok(out)
}

/// The complaint of a command of `weft` that failed by itself.
pub fn complaint(output: Output) -> String {
    assert!(!output.status.success() && output.status.signal().is_none(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// An ICMP error about a datagram.
#[derive(Debug)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    /// Time to live of the datagram when the error arose.
    pub ttl: u8,
}

/// Sends `count` datagrams to an address and returns the first ICMP error about any of them.
pub fn icmp_about(netns: &Netns, to: Ipv4Addr, count: usize, within: Duration) -> anyhow::Result<Icmp> {
    netns
        .run(|| {
            let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
            let errors = UdpSocket::from(raw);
            let sender = UdpSocket::bind("0.0.0.0:0")?;
            for _ in 0..count {
                sender.send_to(b"hello?", SocketAddr::new(IpAddr::V4(to), 9))?;
            }
            let deadline = Deadline::after(within);
            let mut packet = [0; 2048];
            loop {
                errors.set_read_timeout(Some(deadline.left()?))?;
                let length = match errors.recv(&mut packet) {
                    Ok(length) => length,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Err(error) => bail!("{error}"),
                };
                if let Some(error) = icmp_error(&packet[..length], to) {
                    return Ok(error);
                }
            }
        })
        .with_context(|| format!("an ICMP error about {to}"))
}

/// RFC 792: behind the IP header type, code, checksum, four bytes, and the head of the packet that it is about.
fn icmp_error(packet: &[u8], about: Ipv4Addr) -> Option<Icmp> {
    let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from);
    let message = packet.get(usize::from(packet.first()? & 15) * 4..)?;
    let quoted = message.get(8..)?;
    let is_error = matches!(message[0], 3 | 11 | 12) && address(quoted.get(16..20)?)? == about;
    is_error.then(|| Icmp { kind: message[0], code: message[1], ttl: quoted[8] })
}

/// Packets that the node's device was given to send, and that it delivered, by `/proc/net/dev`.
pub fn device_packets(node: &Node, device: &str) -> anyhow::Result<u64> {
    let table = node.netns().run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
    let line = table.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let fields: Vec<u64> =
        line.context("no such device")?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    Ok(fields[1] + fields[9])
}
