use std::fmt;

/// A node's static public key of the data plane (X25519), published in its signed peer record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataKey(pub [u8; 32]);

/// The private half of a [`DataKey`]: overwritten when dropped, never shown.
#[cfg(feature = "agent")]
#[derive(Clone)]
pub struct DataSecret(zeroize::Zeroizing<[u8; 32]>);

impl DataKey {
    /// From a record's bytes; none where they are not a key.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKey({:02x}{:02x}{:02x}{:02x}…)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

#[cfg(feature = "agent")]
impl DataSecret {
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(zeroize::Zeroizing::new(bytes))
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

#[cfg(feature = "agent")]
impl fmt::Debug for DataSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataSecret")
    }
}

#[cfg(all(test, feature = "agent"))]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_shown() {
        assert_eq!(format!("{:?}", DataSecret::new([7; 32])), "DataSecret");
        assert_eq!(format!("{:?}", DataKey([0xab; 32])), "DataKey(abababab…)");
        assert_eq!(DataKey::from_bytes(&[1; 31]), None);
    }
}
