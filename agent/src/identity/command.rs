//! `weft ca`: makes a CA, and certificates for nodes.

use super::{
    Ca, Issued,
    task::{CA_CERT, CA_KEY},
};
use crate::types::PeerName;
use anyhow::{Context, bail};
use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use zeroize::Zeroizing;

/// Certificates for the nodes
#[derive(Debug, clap::Subcommand)]
pub enum CaCommand {
    /// Make a new CA: ca.crt, and ca.key, with which anybody can make certificates of any node
    ///
    /// One CA stands for one network. Either every node gets the directory (`weft agent --ca-dir DIR`) and issues its own
    /// certificate, or ca.key stays here and each node gets what `weft ca issue` makes.
    Init {
        /// Directory to make it in; there must be no CA in it
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Make a certificate and a key for a node: NODE.crt and NODE.key
    ///
    /// On the node: `weft agent --tls-ca ca.crt --tls-cert NODE.crt --tls-key NODE.key`. Certificates are replaced while the
    /// agent runs.
    Issue {
        /// The node's name, as its agent's --name
        #[arg(value_name = "NODE")]
        node: String,
        /// Directory of the CA
        #[arg(long, env = "WEFT_CA_DIR", hide_env_values = true, value_name = "DIR")]
        ca_dir: PathBuf,
        /// Directory to write to
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
        /// Days from now until it expires
        #[arg(long, value_name = "COUNT", default_value = "365", value_parser = clap::value_parser!(u16).range(1..))]
        days: u16,
    },
}

impl CaCommand {
    /// Does it, and tells what was made.
    ///
    /// # Errors
    /// What failed, on which file; what is there is never overwritten, but a node's own certificate and key.
    pub fn run(self) -> anyhow::Result<String> {
        match self {
            Self::Init { dir } => init(&dir),
            Self::Issue { node, ca_dir, out, days } => issue(&node, &ca_dir, &out, days),
        }
    }
}

fn init(dir: &Path) -> anyhow::Result<String> {
    let (cert, key) = (dir.join(CA_CERT), dir.join(CA_KEY));
    for path in [&cert, &key] {
        if path.try_exists().with_context(|| format!("look for {}", path.display()))? {
            bail!("{} is there already; choose another directory", path.display());
        }
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("make {}", dir.display()))?;
    let Issued { cert: cert_pem, key: key_pem } = Ca::create(SystemTime::now())?;
    write(&key, key_pem.as_bytes(), 0o600)?;
    write(&cert, cert_pem.as_bytes(), 0o644)?;
    Ok(format!(
        "made {} and {}\nnext: `weft ca issue NODE --ca-dir {dir}` for each node, or `weft agent --ca-dir` with a copy of \
         {dir} on each\n",
        cert.display(),
        key.display(),
        dir = dir.display()
    ))
}

fn issue(node: &str, ca_dir: &Path, out: &Path, days: u16) -> anyhow::Result<String> {
    let node: PeerName = node.parse()?;
    let read = |name: &str| {
        let path = ca_dir.join(name);
        let hint = "--ca-dir must be a directory that `weft ca init` has made";
        fs::read(&path).map(Zeroizing::new).with_context(|| format!("read {}; {hint}", path.display()))
    };
    let ca = Ca::load(&read(CA_CERT)?, &read(CA_KEY)?).with_context(|| ca_dir.display().to_string())?;
    let lifetime = Duration::from_secs(u64::from(days) * 24 * 3600);
    let Issued { cert: cert_pem, key: key_pem } = ca.issue(&node, lifetime, SystemTime::now())?;
    let (cert, key) = (out.join(format!("{node}.crt")), out.join(format!("{node}.key")));
    write(&key, key_pem.as_bytes(), 0o600)?;
    write(&cert, cert_pem.as_bytes(), 0o644)?;
    Ok(format!(
        "made {} and {}, for {days} days\non {node}: `weft agent --tls-ca {} --tls-cert {} --tls-key {}`\n",
        cert.display(),
        key.display(),
        ca_dir.join(CA_CERT).display(),
        cert.display(),
        key.display()
    ))
}

/// Never half there: written under another name, then renamed.
fn write(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn issue_in(dir: &Path, node: &str) -> Result<String, String> {
        issue(node, dir, dir, 30).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn a_ca_and_its_certificates_are_made_for_their_owner_only() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let at = |text: &str| text.replace(dir.to_str().unwrap(), "DIR");
        insta::assert_snapshot!(at(&init(&dir).unwrap()), @r"
        made DIR/ca.crt and DIR/ca.key
        next: `weft ca issue NODE --ca-dir DIR` for each node, or `weft agent --ca-dir` with a copy of DIR on each
        ");
        insta::assert_snapshot!(at(&issue_in(&dir, "Node-1").unwrap()), @r"
        made DIR/node-1.crt and DIR/node-1.key, for 30 days
        on node-1: `weft agent --tls-ca DIR/ca.crt --tls-cert DIR/node-1.crt --tls-key DIR/node-1.key`
        ");
        let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!([mode("ca.key"), mode("node-1.key"), mode("")], [0o600, 0o600, 0o700]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 4);
        issue_in(&dir, "node-1").expect("a certificate is renewed in place");
    }

    #[test]
    fn what_is_there_or_missing_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("ca");
        let at = |text: String| text.replace(temp.path().to_str().unwrap(), "TMP");
        insta::assert_snapshot!(at(issue_in(&dir, "a").unwrap_err()), @"read TMP/ca/ca.crt; --ca-dir must be a directory that `weft ca init` has made: No such file or directory (os error 2)");
        init(&dir).unwrap();
        insta::assert_snapshot!(at(format!("{:#}", init(&dir).unwrap_err())), @"TMP/ca/ca.crt is there already; choose another directory");
        insta::assert_snapshot!(at(issue_in(&dir, "a b").unwrap_err()), @"`a b` is not a node name: 1 to 253 letters, digits, `-`, `.` or `_`, beginning and ending with a letter or digit");
        fs::write(dir.join("ca.key"), "x").unwrap();
        insta::assert_snapshot!(at(issue_in(&dir, "a").unwrap_err()), @"TMP/ca: the private key is neither ECDSA P-256 nor Ed25519, in PKCS#8 or SEC1");
    }
}
