//! A certificate authority: makes itself, and certificates for nodes.

use super::{Certificate, IdentityError, certificates};
use crate::types::PeerName;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

/// A CA that can sign.
pub struct Ca(Issuer<'static, KeyPair>);

/// A certificate and its key, both in PEM. The key is overwritten when dropped.
pub struct Issued {
    pub cert: String,
    pub key: Zeroizing<String>,
}

impl Ca {
    /// A new CA, valid from an hour ago (clocks differ) for ten years.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn create(now: SystemTime) -> Result<Issued, IdentityError> {
        let key = KeyPair::generate().map_err(not_issued)?;
        let mut params = CertificateParams::default();
        // A name of its own, so that two CAs of a cluster are told apart.
        let name = key.public_key_raw().iter().rev().take(4).map(|byte| format!("{byte:02x}"));
        params.distinguished_name.push(DnType::CommonName, format!("Weft CA {}", name.collect::<String>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = ((now - SKEW).into(), (now + CA_LIFETIME).into());
        let cert = params.self_signed(&key).map_err(not_issued)?;
        Ok(Issued { cert: cert.pem(), key: Zeroizing::new(key.serialize_pem()) })
    }

    /// From a bundle of CAs and the key of one of them.
    ///
    /// # Errors
    /// The key is of none of them, or something cannot be read.
    pub fn load(bundle: &[u8], key: &[u8]) -> Result<Self, IdentityError> {
        let key = std::str::from_utf8(key).ok().and_then(|pem| KeyPair::from_pem(pem).ok());
        let key = key.ok_or(IdentityError::UnknownKey)?;
        let of_key = |der: &CertificateDer<'_>| {
            let parsed = x509_parser::parse_x509_certificate(der).ok();
            parsed
                .is_some_and(|(_, cert)| *cert.public_key().subject_public_key.data == *key.public_key_raw())
        };
        let cert = certificates(bundle)?.into_iter().find(of_key).ok_or(IdentityError::NoCaOfKey)?;
        Ok(Self(Issuer::from_ca_cert_der(&cert, key).map_err(not_issued)?))
    }

    /// A certificate for a node, valid from an hour ago (clocks differ) for so long from now, with a new key.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn issue(
        &self,
        node: &PeerName,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, IdentityError> {
        let key = KeyPair::generate().map_err(not_issued)?;
        let mut params = CertificateParams::default();
        let short: String = node.as_str().chars().take(MAX_COMMON_NAME).collect();
        params.distinguished_name.push(DnType::CommonName, short);
        params.subject_alt_names = vec![SanType::DnsName(node.as_str().try_into().map_err(not_issued)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = ((now - SKEW).into(), (now + lifetime).into());
        let cert = params.signed_by(&key, &self.0).map_err(not_issued)?;
        debug_assert!(Certificate::parse(cert.der()).is_ok_and(|cert| cert.names.contains(node)));
        Ok(Issued { cert: cert.pem(), key: Zeroizing::new(key.serialize_pem()) })
    }
}

fn not_issued(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::NotIssued(error.to_string())
}

/// Clocks of nodes may differ by that much.
pub const SKEW: Duration = Duration::from_secs(3600);
const CA_LIFETIME: Duration = Duration::from_secs(3652 * 24 * 3600);
/// Characters of a common name (RFC 5280, appendix A.1, `ub-common-name`).
const MAX_COMMON_NAME: usize = 64;
