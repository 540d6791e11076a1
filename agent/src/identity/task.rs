//! Loads keys, watches their files, renews what the agent has issued itself.
//!
//! What cannot be loaded changes nothing: the keys from before stay in use, and [`State::trouble`] says why.

use super::{Ca, Identity, IdentityError, Issued, Source, Trust};
use crate::{linux::inotify::Watch, types::PeerName};
use anyhow::{Context, anyhow};
use aws_lc_rs::digest::{SHA256, digest};
use futures_util::future::select_all;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{sync::watch, time::sleep};
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

/// What there is now.
#[derive(Clone, Debug)]
pub struct State {
    pub identity: Arc<Identity>,
    /// Why the files as they are now are not in use.
    pub trouble: Option<String>,
}

/// To be read at any time; it changes when keys do.
pub type Current = watch::Receiver<State>;

/// Loads the keys once, and again whenever their files change.
pub struct Keeper {
    loader: Loader,
    watches: Vec<Watch>,
    current: watch::Sender<State>,
}

struct Loader {
    name: PeerName,
    source: Source,
    /// Of certificates that the agent issues itself.
    lifetime: Duration,
    /// Of the files that the identity was made from: their keys are not kept.
    files: Option<Fingerprint>,
    /// When what the agent has issued itself is to be renewed, in seconds since 1970.
    renew_at: Option<u64>,
}

#[derive(PartialEq)]
struct Fingerprint(Vec<Vec<u8>>);

/// Waits for other keys; for ever where there are none, or none to come.
pub async fn changed(current: &mut Option<Current>) {
    if let Some(current) = current
        && current.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

impl State {
    /// What a person should look at.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        let mut warnings: Vec<_> = self.trouble.iter().cloned().collect();
        let (validity, now) = (self.identity.validity(), seconds(now));
        if now >= validity.until {
            warnings.push("this node's certificate has expired: peers refuse new links; renew it".into());
        } else if now >= validity.until - (validity.until - validity.renew_at()) / 2 {
            let hours = (validity.until - now) / 3600;
            warnings.push(format!("this node's certificate expires in {hours} hours; renew it"));
        }
        warnings
    }
}

impl Keeper {
    /// Needs a tokio runtime.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn new(name: PeerName, source: Source, lifetime: Duration) -> anyhow::Result<(Self, Current)> {
        let mut loader = Loader { name, source, lifetime, files: None, renew_at: None };
        // Before the files are read, or a change in between would be missed.
        let watches = loader.directories().iter().filter_map(|dir| watched(dir)).collect();
        let identity = loader.load(SystemTime::now())?.context("the first load always loads")?;
        loader.complain_of_modes();
        let (current, receiver) = watch::channel(State { identity: Arc::new(identity), trouble: None });
        Ok((Self { loader, watches, current }, receiver))
    }

    /// Until nobody reads any more.
    pub async fn run(mut self) {
        loop {
            let renewal = self.loader.renew_at.map(|at| at.saturating_sub(seconds(SystemTime::now())).max(1));
            let pause = renewal.map_or(LOOK_AGAIN, Duration::from_secs).min(LOOK_AGAIN);
            let changed = async {
                match self.watches.is_empty() {
                    true => std::future::pending().await,
                    false => select_all(self.watches.iter().map(|watch| Box::pin(watch.changed()))).await.0,
                }
            };
            tokio::select! {
                // Files that belong together change one after the other.
                Ok(()) = changed => sleep(SETTLE).await,
                () = sleep(pause) => {}
                () = self.current.closed() => return,
            }
            self.reload(SystemTime::now());
        }
    }

    fn reload(&mut self, now: SystemTime) {
        match self.loader.load(now) {
            Ok(Some(identity)) => {
                info!(
                    until = identity.validity().until,
                    cas = identity.trust().cas(),
                    "keys and certificates are loaded anew"
                );
                self.current.send_replace(State { identity: Arc::new(identity), trouble: None });
            }
            Ok(None) => self.note(None),
            Err(error) => {
                self.note(Some(format!("keys are not loaded anew, those from before stay in use: {error:#}")))
            }
        }
    }

    fn note(&self, trouble: Option<String>) {
        self.current.send_if_modified(|state| {
            let changed = state.trouble != trouble;
            if changed && let Some(trouble) = &trouble {
                warn!("{trouble}");
            }
            state.trouble = trouble;
            changed
        });
    }
}

