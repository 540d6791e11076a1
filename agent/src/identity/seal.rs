//! Signatures over what is gossiped: made with the node's own key, checked by anybody who believes its CA.
//!
//! A seal carries its signer's certificate, so that it can be checked without knowing anything else. It counts for as long
//! as the CA is believed, also when the certificate has expired since (see [the module](super)).

use super::{Certificate, Trust, task::Current};
use crate::types::PeerName;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use weft_proto::mesh::Seal;

/// Signs for this node.
#[derive(Clone, Debug)]
pub struct Sealer(Current);

/// Checks the seals of others; what it has checked it remembers.
#[derive(Debug)]
pub struct Checker {
    current: Current,
    /// That what is remembered was checked by.
    trust: Trust,
    signers: BTreeMap<Hash, Arc<Signer>>,
    checked: BTreeSet<Hash>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSeal {
    #[error("its seal is missing or cannot be read")]
    Unreadable,
    #[error("its seal is of no CA that this node believes")]
    NotTrusted,
    #[error("its seal does not belong to it")]
    Forged,
}

/// Whom a certificate names, and the key that it vouches for.
#[derive(Debug)]
pub struct Signer {
    pub names: Vec<PeerName>,
    key: Vec<u8>,
}

type Hash = [u8; 32];

impl Sealer {
    pub fn new(current: Current) -> Self {
        Self(current)
    }

    /// Seals `body` as a statement of that kind.
    pub fn seal(&self, kind: &str, body: &[u8]) -> Seal {
        let identity = self.0.borrow().identity.clone();
        let signature = identity.sign(&statement(kind, body)).expect("the system has random numbers");
        Seal { certificates: identity.chain().iter().map(|der| der.to_vec()).collect(), signature }
    }
}

impl Checker {
    pub fn new(current: Current) -> Self {
        let trust = current.borrow().identity.trust().clone();
        Self { current, trust, signers: BTreeMap::new(), checked: BTreeSet::new() }
    }

    /// Who has sealed `body` as a statement of that kind.
    ///
    /// # Errors
    /// Nobody who is believed has.
    pub fn signer(&mut self, kind: &str, body: &[u8], seal: &Seal) -> Result<Arc<Signer>, BadSeal> {
        self.follow();
        let signer = self.certified(&seal.certificates)?;
        let statement = statement(kind, body);
        let of_key = seal.certificates.first().map_or(&[][..], Vec::as_slice);
        let hash = hash(&[&statement, of_key, &seal.signature]);
        if !self.checked.contains(&hash) {
            let algorithm: &dyn VerificationAlgorithm = match signer.key.len() {
                ED25519_KEY => &ED25519,
                _ => &ECDSA_P256_SHA256_ASN1,
            };
            let key = UnparsedPublicKey::new(algorithm, &signer.key);
            key.verify(&statement, &seal.signature).map_err(|_| BadSeal::Forged)?;
            remember(&mut self.checked, hash);
        }
        Ok(signer)
    }

    /// Other CAs are believed now: everything is checked anew.
    fn follow(&mut self) {
        let trust = self.current.borrow().identity.trust().clone();
        if !trust.is(&self.trust) {
            self.trust = trust;
            self.signers.clear();
            self.checked.clear();
        }
    }

    fn certified(&mut self, chain: &[Vec<u8>]) -> Result<Arc<Signer>, BadSeal> {
        if chain.is_empty() || !may_seal(chain) {
            return Err(BadSeal::Unreadable);
        }
        let hash = hash(&chain.iter().map(Vec::as_slice).collect::<Vec<_>>());
        if let Some(signer) = self.signers.get(&hash) {
            return Ok(signer.clone());
        }
        let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let Certificate { names, validity, key } =
            Certificate::parse(&chain[0]).map_err(|_| BadSeal::Unreadable)?;
        self.trust.verify_kept(&chain, validity.begin()).map_err(|_| BadSeal::NotTrusted)?;
        let signer = Arc::new(Signer { names, key });
        if self.signers.len() >= MOST {
            self.signers.clear();
        }
        self.signers.insert(hash, signer.clone());
        Ok(signer)
    }
}

impl Signer {
    pub fn is(&self, name: &PeerName) -> bool {
        self.names.contains(name)
    }
}

/// Whether others take seals with that chain. It is not part of what is sealed: whoever passes a seal on could add to it.
pub(super) fn may_seal(chain: &[impl AsRef<[u8]>]) -> bool {
    let bytes: usize = chain.iter().map(|certificate| certificate.as_ref().len()).sum();
    chain.len() <= MAX_CHAIN && bytes <= MAX_CHAIN_BYTES
}

/// What is signed: nothing that is signed for one purpose serves another.
fn statement(kind: &str, body: &[u8]) -> Vec<u8> {
    [b"weft ", kind.as_bytes(), b"\0", body].concat()
}

fn hash(parts: &[&[u8]]) -> Hash {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Forgets all when there is too much: what is in use is checked again.
fn remember(checked: &mut BTreeSet<Hash>, hash: Hash) {
    if checked.len() >= MOST {
        checked.clear();
    }
    checked.insert(hash);
}

/// Certificates of one signer: its own, and what is between that and the CA.
pub(super) const MAX_CHAIN: usize = 4;
/// Their bytes: one has about 500, and up to 2,000 if it is signed by RSA.
pub(super) const MAX_CHAIN_BYTES: usize = 3584;
/// Things that are remembered: several times what a network of a thousand nodes has.
const MOST: usize = 1 << 16;
/// Bytes of an Ed25519 key (RFC 8032, §5.1.5); an uncompressed one of P-256 has 65.
const ED25519_KEY: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Ca, Identity, Issued, task::State};
    use std::time::{Duration, SystemTime};
    use tokio::sync::watch;

