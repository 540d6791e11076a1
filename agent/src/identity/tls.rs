//! TLS 1.3 for links: both sides show a certificate of a CA that the other believes.
//!
//! Whom a certificate names is compared with the hello that follows: who calls an address does not know beforehand whom
//! it reaches.

use super::Trust;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use std::{io, sync::Arc};

/// Both sides' settings; cheap to clone.
#[derive(Clone)]
pub struct Tls {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
}

impl Tls {
    pub(super) fn new(certified: CertifiedKey, trust: &Trust) -> Self {
        let provider: Arc<CryptoProvider> = aws_lc_rs::default_provider().into();
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Arc::new(Verifier { trust: trust.clone(), algorithms });
        let certified = Arc::new(SingleCertAndKey::from(certified));
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider speaks TLS 1.3")
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(certified.clone());
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider speaks TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(certified);
        // Each link proves itself anew: a ticket would outlive the CA that was believed when it was given.
        server.send_tls13_tickets = 0;
        client.resumption = rustls::client::Resumption::disabled();
        server.alpn_protocols = vec![ALPN.to_vec()];
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.enable_sni = false;
        Self { server: Arc::new(server), client: Arc::new(client) }
    }
}

/// Believes chains of its CAs, whomever they name.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let chain: Vec<_> = std::iter::once(leaf).chain(intermediates).cloned().collect();
        self.trust.verify(&chain, now)
    }
}

/// What both sides' verifiers do alike, in traits that have nothing in common.
macro_rules! signatures_of_tls_1_3 {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    signatures_of_tls_1_3!();
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    signatures_of_tls_1_3!();
}

/// Why TLS failed, in words for an operator, where it failed for a certificate's sake.
pub fn explain_io(error: &io::Error) -> Option<String> {
    let tls = error.get_ref()?.downcast_ref::<Error>()?;
    match tls {
        Error::InvalidCertificate(_)
        | Error::NoCertificatesPresented
        | Error::AlertReceived(_)
        | Error::InvalidMessage(_) => Some(explain(tls)),
        _ => None,
    }
}

/// The same for an error that has come through other hands as text.
pub fn explain_text(text: &str) -> String {
    let alerts = [
        AlertDescription::UnknownCA,
        AlertDescription::DecryptError,
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateRequired,
        AlertDescription::BadCertificate,
    ];
    // With a link to a manual, which says that it is an end like any other.
    if text.contains("without sending TLS close_notify") {
        return "the other end is gone".into();
    }
    let named = |alert: &AlertDescription| text.contains(&Error::AlertReceived(*alert).to_string());
    alerts.into_iter().find(named).map_or_else(|| text.into(), |alert| explain(&Error::AlertReceived(alert)))
}

pub fn explain(error: &Error) -> String {
    use CertificateError as Bad;
    let certificate = match error {
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "is of no CA that this node believes; compare --tls-ca, or ca.crt in --ca-dir, of both nodes"
                .into()
        }
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            "has expired; issue a new one, or compare the clocks".into()
        }
        Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            "is not valid yet; compare the clocks".into()
        }
        Error::InvalidCertificate(Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. }) => {
            "is not made for servers (extended key usage serverAuth)".into()
        }
        Error::InvalidCertificate(other) => format!("is not valid: {other}"),
        Error::NoCertificatesPresented => "is missing; is that agent run with --insecure?".into(),
        Error::InvalidMessage(_) => {
            return "it does not speak TLS; is that agent run with --insecure?".into();
        }
        Error::AlertReceived(alert) => {
            return format!("the other end does not accept this node's certificate: {}", alert_words(*alert));
        }
        other => return other.to_string(),
    };
    format!("the certificate {certificate}")
}

fn alert_words(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it is of no CA that is believed there; compare --tls-ca, or ca.crt in --ca-dir, of both nodes"
                .into()
        }
        AlertDescription::CertificateExpired => "it has expired".into(),
        AlertDescription::CertificateRequired => "it has got none".into(),
        other => format!("{other:?}"),
    }
}

/// HTTP/2, and nothing else, is spoken on a link (RFC 9113, §3.2).
const ALPN: &[u8] = b"h2";
