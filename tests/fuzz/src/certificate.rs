//! Keys and certificates, of files and of seals.

use std::time::{Duration, SystemTime};
use weft::{
    identity::{Ca, Certificate, Identity, Trust},
    types::PeerName,
};

/// The first byte says what it is.
pub fn run(bytes: &[u8]) {
    let Some((what, bytes)) = bytes.split_first() else { return };
    let half = bytes.windows(SEAM.len()).position(|window| window == SEAM);
    let (first, second) = half.map_or((bytes, bytes), |at| (&bytes[..at], &bytes[at + SEAM.len()..]));
    match what {
        b'd' => {
            if let Ok(certificate) = Certificate::parse(&bytes.into()) {
                let validity = certificate.validity;
                let _ = (validity.renew_at(), validity.begin());
            }
        }
        b'b' => _ = Trust::from_pem(first, half.map(|_| second)),
        b'c' => _ = Ca::load(first, second),
        _ => {
            let Ok(trust) = Trust::from_pem(first, None) else { return };
            let name: PeerName = "node-1".parse().expect("a name");
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
            let _ = Identity::new(name, trust, first, second, now);
        }
    }
}

/// Between two files.
const SEAM: &[u8] = b"\n---\n";
/// In 2026, when the certificates among the kept inputs are valid.
const NOW: u64 = 1_795_000_000;