    fn current(ca: &Issued, name: &str, at: SystemTime) -> Current {
        current_with(ca, None, name, at)
    }

    fn current_with(ca: &Issued, retired: Option<&Issued>, name: &str, at: SystemTime) -> Current {
        let issuer = Ca::load(ca.cert.as_bytes(), ca.key.as_bytes()).unwrap();
        let name: PeerName = name.parse().unwrap();
        let leaf = issuer.issue(&name, Duration::from_secs(60), at).unwrap();
        let (cert, key) = (leaf.cert.as_bytes(), leaf.key.as_bytes());
        let trust = Trust::from_pem(ca.cert.as_bytes(), retired.map(|ca| ca.cert.as_bytes())).unwrap();
        let identity = Arc::new(Identity::new(name, trust, cert, key, at).unwrap());
        watch::channel(State { identity, trouble: None }).1
    }

    #[test]
    fn a_seal_says_who_has_said_what() {
        let now = SystemTime::now();
        let ca = Ca::create(now).unwrap();
        let seal = Sealer::new(current(&ca, "a", now)).seal("record", b"body");
        let mut checker = Checker::new(current(&ca, "b", now));
        for _ in 0..2 {
            let signer = checker.signer("record", b"body", &seal).unwrap();
            assert!(signer.is(&"a".parse().unwrap()) && !signer.is(&"b".parse().unwrap()));
            assert_eq!(checker.signer("record", b"other", &seal).unwrap_err(), BadSeal::Forged);
            assert_eq!(checker.signer("token", b"body", &seal).unwrap_err(), BadSeal::Forged);
        }
        let other = Sealer::new(current(&ca, "c", now)).seal("record", b"body");
        let mixed = Seal { certificates: other.certificates, signature: seal.signature.clone() };
        assert_eq!(checker.signer("record", b"body", &mixed).unwrap_err(), BadSeal::Forged);
        let longer = |bytes| {
            let certificates = [seal.certificates[0].clone(), vec![0; bytes]].into();
            Seal { certificates, ..seal.clone() }
        };
        assert!(checker.signer("record", b"body", &longer(1000)).is_ok(), "one that is not needed");
        let bloated = checker.signer("record", b"body", &longer(MAX_CHAIN_BYTES)).unwrap_err();
        assert_eq!(bloated, BadSeal::Unreadable);
        let none = Seal { certificates: Vec::new(), ..seal };
        assert_eq!(checker.signer("record", b"body", &none).unwrap_err(), BadSeal::Unreadable);
        let foreign = Ca::create(now).unwrap();
        let foreign = Sealer::new(current(&foreign, "a", now)).seal("record", b"body");
        assert_eq!(checker.signer("record", b"body", &foreign).unwrap_err(), BadSeal::NotTrusted);
    }

    #[test]
    fn a_seal_outlives_its_certificate_but_not_its_ca() {
        let (then, now) = (SystemTime::now() - Duration::from_secs(86400), SystemTime::now());
        let ca = Ca::create(then).unwrap();
        let seal = Sealer::new(current(&ca, "a", then)).seal("record", b"body");
        assert!(Checker::new(current(&ca, "b", now)).signer("record", b"body", &seal).is_ok());
        let new = Ca::create(now).unwrap();
        let (sender, receiver) = watch::channel(current(&ca, "b", now).borrow().clone());
        let mut checker = Checker::new(receiver);
        assert!(checker.signer("record", b"body", &seal).is_ok());
        sender.send_replace(current(&new, "b", now).borrow().clone());
        assert_eq!(checker.signer("record", b"body", &seal).unwrap_err(), BadSeal::NotTrusted);
        // Retired, and not gone.
        sender.send_replace(current_with(&new, Some(&ca), "b", now).borrow().clone());
        assert!(checker.signer("record", b"body", &seal).is_ok());
        assert_eq!(checker.current.borrow().identity.trust().cas(), 1);
    }
}
