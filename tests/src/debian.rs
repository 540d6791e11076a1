//! Programs of other projects, as Debian packages them, unpacked into `target/lab/debian/SUITE/`.
//!
//! apt runs with a source list, state and cache of its own and nothing is installed: the host's packages, sources and
//! services stay as they are.
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

use crate::claim;

/// Where programs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12: containerd 1.6, runc, podman 4.3.
    Bookworm,
    /// What is new: containerd 2, the reference plugins 1.9.
    Sid,
}

impl Suite {
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Sid];

    /// The root directory under which the suite's packages are unpacked; fetches them if they are not there.
    ///
    /// # Errors
    /// When they can't be had: says what is missing.
    pub fn root(self) -> anyhow::Result<PathBuf> {
        let name = self.name();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above");
        let base = workspace.join("target/lab/debian").join(name);
        fs::create_dir_all(&base).with_context(|| format!("create {}", base.display()))?;
        let _one_at_a_time = claim::lock(&base.join("lock"))?;
        let (root, list) = (base.join("root"), base.join("packages"));
        let wanted = self.packages().join(" ");
        if fs::read_to_string(&list).ok().as_ref() != Some(&wanted) {
            self.fetch(&base, &root)
                .with_context(|| format!("Debian {name}'s {wanted} can't be had from {MIRROR}"))?;
            fs::write(&list, wanted)?;
        }
        Ok(root)
    }

    /// A program of the suite's.
    pub fn program(self, name: &str) -> anyhow::Result<PathBuf> {
        let root = self.root()?;
        let places = ["usr/bin", "usr/sbin", "bin", "sbin", "usr/lib/cni"];
        let found = places.iter().map(|place| root.join(place).join(name)).find(|path| path.exists());
        found.with_context(|| format!("there is no {name} under {}", root.display()))
    }

    /// The directory with the reference CNI plugins.
    pub fn plugins() -> anyhow::Result<PathBuf> {
        Ok(Self::Sid.root()?.join("usr/lib/cni"))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Sid => "sid",
        }
    }

    fn packages(self) -> &'static [&'static str] {
        match self {
            // Behind conmon: podman's libraries that a small Debian lacks.
            Self::Bookworm => &[
                "containerd",
                "runc",
                "busybox-static",
                "podman",
                "conmon",
                "libgpgme11",
                "libassuan0",
                "libgpg-error0",
                "libsubid4",
                "libdevmapper1.02.1",
                "libsemanage2",
                "libsepol2",
                "libglib2.0-0",
                "libseccomp2",
            ],
            Self::Sid => &["containerd", "containernetworking-plugins"],
        }
    }

    fn fetch(self, base: &Path, root: &Path) -> anyhow::Result<()> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: run `cargo lab test`, or apt-get install debian-archive-keyring"
        );
        let (apt, unpacked) = (base.join("apt"), base.join("unpacked"));
        for directory in [&apt, &unpacked, root] {
            match fs::remove_dir_all(directory) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", directory.display()));
                }
                _ => {}
            }
        }
        for directory in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(apt.join(directory))?;
        }
        // apt gives up root for its downloads.
        fs::set_permissions(apt.join("packages"), fs::Permissions::from_mode(0o777))?;
        let source = format!("deb [signed-by={KEYRING}] {MIRROR} {} main\n", self.name());
        fs::write(apt.join("sources.list"), source)?;
        apt_get(&apt, &["update"])?;
        apt_get(&apt, &[&["download"], self.packages()].concat())?;
        for package in fs::read_dir(apt.join("packages"))? {
            run(Command::new("dpkg").arg("-x").arg(package?.path()).arg(&unpacked))?;
        }
        fs::remove_dir_all(&apt)?;
        Ok(fs::rename(&unpacked, root)?)
    }
}

fn apt_get(apt: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("apt-get");
    command.current_dir(apt.join("packages")).env("DEBIAN_FRONTEND", "noninteractive");
    for (key, path) in [
        ("Dir::Etc::sourcelist", apt.join("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::State::lists", apt.join("lists")),
        ("Dir::Cache", apt.join("cache")),
    ] {
        command.arg("-o").arg(format!("{key}={}", path.display()));
    }
    // A mirror may lag behind, or the clock run ahead; what is signed is what counts here.
    command.args(["-o", "Acquire::Check-Valid-Until=false"]);
    command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-qq"]);
    run(command.args(arguments))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
