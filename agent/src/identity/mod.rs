//! Who this node is, and whom it believes: certificates, keys, signatures.
//!
//! ```text
//!   weft ca init ──▶ ca.crt, ca.key ──▶ weft ca issue NODE ──▶ NODE.crt, NODE.key
//!                       │ --ca-dir                                │ --tls-ca --tls-cert --tls-key
//!                       ▼                                         ▼
//!                     task: load, watch, renew ──watch──▶ Identity ─┬─▶ TLS of the mesh's links
//!                                                                   └─▶ signatures of records and tokens
//! ```
//! One CA stands for one cluster; a leaf certificate names its node in a DNS subject alternative name. The file of CAs is
//! a bundle: as long as an old and a new CA are both in it, nodes of either are believed.
//!
//! Links need a certificate that is valid now. A signature on something that is kept (a record, a token) counts for as
//! long as its CA is believed: it was made while its certificate was valid, and who is offline cannot renew it. Of a CA
//! that is retired only such signatures count.

mod ca;
mod certificate;
pub mod command;
mod seal;
pub mod task;
mod tls;
mod trust;

pub use ca::{Ca, Issued};
pub use certificate::{Certificate, Validity};
pub use seal::{BadSeal, Checker, Sealer, Signer};
pub use tls::{Tls, explain, explain_io, explain_text};
pub use trust::Trust;

use crate::types::{DataKey, DataSecret, PeerName};
use aws_lc_rs::agreement::{PrivateKey, X25519};
use rustls::{
    SignatureScheme,
    crypto::aws_lc_rs::sign::{any_ecdsa_type, any_eddsa_type},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    sign::{CertifiedKey, SigningKey},
};
use seal::{MAX_CHAIN, MAX_CHAIN_BYTES, may_seal};
use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use zeroize::Zeroize;

/// Where keys and certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Made elsewhere, and renewed there.
    Files { ca: PathBuf, cert: PathBuf, key: PathBuf, retired: Option<PathBuf> },
    /// A directory of `ca.crt`, `ca.key` and maybe `retired.crt`: the agent issues its own certificate and keeps it in
    /// memory.
    CaDir(PathBuf),
}

/// To seal what only operators may say: by a certificate of theirs, or with the CA's key.
///
/// # Errors
/// What is wrong with which of the files.
pub fn operator(source: Source) -> anyhow::Result<Sealer> {
    let name = OPERATOR.parse().expect("it is a name");
    let (_, current) = task::Keeper::new(name, source, OPERATOR_FOR)?;
    Ok(Sealer::new(current))
}

/// Whose certificate says what only operators may say. No node can have that name.
pub const OPERATOR: &str = "weft-operator";
/// The certificate for one statement: it counts as long as the CA does.
const OPERATOR_FOR: Duration = Duration::from_secs(600);

/// What a node proves itself with and whom it believes, at one moment.
pub struct Identity {
    name: PeerName,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
    validity: Validity,
    trust: Trust,
    tls: Tls,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("there is no {0} in it, in PEM")]
    NotPem(&'static str),
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("the private key is neither ECDSA P-256 nor Ed25519, in PKCS#8 or SEC1")]
    UnknownKey,
    #[error("the private key does not belong to the certificate")]
    AnotherKey,
    #[error(
        "the certificate names {}, not this node, {name}; issue one with `weft ca issue {name}`",
        shown(names)
    )]
    AnotherName { name: PeerName, names: Vec<PeerName> },
    #[error(
        "the certificate, with those between it and the CA, is too long for signatures: {MAX_CHAIN} certificates of \
         {MAX_CHAIN_BYTES} bytes in all at most; leave the CA's own out"
    )]
    TooLong,
    #[error("{0}")]
    NotTrusted(String),
    #[error("ca.key belongs to none of the certificates in ca.crt")]
    NoCaOfKey,
    #[error("{0}")]
    NotIssued(String),
}

impl Identity {
    /// From PEM texts, as they must be for links to work; `trust` is whom to believe.
    ///
    /// # Errors
    /// What is wrong with which of them; peers would refuse it for the same reason.
    pub fn new(
        name: PeerName,
        trust: Trust,
        cert: &[u8],
        key: &[u8],
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        let chain = certificates(cert)?;
        let key = signing_key(key)?;
        let Certificate { names, validity, .. } = Certificate::parse(&chain[0])?;
        if !may_seal(&chain) {
            return Err(IdentityError::TooLong);
        }
        if !names.contains(&name) {
            return Err(IdentityError::AnotherName { name, names });
        }
        let certified = CertifiedKey::new(chain.clone(), key.clone());
        certified.keys_match().map_err(|_| IdentityError::AnotherKey)?;
        trust.verify(&chain, now).map_err(|error| IdentityError::NotTrusted(tls::explain(&error)))?;
        let tls = Tls::new(certified, &trust);
        Ok(Self { name, chain, key, validity, trust, tls })
    }

    pub fn name(&self) -> &PeerName {
        &self.name
    }

    /// Of the leaf certificate.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    pub fn tls(&self) -> &Tls {
        &self.tls
    }

    fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let signer = self.key.choose_scheme(&SCHEMES).expect("only such keys are loaded");
        signer.sign(message)
    }
}

/// Without anything of the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name)
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}

/// The public half of a data plane's key.
pub fn data_key(secret: &DataSecret) -> DataKey {
    let private = PrivateKey::from_private_key(&X25519, secret.bytes()).expect("any 32 bytes are a key");
    let public = private.compute_public_key().expect("a private key has a public half");
    DataKey::from_bytes(public.as_ref()).expect("public keys of X25519 have 32 bytes")
}

/// At least one.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| IdentityError::Unreadable(error.to_string()))?;
    (!found.is_empty()).then_some(found).ok_or(IdentityError::NotPem("certificate"))
}

fn signing_key(pem: &[u8]) -> Result<Arc<dyn SigningKey>, IdentityError> {
    let mut der = PrivateKeyDer::from_pem_slice(pem).map_err(|_| IdentityError::NotPem("private key"))?;
    let key = any_ecdsa_type(&der).or_else(|error| match &der {
        PrivateKeyDer::Pkcs8(der) => any_eddsa_type(der),
        _ => Err(error),
    });
    der.zeroize();
    key.ok().filter(|key| key.choose_scheme(&SCHEMES).is_some()).ok_or(IdentityError::UnknownKey)
}

fn shown(names: &[PeerName]) -> String {
    let names: Vec<_> = names.iter().map(PeerName::as_str).collect();
    if names.is_empty() { "nobody".into() } else { names.join(", ") }
}

const SCHEMES: [SignatureScheme; 2] = [SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519];

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
