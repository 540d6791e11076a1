//! The reference plugins of the CNI project, as Debian sid packages them, unpacked into `target/lab/`.
//!
//! apt runs with a source list, state and cache of its own, so the host's packages and sources stay as they are.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The directory with `bridge` and `host-local`.
///
/// # Panics
/// They are not there yet and can't be had: says what is missing.
pub fn plugins() -> &'static Path {
    static FETCHED: OnceLock<PathBuf> = OnceLock::new();
    FETCHED.get_or_init(|| {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let base = workspace.join("target/lab/reference-cni");
        fs::create_dir_all(&base).unwrap();
        let lock = fs::File::create(base.join("lock")).unwrap();
        lock.lock().unwrap();
        let plugins = base.join("root/usr/lib/cni");
        if !plugins.join("bridge").exists() {
            fetch(&base).unwrap_or_else(|why| panic!("the reference plugins can't be had: {why}"));
        }
        plugins
    })
}

fn fetch(base: &Path) -> Result<(), String> {
    if !Path::new(KEYRING).exists() {
        return Err(format!(
            "{KEYRING} is missing: run `cargo lab test`, or apt-get install debian-archive-keyring"
        ));
    }
    let (apt, unpacked) = (base.join("apt"), base.join("unpacked"));
    let _ = fs::remove_dir_all(&apt);
    let _ = fs::remove_dir_all(&unpacked);
    for directory in ["lists/partial", "cache/archives/partial", "packages"] {
        fs::create_dir_all(apt.join(directory)).map_err(|e| e.to_string())?;
    }
    // apt gives up root for its downloads.
    fs::set_permissions(apt.join("packages"), fs::Permissions::from_mode(0o777))
        .map_err(|e| e.to_string())?;
    let source = format!("deb [signed-by={KEYRING}] {MIRROR} sid main\n");
    fs::write(apt.join("sources.list"), source).map_err(|e| e.to_string())?;
    let apt_get = |arguments: &[&str]| {
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
    };
    apt_get(&["update"])?;
    apt_get(&["download", PACKAGE])?;
    let package = fs::read_dir(apt.join("packages")).map_err(|e| e.to_string())?.next();
    let package = package.ok_or("apt-get downloaded nothing")?.map_err(|e| e.to_string())?.path();
    run(Command::new("dpkg").arg("-x").arg(package).arg(&unpacked))?;
    fs::remove_dir_all(&apt).map_err(|e| e.to_string())?;
    fs::rename(&unpacked, base.join("root")).map_err(|e| e.to_string())
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

const PACKAGE: &str = "containernetworking-plugins";
const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
