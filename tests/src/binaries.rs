//! The programs under test: built in release once, and where they are.
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context, bail, ensure};

use crate::claim;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    pub weft: PathBuf,
    pub weft_cni: PathBuf,
}

impl Binaries {
    /// Builds `weft` and `weft-cni`, or takes them from `WEFT_BIN_DIR`; once in a process, one process at a time.
    pub fn get() -> anyhow::Result<&'static Self> {
        static BUILT: OnceLock<Result<Binaries, String>> = OnceLock::new();
        let built = BUILT.get_or_init(|| {
            match env::var_os("WEFT_BIN_DIR") {
                Some(directory) => Self::in_directory(Path::new(&directory)),
                None => Self::build(),
            }
            .map_err(|error| format!("{error:#}"))
        });
        built.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
    }

    /// Where the shim is: what a runtime calls its plugin directory.
    pub fn directory(&self) -> &Path {
        self.weft_cni.parent().expect("a file lies in a directory")
    }

    /// The shim as the image has it: static, as it runs on nodes with whatever C library they have.
    pub fn static_shim() -> anyhow::Result<PathBuf> {
        let _one_at_a_time = build_lock()?;
        let mut cargo = cargo();
        cargo.args([
            "build",
            "--release",
            "--package",
            "weft-cni",
            "--message-format=json-render-diagnostics",
        ]);
        // With a target given, the flag is not for what runs while building.
        cargo.args(["--target", &format!("{}-unknown-linux-gnu", env::consts::ARCH)]);
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static").stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = cargo.output().context("run cargo")?;
        ensure!(output.status.success(), "building a static weft-cni failed: see above");
        executable(&String::from_utf8_lossy(&output.stdout), "weft-cni")
    }

    fn in_directory(directory: &Path) -> anyhow::Result<Self> {
        let path = |name: &str| {
            fs::canonicalize(directory.join(name))
                .with_context(|| format!("WEFT_BIN_DIR is {}, which has no {name}", directory.display()))
        };
        Ok(Self { weft: path("weft")?, weft_cni: path("weft-cni")? })
    }

    /// One call for all, so that what they share is compiled once and with the same features as for `cargo lab`; the
    /// linker drops what the shim does not use.
    fn build() -> anyhow::Result<Self> {
        let _one_at_a_time = build_lock()?;
        let mut cargo = cargo();
        cargo.args(["build", "--release", "--bins"]);
        cargo.args(["--package", "weft", "--package", "weft-cni", "--package", "weft-lab"]);
        cargo.arg("--message-format=json-render-diagnostics").stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = cargo.output().context("run cargo (set WEFT_BIN_DIR to use binaries that exist)")?;
        if !output.status.success() {
            bail!("building weft and weft-cni failed: see above");
        }
        let artifacts = String::from_utf8_lossy(&output.stdout);
        Ok(Self { weft: executable(&artifacts, "weft")?, weft_cni: executable(&artifacts, "weft-cni")? })
    }
}

fn build_lock() -> anyhow::Result<impl Sized> {
    fs::create_dir_all(claim::base()).context("create the labs' directory")?;
    claim::lock(&claim::base().join("build"))
}

/// Cargo in the workspace, as if it were not called from one of its own children.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above"));
    // Its variables about *this* package would make other packages' build scripts run again.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_about_a_package) {
            cargo.env_remove(&name);
        }
    }
    cargo
}

fn is_about_a_package(name: &str) -> bool {
    [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_PRIMARY_",
        "CARGO_RUSTC_CURRENT_DIR",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
        || name == "OUT_DIR"
}

/// Finds the path of a built binary in cargo's messages, one JSON document a line.
fn executable(messages: &str, name: &str) -> anyhow::Result<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let path = |message: serde_json::Value| {
        let is_it = message["target"]["name"] == name && message["target"]["kind"][0] == "bin";
        if is_it { message["executable"].as_str().map(PathBuf::from) } else { None }
    };
    messages.into_iter().find_map(path).with_context(|| format!("cargo did not say where it put {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binary_is_found_among_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"weft"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"weft"},"executable":"/t/release/weft"}"#;
        assert_eq!(executable(messages, "weft").unwrap(), Path::new("/t/release/weft"));
        assert!(executable(messages, "weft-cni").is_err());
    }

    #[test]
    fn only_variables_about_a_package_are_kept_from_the_build() {
        assert!(is_about_a_package("CARGO_PKG_VERSION_MAJOR"));
        assert!(!is_about_a_package("CARGO_HOME"));
        assert!(!is_about_a_package("CARGO_TARGET_DIR"));
    }
}
