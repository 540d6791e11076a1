//! The network's CA in a Secret: empty as it ships, filled by the first agent or by somebody like cert-manager.
//!
//! ```text
//!   Secret   tls.crt      tls.key     retired.crt            (ca.crt, what signed the CA, is not looked at)
//!               ▼            ▼             ▼
//!   files    ca.crt       ca.key      retired.crt     of a directory as --ca-dir takes it, in the run directory
//! ```
//! Only the CA itself is believed, not who signed it: that may sign much that is none of ours. Of a CA that another
//! has replaced, seals still count; so that nodes that come later know it, too, it is kept in the Secret, with the moment.
//! No link ends for it, as all go the same steps and nobody shows what others do not believe yet:
//!
//! ```text
//!   replaced ── both are believed, the old one signs ──▶ both are believed, the new one signs ──▶ the new one alone
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use rustls::pki_types::{CertificateDer, pem::PemObject};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use zeroize::Zeroizing;

/// What is to lie in the directory.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Files {
    pub ca_cert: String,
    pub ca_key: Zeroizing<String>,
    /// Empty where there is none.
    pub retired: String,
}

/// What the Secret says.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    files: Files,
    /// When the last one that is retired was replaced, in seconds since 1970.
    replaced: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSecret {
    #[error("Secret {secret} has {has} but no {lacks}; fill both, or neither for the first agent to do it", secret = super::SECRET)]
    Half { has: &'static str, lacks: &'static str },
    #[error("{key} of Secret {secret} is not PEM", secret = super::SECRET)]
    NotPem { key: &'static str },
}

/// As the API has it, decoded.
pub type Data = BTreeMap<String, Vec<u8>>;

/// None where the Secret is empty.
///
/// # Errors
/// It holds something else than a CA.
pub fn read(data: &Data) -> Result<Option<Keys>, BadSecret> {
    let part = |key| data.get(key).filter(|bytes| !bytes.is_empty());
    let (cert, key) = match (part(CERT), part(KEY)) {
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(BadSecret::Half { has: CERT, lacks: KEY }),
        (None, Some(_)) => return Err(BadSecret::Half { has: KEY, lacks: CERT }),
        (Some(cert), Some(key)) => (cert, key),
    };
    let first = certificates(cert).into_iter().next().ok_or(BadSecret::NotPem { key: CERT })?;
    let key = std::str::from_utf8(key).map_err(|_| BadSecret::NotPem { key: KEY })?;
    let retired: String = part(RETIRED).map(|pem| certificates(pem)).into_iter().flatten().map(pem).collect();
    let replaced = part(REPLACED).and_then(|text| std::str::from_utf8(text).ok()?.trim().parse().ok());
    Ok(Some(Keys {
        files: Files { ca_cert: pem(first), ca_key: Zeroizing::new(key.into()), retired },
        replaced,
    }))
}

impl Keys {
    /// The CA as the Secret has it.
    pub fn ca_cert(&self) -> &str {
        &self.files.ca_cert
    }

    /// What is to lie in the directory where this lies `there`, and how long it will be right; none: from then on.
    pub fn files(&self, there: &Files, now: u64, step: Duration) -> (Files, Option<Duration>) {
        let mut files = self.files.clone();
        let Some(replaced) = self.replaced.filter(|at| *at <= now + step.as_secs()) else {
            return (files, None);
        };
        let age = Duration::from_secs(now.saturating_sub(replaced));
        let Some(old) = certificates(files.retired.as_bytes()).pop().filter(|_| age < step * 2) else {
            return (files, None);
        };
        files.ca_cert.push_str(&pem(old));
        if age >= step {
            return (files, Some(step * 2 - age));
        }
        if !there.ca_key.is_empty() {
            files.ca_key = there.ca_key.clone();
        }
        (files, Some(step - age))
    }
}

/// Fills an empty Secret.
pub fn fill(data: &mut Data, cert: &str, key: &str) {
    data.insert(CERT.into(), cert.into());
    data.insert(KEY.into(), key.into());
}

/// Notes in the Secret the CA that was in use before, if another has replaced it; false where there is nothing to note.
pub fn retire(data: &mut Data, before: &str, now: u64) -> bool {
    let certificates_of = |key| data.get(key).map(|pem| certificates(pem)).unwrap_or_default();
    let current = certificates_of(CERT).into_iter().next();
    let known: BTreeSet<Vec<u8>> = certificates_of(RETIRED).into_iter().chain(current.clone()).collect();
    let gone: Vec<_> =
        certificates(before.as_bytes()).into_iter().filter(|der| !known.contains(der)).collect();
    if gone.is_empty() || current.is_none() {
        return false;
    }
    let all: String = certificates_of(RETIRED).into_iter().chain(gone).map(pem).collect();
    data.insert(RETIRED.into(), all.into());
    data.insert(REPLACED.into(), now.to_string().into());
    true
}

/// What can be read of a bundle, in DER.
fn certificates(bundle: &[u8]) -> Vec<Vec<u8>> {
    CertificateDer::pem_slice_iter(bundle).flatten().map(|der| der.to_vec()).collect()
}

fn pem(der: Vec<u8>) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), lines)
}

