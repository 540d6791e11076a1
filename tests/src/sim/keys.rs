//! Keys for the nodes of a simulation.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use weft::{
    identity::{
        Ca, Identity, Trust,
        task::{Current, State},
    },
    types::PeerName,
};

/// A CA and what it gives to the nodes of a simulation.
pub struct Keys {
    bundle: String,
    ca: Ca,
}

impl Keys {
    pub fn new() -> Self {
        let made = Ca::create(SystemTime::now()).expect("a CA");
        let ca = Ca::load(made.cert.as_bytes(), made.key.as_bytes()).expect("the CA");
        Self { bundle: made.cert, ca }
    }

    pub fn of(&self, name: &str) -> Current {
        let (name, now): (PeerName, _) = (name.parse().expect("a name"), SystemTime::now());
        let leaf = self.ca.issue(&name, VALID, now).expect("a certificate");
        let trust = Trust::from_pem(self.bundle.as_bytes(), None).expect("a bundle");
        let identity = Identity::new(name, trust, leaf.cert.as_bytes(), leaf.key.as_bytes(), now);
        let identity = Arc::new(identity.expect("an identity"));
        watch::channel(State { identity, trouble: None }).1
    }
}

impl Default for Keys {
    fn default() -> Self {
        Self::new()
    }
}

/// For as long as a simulation takes.
const VALID: Duration = Duration::from_secs(24 * 3600);
