//! Which CNI versions we speak, and what each has.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::failure::{Failure, code};
use std::str::FromStr;

/// A version that we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub const NEWEST: Self = Self::V1_1_0;

    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    pub fn has_gc_and_status(self) -> bool {
        self >= Self::V1_1_0
    }

    /// `ips[].version` is "4" or "6".
    pub fn ips_have_version(self) -> bool {
        self < Self::V1_0_0
    }

    /// `dns`, also where there is nothing to say.
    pub fn results_have_dns(self) -> bool {
        self < Self::V1_0_0
    }

    /// `interfaces[].mtu`.
    pub fn interfaces_have_mtu(self) -> bool {
        self >= Self::V1_1_0
    }

    pub fn list() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

impl FromStr for Version {
    type Err = Failure;

    /// Decoding fails for what is no version at all; a version that we don't speak is incompatible.
    fn from_str(text: &str) -> Result<Self, Failure> {
        if let Some(version) = Self::ALL.into_iter().find(|version| version.as_str() == text) {
            return Ok(version);
        }
        let parts: Vec<_> = text.split('.').collect();
        let is_number =
            |part: &&str| !part.is_empty() && part.len() <= 9 && part.bytes().all(|b| b.is_ascii_digit());
        if parts.len() != 3 || !parts.iter().all(is_number) {
            return Err(Failure::new(
                code::DECODE,
                format!("cniVersion `{text}` is not a version such as 1.0.0"),
            ));
        }
        let msg = format!("cniVersion {text} is not supported");
        Err(Failure::new(code::INCOMPATIBLE_VERSION, msg)
            .with_details(format!("supported: {}", Self::list())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_ours_or_another_or_none() {
        for version in Version::ALL {
            assert_eq!(version.as_str().parse(), Ok(version));
        }
        let code = |text: &str| text.parse::<Version>().unwrap_err().code;
        for other in ["0.1.0", "0.2.0", "0.3.0", "1.0.1", "2.0.0"] {
            assert_eq!(code(other), code::INCOMPATIBLE_VERSION, "{other}");
        }
        for bad in ["", "1", "1.0", "1.0.0.0", "1.0.x", "v1.0.0", "1..0"] {
            assert_eq!(code(bad), code::DECODE, "{bad}");
        }
    }
}
