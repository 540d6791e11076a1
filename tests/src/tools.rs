//! Programs that the lab and the tests call, and the packages that bring them.
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

/// Each program, the package that has it on Debian and Ubuntu, and whether only the tests call it.
const TOOLS: &[Tool] =
    &[Tool { program: "nft", package: "nftables", needed_by: &[Purpose::Demo, Purpose::Test] }];

struct Tool {
    program: &'static str,
    package: &'static str,
    needed_by: &'static [Purpose],
}

/// Makes sure that the programs are there: installs what is missing, or with `install` false only names it.
///
/// # Errors
/// When something is missing and must not or can't be installed; the message is the command that does it.
pub fn ensure_present(purpose: Purpose, install: bool) -> anyhow::Result<()> {
    let missing = missing(purpose, |program| find(program).is_some());
    if !missing.is_empty() {
        let packages = missing.join(" ");
        let command = format!("apt-get install --no-install-recommends {packages}");
        ensure!(install, "missing: install it with `{command}` (Debian, Ubuntu)");
        ensure!(
            find("apt-get").is_some(),
            "missing: the programs of these Debian packages: {packages}; there is no apt-get here to install them with"
        );
        eprintln!("installing {packages}");
        apt(&["update"])?;
        apt(&[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat())?;
        let still = self::missing(purpose, |program| find(program).is_some());
        ensure!(still.is_empty(), "{} was installed, but its program is not in PATH", still.join(" "));
    }
    ensure_tun(install)
}

fn missing(purpose: Purpose, is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let needed = TOOLS.iter().filter(|tool| tool.needed_by.contains(&purpose));
    needed.filter(|tool| !is_there(tool.program)).map(|tool| tool.package).collect()
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
        assert_eq!(missing(Purpose::Demo, |program| program != "nft"), ["nftables"]);
        assert!(missing(Purpose::Test, |_| true).is_empty());
    }

    #[test]
    fn a_program_is_found_where_path_does_not_lead() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-anywhere"), None);
    }
}