impl Loader {
    /// None where nothing has changed and nothing is due.
    fn load(&mut self, now: SystemTime) -> anyhow::Result<Option<Identity>> {
        let mut files: Vec<_> = self.paths().iter().map(|path| read(path)).collect::<anyhow::Result<_>>()?;
        files.push(
            self.retired()
                .filter(|path| path.exists())
                .map(|path| read(&path))
                .transpose()?
                .unwrap_or_default(),
        );
        let fingerprint = Fingerprint::of(&files);
        let due = self.renew_at.is_some_and(|at| at <= seconds(now));
        if !due && self.files.as_ref() == Some(&fingerprint) {
            return Ok(None);
        }
        let identity = match (&self.source, &files[..]) {
            (Source::Files { ca, cert, key, .. }, [ca_pem, cert_pem, key_pem, retired]) => {
                let trust = Trust::from_pem(ca_pem, some(retired));
                let trust = trust.with_context(|| format!("--tls-ca {}", ca.display()))?;
                let identity = Identity::new(self.name.clone(), trust, cert_pem, key_pem, now);
                identity.map_err(|error| blame(error, ca, cert, key))?
            }
            (Source::CaDir(dir), [ca_pem, key_pem, retired]) => {
                let at = || format!("--ca-dir {}", dir.display());
                let ca = Ca::load(ca_pem, key_pem).with_context(at)?;
                let Issued { cert, key } = ca.issue(&self.name, self.lifetime, now).with_context(at)?;
                let trust = Trust::from_pem(ca_pem, some(retired)).with_context(at)?;
                Identity::new(self.name.clone(), trust, cert.as_bytes(), key.as_bytes(), now)
                    .with_context(at)?
            }
            _ => unreachable!("as many files as paths"),
        };
        self.renew_at = matches!(self.source, Source::CaDir(_)).then(|| identity.validity().renew_at());
        self.files = Some(fingerprint);
        Ok(Some(identity))
    }

    fn paths(&self) -> Vec<PathBuf> {
        match &self.source {
            Source::Files { ca, cert, key, .. } => vec![ca.clone(), cert.clone(), key.clone()],
            Source::CaDir(dir) => vec![dir.join(CA_CERT), dir.join(CA_KEY)],
        }
    }

    /// Need not be there.
    fn retired(&self) -> Option<PathBuf> {
        match &self.source {
            Source::Files { retired, .. } => retired.clone(),
            Source::CaDir(dir) => Some(dir.join(RETIRED_CERT)),
        }
    }

    fn directories(&self) -> BTreeSet<PathBuf> {
        let parent = |path: &PathBuf| path.parent().map(Path::to_path_buf);
        self.paths().iter().chain(&self.retired()).filter_map(parent).collect()
    }

    fn complain_of_modes(&self) {
        let Some(key) = self.paths().pop() else { return };
        let mode = fs::metadata(&key).map_or(0, |meta| meta.permissions().mode());
        if mode & 0o077 != 0 {
            warn!(file = %key.display(), mode = format!("{:o}", mode & 0o777), "others can read this private key; chmod 600 it");
        }
    }
}

/// Says which of the files an error is about.
fn blame(error: IdentityError, ca: &Path, cert: &Path, key: &Path) -> anyhow::Error {
    let flag = match &error {
        IdentityError::NotPem("private key") | IdentityError::UnknownKey | IdentityError::AnotherKey => {
            format!("--tls-key {}", key.display())
        }
        IdentityError::NotTrusted(_) => format!("--tls-cert {} by --tls-ca {}", cert.display(), ca.display()),
        _ => format!("--tls-cert {}", cert.display()),
    };
    anyhow!(error).context(flag)
}

impl Fingerprint {
    fn of(files: &[Zeroizing<Vec<u8>>]) -> Self {
        Self(files.iter().map(|file| digest(&SHA256, file).as_ref().to_vec()).collect())
    }
}

fn read(path: &Path) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    let hint = "make one with `weft ca init`, or with `weft ca issue`";
    fs::read(path).map(Zeroizing::new).with_context(|| format!("read {}; {hint}", path.display()))
}

fn some(bytes: &[u8]) -> Option<&[u8]> {
    (!bytes.is_empty()).then_some(bytes)
}

