//! A lab's keys: a CA of its own, and certificates for whoever is to have one.
use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use weft::identity::{
    Ca, Identity, Issued, Trust,
    task::{CA_CERT, CA_KEY},
};

/// Makes a CA as `weft ca init` does.
pub fn make_ca(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let Issued { cert, key } = Ca::create(SystemTime::now())?;
    write(&dir.join(CA_CERT), &cert)?;
    write(&dir.join(CA_KEY), &key)
}

/// A certificate of the directory's CA: `NAME.crt` and `NAME.key` in it.
pub fn issue(dir: &Path, name: &str, lifetime: Duration) -> anyhow::Result<()> {
    let Issued { cert, key } = issued(dir, name, lifetime, SystemTime::now())?;
    write(&dir.join(format!("{name}.key")), &key)?;
    write(&dir.join(format!("{name}.crt")), &cert)
}

/// Somebody with a valid certificate, who is no agent.
pub fn identity(dir: &Path, name: &str) -> anyhow::Result<Identity> {
    identity_of(dir, name, Duration::from_secs(3600), SystemTime::now())
}

/// Somebody whose certificate has expired.
pub fn expired_identity(dir: &Path, name: &str) -> anyhow::Result<Identity> {
    identity_of(dir, name, Duration::from_secs(1), SystemTime::now() - Duration::from_secs(60))
}

fn identity_of(dir: &Path, name: &str, lifetime: Duration, now: SystemTime) -> anyhow::Result<Identity> {
    let Issued { cert, key } = issued(dir, name, lifetime, now)?;
    let trust = Trust::from_pem(&read(&dir.join(CA_CERT))?, None)?;
    Ok(Identity::new(name.parse()?, trust, cert.as_bytes(), key.as_bytes(), now)?)
}

fn issued(dir: &Path, name: &str, lifetime: Duration, now: SystemTime) -> anyhow::Result<Issued> {
    let ca = Ca::load(&read(&dir.join(CA_CERT))?, &read(&dir.join(CA_KEY))?)?;
    Ok(ca.issue(&name.parse()?, lifetime, now)?)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// As `mv` does: agents see the old file or the new one.
pub fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let new = path.with_extension("new");
    fs::write(&new, text).with_context(|| format!("write {}", new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path).with_context(|| format!("replace {}", path.display()))
}
