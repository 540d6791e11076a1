//! The CAs that are believed.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{IdentityError, certificates};
use rustls::{
    RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime},
    server::ParsedCertificate,
};
use std::sync::Arc;

/// A bundle of CAs; cheap to clone.
#[derive(Clone, Debug)]
pub struct Trust {
    /// For links.
    live: Arc<RootCertStore>,
    /// For what was sealed and is kept: those of before too.
    kept: Arc<RootCertStore>,
}

impl Trust {
    /// From a bundle, and one of CAs that are retired: what was sealed under them counts, and nothing else.
    ///
    /// # Errors
    /// There is no certificate in the first, or one that cannot be read.
    pub fn from_pem(live: &[u8], retired: Option<&[u8]>) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        let unreadable = |error: rustls::Error| IdentityError::Unreadable(error.to_string());
        certificates(live)?.into_iter().try_for_each(|der| roots.add(der).map_err(unreadable))?;
        let live = Arc::new(roots.clone());
        for der in retired.map(certificates).transpose()?.unwrap_or_default() {
            roots.add(der).map_err(unreadable)?;
        }
        Ok(Self { live, kept: Arc::new(roots) })
    }

    /// Checks that a chain, the leaf first, leads to one of the CAs and is valid at that time.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn verify(&self, chain: &[CertificateDer<'_>], at: UnixTime) -> Result<(), rustls::Error> {
        verify(&self.live, chain, at)
    }

    /// The same, for a signer of something that is kept; retired CAs count.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn verify_kept(&self, chain: &[CertificateDer<'_>], at: UnixTime) -> Result<(), rustls::Error> {
        verify(&self.kept, chain, at)
    }

    /// How many CAs there are for links.
    pub fn cas(&self) -> usize {
        self.live.len()
    }

    /// Whether both are one and the same snapshot.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.kept, &other.kept)
    }
}

fn verify(roots: &RootCertStore, chain: &[CertificateDer<'_>], at: UnixTime) -> Result<(), rustls::Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
    let leaf = ParsedCertificate::try_from(leaf)?;
    verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, at, algorithms)
}