fn watched(directory: &Path) -> Option<Watch> {
    Watch::contents(directory)
        .inspect_err(|error| debug!(directory = %directory.display(), %error, "not watched; it is looked at now and then"))
        .ok()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// In a CA's directory: a bundle of certificates, and the key of one of them.
pub const CA_CERT: &str = "ca.crt";
pub const CA_KEY: &str = "ca.key";
/// In the same directory, if there is one: CAs of before, of which only what was sealed and is kept counts.
pub const RETIRED_CERT: &str = "retired.crt";
/// Of certificates that an agent issues itself: short, as nobody has to do anything for the next one.
pub const OWN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Files on mounts that tell of no changes are looked at that often.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    fn write(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn ca_dir(dir: &Path) -> Source {
        let made = Ca::create(SystemTime::now()).unwrap();
        write(&dir.join(CA_CERT), &made.cert);
        write(&dir.join(CA_KEY), &made.key);
        Source::CaDir(dir.into())
    }

    fn keeper(source: &Source, lifetime: Duration) -> anyhow::Result<(Keeper, Current)> {
        Keeper::new("a".parse().unwrap(), source.clone(), lifetime)
    }

    async fn next(current: &mut Current) -> State {
        timeout(Duration::from_secs(10), current.changed()).await.expect("nothing changes").unwrap();
        current.borrow_and_update().clone()
    }

    #[tokio::test]
    async fn an_agent_renews_what_it_has_issued_before_it_ends() {
        let temp = tempfile::tempdir().unwrap();
        // Two thirds of its whole life, of which an hour is over, end a moment from now.
        let lifetime = Duration::from_secs(1802);
        let (keeper, mut current) = keeper(&ca_dir(temp.path()), lifetime).unwrap();
        let first = current.borrow_and_update().identity.validity();
        let _running = tokio::spawn(keeper.run());
        let second = next(&mut current).await.identity.validity();
        assert!(second.from > first.from && second.until > first.until);
    }

    #[tokio::test]
    async fn changed_files_are_taken_up_and_bad_ones_told_of() {
        let temp = tempfile::tempdir().unwrap();
        let source = ca_dir(temp.path());
        let (keeper, mut current) = keeper(&source, OWN_LIFETIME).unwrap();
        let _running = tokio::spawn(keeper.run());
        let good = fs::read_to_string(temp.path().join(CA_CERT)).unwrap();
        write(&temp.path().join(CA_CERT), "nonsense");
        let state = next(&mut current).await;
        let trouble = state.trouble.clone().unwrap();
        assert!(
            trouble.contains("those from before stay in use") && trouble.contains("no certificate"),
            "{trouble}"
        );
        assert_eq!(state.warnings(SystemTime::now()), [trouble]);
        let more = Ca::create(SystemTime::now()).unwrap().cert;
        let new = temp.path().join("new");
        write(&new, &format!("{good}{more}"));
        fs::rename(&new, temp.path().join(CA_CERT)).unwrap();
        let state = next(&mut current).await;
        assert_eq!((state.trouble, state.identity.trust().cas()), (None, 2));
    }

    #[tokio::test]
    async fn files_of_others_are_taken_up_when_they_are_renewed() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        let made = Ca::create(SystemTime::now()).unwrap();
        let ca = Ca::load(made.cert.as_bytes(), made.key.as_bytes()).unwrap();
        let issue = |hours: u64| {
            let issued =
                ca.issue(&"a".parse().unwrap(), Duration::from_secs(3600 * hours), SystemTime::now());
            let Issued { cert, key } = issued.unwrap();
            write(&path("tls.key"), &key);
            write(&path("tls.crt"), &cert);
        };
        write(&path("ca.crt"), &made.cert);
        let source =
            Source::Files { ca: path("ca.crt"), cert: path("tls.crt"), key: path("tls.key"), retired: None };
        let refused = |source: &Source| format!("{:#}", keeper(source, OWN_LIFETIME).err().unwrap());
        assert!(refused(&source).contains("tls.crt") && refused(&source).contains("weft ca issue"));
        issue(1);
        let (keeper, mut current) = keeper(&source, OWN_LIFETIME).unwrap();
        let first = current.borrow_and_update().identity.validity();
        let soon = SystemTime::now() + Duration::from_secs(3000);
        let warned = current.borrow().warnings(soon);
        assert!(warned[0].contains("expires in 0 hours"), "{warned:?}");
        let _running = tokio::spawn(keeper.run());
        issue(100);
        let second = next(&mut current).await.identity.validity();
        assert!(second.until > first.until);
        write(&path("tls.key"), &made.key);
        assert!(refused(&source).contains("--tls-key") && refused(&source).contains("does not belong"));
    }
}
