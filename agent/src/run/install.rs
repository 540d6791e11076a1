//! Puts the CNI programs on a node, and takes off it all that Weft made: what the Kubernetes manifests run.

use super::reset::{ResetArgs, reset};
use crate::{
    cli::print,
    config::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR},
};
use anyhow::{Context, ensure};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

#[derive(Clone, Debug, clap::Args)]
pub struct InstallCniArgs {
    /// Directory of the programs to install: weft-cni, and those of the CNI project that the configuration names
    #[arg(long, env = "WEFT_CNI_FROM_DIR", hide_env_values = true, value_name = "DIR", default_value = FROM)]
    from_dir: PathBuf,
    /// Directory in which the container runtime looks for CNI programs
    #[arg(long, env = "WEFT_CNI_BIN_DIR", hide_env_values = true, value_name = "DIR", default_value = BIN)]
    bin_dir: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
pub struct UninstallArgs {
    /// State directory of the agent
    #[arg(long, env = "WEFT_STATE_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Run directory of the agent
    #[arg(long, env = "WEFT_RUN_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// Directory to which the agent wrote the CNI configuration
    #[arg(long, env = "WEFT_CNI_CONF_DIR", hide_env_values = true, value_name = "DIR", default_value = CONF)]
    cni_conf_dir: PathBuf,
    /// Directory in which the container runtime looks for CNI programs
    #[arg(long, env = "WEFT_CNI_BIN_DIR", hide_env_values = true, value_name = "DIR", default_value = BIN)]
    bin_dir: PathBuf,
}

/// Installs the shim, and beside it the programs of the CNI project that are not there yet: another's are left alone.
pub fn install_cni(args: &InstallCniArgs) -> anyhow::Result<()> {
    let InstallCniArgs { from_dir, bin_dir } = args;
    fs::create_dir_all(bin_dir).with_context(|| format!("create {}", bin_dir.display()))?;
    put(&from_dir.join(SHIM), bin_dir, SHIM)?;
    print(&format!("installed {}\n", bin_dir.join(SHIM).display()))?;
    for name in COMPANIONS {
        let target = bin_dir.join(name);
        match target.try_exists().with_context(|| format!("look for {}", target.display()))? {
            true => print(&format!("left {} as it is\n", target.display()))?,
            false => {
                put(&from_dir.join(name), bin_dir, name)?;
                print(&format!("installed {}\n", target.display()))?;
            }
        }
    }
    Ok(())
}

/// Takes the node out of the network whoever objects, and removes all that Weft made and installed. What belongs to the
/// CNI project stays: others may use it.
pub async fn uninstall(args: UninstallArgs) -> anyhow::Result<()> {
    let UninstallArgs { state_dir, run_dir, cni_conf_dir, bin_dir } = args;
    reset(ResetArgs { state_dir, run_dir, cni_conf_dir: Some(cni_conf_dir), force: true }).await?;
    let shim = bin_dir.join(SHIM);
    match fs::remove_file(&shim) {
        Ok(()) => Ok(print(&format!("removed {}\n", shim.display()))?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", shim.display())),
    }
}

/// By rename: a program that runs can't be written to, and a runtime never sees half of one.
fn put(source: &Path, directory: &Path, name: &str) -> anyhow::Result<()> {
    let (temporary, target) = (directory.join(format!(".{name}.weft.tmp")), directory.join(name));
    let copy = || -> io::Result<u64> {
        let mut from = File::open(source)?;
        let mut to = File::create(&temporary)?;
        let copied = io::copy(&mut from, &mut to)?;
        to.set_permissions(fs::Permissions::from_mode(0o755))?;
        to.sync_all()?;
        Ok(copied)
    };
    let copied = copy().with_context(|| format!("copy {} to {}", source.display(), temporary.display()))?;
    ensure!(copied > 0, "{} is empty", source.display());
    fs::rename(&temporary, &target).with_context(|| format!("put {} in place", target.display()))
}

const SHIM: &str = "weft-cni";
/// What the conflist chains, and what runtimes call for `lo`.
const COMPANIONS: [&str; 3] = ["portmap", "bandwidth", "loopback"];
/// Where the image has them.
const FROM: &str = "/usr/libexec/weft/cni";
const BIN: &str = "/opt/cni/bin";
const CONF: &str = "/etc/cni/net.d";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_is_replaced_and_others_programs_are_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let (from_dir, bin_dir) = (temp.path().join("from"), temp.path().join("opt/cni/bin"));
        fs::create_dir(&from_dir).unwrap();
        for name in [SHIM].iter().chain(&COMPANIONS) {
            fs::write(from_dir.join(name), "ours").unwrap();
        }
        fs::create_dir_all(&bin_dir).unwrap();
        fs::write(bin_dir.join(SHIM), "old").unwrap();
        fs::write(bin_dir.join("portmap"), "theirs").unwrap();
        let running = File::open(bin_dir.join(SHIM)).unwrap();

        let args = InstallCniArgs { from_dir: from_dir.clone(), bin_dir: bin_dir.clone() };
        for _ in 0..2 {
            install_cni(&args).unwrap();
            let read = |name: &str| fs::read_to_string(bin_dir.join(name)).unwrap();
            assert_eq!(
                [SHIM, "portmap", "bandwidth", "loopback"].map(read),
                ["ours", "theirs", "ours", "ours"]
            );
        }
        assert_eq!(io::read_to_string(running).unwrap(), "old", "who runs it keeps it");
        let mode = fs::metadata(bin_dir.join(SHIM)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert_eq!(fs::read_dir(&bin_dir).unwrap().count(), 4, "no temporary file stays");

        fs::remove_file(from_dir.join(SHIM)).unwrap();
        let error = format!("{:#}", install_cni(&args).unwrap_err());
        assert!(error.contains("from/weft-cni"), "{error}");
    }
}