const CERT: &str = "tls.crt";
const KEY: &str = "tls.key";
const RETIRED: &str = "retired.crt";
const REPLACED: &str = "replaced";

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "certificates are valid from some moment on")]
mod tests {
    use super::*;
    use crate::identity::{Ca, Issued, Trust};
    use std::time::{Duration, SystemTime};

    fn ca() -> Issued {
        Ca::create(SystemTime::now()).unwrap()
    }

    fn filled(ca: &Issued) -> Data {
        let mut data = Data::new();
        fill(&mut data, &ca.cert, &ca.key);
        data
    }

    fn settled(data: &Data) -> Files {
        let (files, changes) = read(data).unwrap().unwrap().files(&Files::default(), LATER, STEP);
        assert_eq!(changes, None);
        files
    }

    const STEP: Duration = Duration::from_secs(30);
    const MOMENT: u64 = 1_800_000_000;
    const LATER: u64 = MOMENT + 60;

    #[test]
    fn what_the_first_agent_filled_in_is_a_ca() {
        assert!(read(&Data::new()).unwrap().is_none());
        assert!(
            read(&Data::from([("tls.crt".into(), vec![]), ("tls.key".into(), vec![])])).unwrap().is_none()
        );
        let made = ca();
        let files = settled(&filled(&made));
        let ca = Ca::load(files.ca_cert.as_bytes(), files.ca_key.as_bytes()).unwrap();
        assert!(ca.issue(&"a".parse().unwrap(), Duration::from_secs(60), SystemTime::now()).is_ok());
        assert_eq!(files.retired, "");
    }

    #[test]
    fn who_signed_the_ca_is_not_believed() {
        let (made, root) = (ca(), ca());
        let mut data = filled(&made);
        data.insert("ca.crt".into(), root.cert.clone().into());
        data.get_mut("tls.crt").unwrap().extend(root.cert.as_bytes());
        let files = settled(&data);
        assert_eq!(Trust::from_pem(files.ca_cert.as_bytes(), None).unwrap().cas(), 1);
        assert!(Ca::load(files.ca_cert.as_bytes(), files.ca_key.as_bytes()).is_ok());
    }

    #[test]
    fn a_ca_that_is_replaced_is_kept_as_a_retired_one_once() {
        let (old, new) = (ca(), ca());
        let mut data = filled(&new);
        assert!(!retire(&mut data, &new.cert, MOMENT), "it is the current one");
        assert!(retire(&mut data, &old.cert, MOMENT));
        assert!(!retire(&mut data, &old.cert, LATER), "it is noted already");
        assert_eq!(certificates(settled(&data).retired.as_bytes()), certificates(old.cert.as_bytes()));
        assert!(!retire(&mut Data::new(), &old.cert, MOMENT));
    }

    #[test]
    fn nobody_shows_what_others_do_not_believe_yet() {
        let (old, new) = (ca(), ca());
        let there = settled(&filled(&old));
        let mut data = filled(&new);
        retire(&mut data, &there.ca_cert, MOMENT);
        let keys = read(&data).unwrap().unwrap();
        let at = |there: &Files, after| {
            let (files, changes) = keys.files(there, MOMENT + after, STEP);
            let signs_new = *files.ca_key == *new.key;
            Ca::load(files.ca_cert.as_bytes(), files.ca_key.as_bytes()).expect("what signs is believed");
            let believed = Trust::from_pem(files.ca_cert.as_bytes(), None).unwrap().cas();
            (believed, signs_new, changes.map(|time| time.as_secs()))
        };
        assert_eq!(at(&there, 0), (2, false, Some(30)));
        assert_eq!(at(&there, 29), (2, false, Some(1)));
        assert_eq!(at(&there, 30), (2, true, Some(30)));
        assert_eq!(at(&there, 60), (1, true, None));
        // Who comes new meanwhile has no other key; who was away learns of it when it is over.
        assert_eq!(at(&Files::default(), 5), (2, true, Some(25)));
        assert_eq!(at(&there, 1000), (1, true, None));
    }

    #[test]
    fn half_a_secret_and_nonsense_are_told() {
        let made = ca();
        let half = Data::from([("tls.crt".into(), made.cert.clone().into())]);
        let why = |data| read(&data).err().unwrap().to_string();
        assert_eq!(
            why(half),
            "Secret weft-ca has tls.crt but no tls.key; fill both, or neither for the first agent to do it"
        );
        let mut nonsense = filled(&made);
        nonsense.insert("tls.crt".into(), b"x".to_vec());
        assert_eq!(why(nonsense), "tls.crt of Secret weft-ca is not PEM");
    }
}
