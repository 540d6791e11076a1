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
pub struct Trust(Arc<RootCertStore>);

impl Trust {
    /// # Errors
    /// There is no certificate in it, or one that cannot be read.
    pub fn from_pem(pem: &[u8]) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        for der in certificates(pem)? {
            roots.add(der).map_err(|error| IdentityError::Unreadable(error.to_string()))?;
        }
        Ok(Self(Arc::new(roots)))
    }

    /// Checks that a chain, the leaf first, leads to one of the CAs and is valid at that time.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn verify(&self, chain: &[CertificateDer<'_>], at: UnixTime) -> Result<(), rustls::Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &self.0,
            intermediates,
            at,
            algorithms,
        )
    }

    /// How many CAs there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether both are one and the same snapshot.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
