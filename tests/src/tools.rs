//! What the lab and the tests call or read, and the packages that bring it.
use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail, ensure};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// What someone is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Demo,
    Test,
}

/// What is needed beside Rust and a C compiler, the package that has it on Debian and Ubuntu, and for what.
const TOOLS: &[Tool] = &[
    Tool { what: What::Program("nft"), package: "nftables", needed_by: &[Purpose::Demo, Purpose::Test] },
    // What other networks leave on a node is made with these.
    Tool { what: What::Program("ip"), package: "iproute2", needed_by: &[Purpose::Test] },
    Tool { what: What::Program("iptables-save"), package: "iptables", needed_by: &[Purpose::Test] },
    // The reference CNI plugins come from Debian, on Ubuntu too, through an apt of their own.
    Tool {
        what: What::File("/usr/share/keyrings/debian-archive-keyring.gpg"),
        package: "debian-archive-keyring",
        needed_by: &[Purpose::Test],
    },
];

struct Tool {
    what: What,
    package: &'static str,
    needed_by: &'static [Purpose],
}

enum What {
    Program(&'static str),
    File(&'static str),
}

impl What {
    fn is_there(&self) -> bool {
        match self {
            Self::Program(name) => find(name).is_some(),
            Self::File(path) => Path::new(path).exists(),
        }
    }
}

/// Makes sure that the programs are there: installs what is missing, or with `install` false only names it.
///
/// # Errors
/// When something is missing and must not or can't be installed; the message is the command that does it.
pub fn ensure_present(purpose: Purpose, install: bool) -> anyhow::Result<()> {
    let missing = missing(purpose, What::is_there);
    if !missing.is_empty() {
        let packages = missing.join(" ");
        let command = format!("apt-get install --no-install-recommends {packages}");
        ensure!(install, "missing: install it with `{command}` (Debian, Ubuntu)");
        ensure!(
            find("apt-get").is_some(),
            "missing: what these Debian packages bring: {packages}; there is no apt-get here to install them with"
        );
        eprintln!("installing {packages}");
        apt(&["update"])?;
        apt(&[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat())?;
        let still = self::missing(purpose, What::is_there);
        ensure!(still.is_empty(), "{} was installed, but what it should bring is not there", still.join(" "));
    }
    ensure_tun(install)
}

fn missing(purpose: Purpose, is_there: impl Fn(&What) -> bool) -> Vec<&'static str> {
    let needed = TOOLS.iter().filter(|tool| tool.needed_by.contains(&purpose));
    needed.filter(|tool| !is_there(&tool.what)).map(|tool| tool.package).collect()
}

/// The program's path, from `PATH` and from where administrators' programs lie.
pub fn find(program: &str) -> Option<PathBuf> {
    search_path().map(|directory| directory.join(program)).find(|file| {
        fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    })
}

/// `PATH` for what the lab starts.
pub fn path_variable() -> OsString {
    env::join_paths(search_path()).expect("the parts of PATH and our own can be joined")
}

fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let given: Vec<_> = env::split_paths(&path).collect();
    given.into_iter().chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
}

fn apt(arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet=2").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    // Standard output is for the caller's results.
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let status = command.status().context("run apt-get")?;
    ensure!(status.success(), "apt-get {} failed: {status}", arguments.join(" "));
    Ok(())
}

/// A chroot or a container may lack the TUN device that every agent opens.
fn ensure_tun(install: bool) -> anyhow::Result<()> {
    let device = Path::new("/dev/net/tun");
    if device.exists() {
        return Ok(());
    }
    if !install {
        bail!("missing: make it with `mkdir -p /dev/net && mknod /dev/net/tun c 10 200`");
    }
    eprintln!("making {}", device.display());
    fs::create_dir_all("/dev/net").context("create /dev/net")?;
    // The numbers are fixed: Documentation/admin-guide/devices.txt of the kernel.
    mknod(device, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(10, 200))
        .with_context(|| format!("make {}", device.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_by_its_package() {
        assert_eq!(missing(Purpose::Demo, |_| false), ["nftables"]);
        let all = ["nftables", "iproute2", "iptables", "debian-archive-keyring"];
        assert_eq!(missing(Purpose::Test, |_| false), all);
        assert_eq!(missing(Purpose::Test, |what| matches!(what, What::File(_))), all[..3]);
        assert!(missing(Purpose::Test, |_| true).is_empty());
    }

    #[test]
    fn a_program_is_found_where_path_does_not_lead() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-anywhere"), None);
    }
}
