//! What a leaf certificate says.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::IdentityError;
use crate::types::PeerName;
use rustls::pki_types::{CertificateDer, UnixTime};
use std::time::Duration;
use x509_parser::{extensions::GeneralName, prelude::FromDer, prelude::X509Certificate};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The nodes that it names: its DNS subject alternative names, as far as they are names of nodes.
    pub names: Vec<PeerName>,
    pub validity: Validity,
    /// The bytes of the public key.
    pub key: Vec<u8>,
}

/// From when to when, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub from: u64,
    pub until: u64,
}

impl Certificate {
    /// # Errors
    /// It is not a certificate of X.509.
    pub fn parse(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let unreadable = |error: String| IdentityError::Unreadable(error);
        let (_, parsed) = X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
        let names = parsed.subject_alternative_name().map_err(|error| unreadable(error.to_string()))?;
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let node = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(name) => name.parse().ok(),
            _ => None,
        };
        let seconds = |time: x509_parser::time::ASN1Time| time.timestamp().max(0).cast_unsigned();
        let validity = parsed.validity();
        Ok(Self {
            names: names.filter_map(node).collect(),
            validity: Validity { from: seconds(validity.not_before), until: seconds(validity.not_after) },
            key: parsed.public_key().subject_public_key.data.to_vec(),
        })
    }
}

impl Validity {
    /// When two thirds of it are over: time to renew.
    pub fn renew_at(self) -> u64 {
        self.from + self.until.saturating_sub(self.from) / 3 * 2
    }

    /// A moment at which it was valid for certain.
    pub fn begin(self) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(self.from.min(self.until)))
    }
}
