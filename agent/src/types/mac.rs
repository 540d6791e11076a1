use std::{fmt, str::FromStr};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a unicast MAC address such as 02:42:ac:11:00:02")]
pub struct InvalidMac(String);

impl Mac {
    /// A locally administered unicast address that is the same for the same bytes, from their FNV-1a hash.
    pub fn derived(from: &[u8]) -> Self {
        let [_, _, bytes @ ..] = super::attachment::fnv1a(from).to_be_bytes();
        let mut mac: [u8; 6] = bytes;
        mac[0] = (mac[0] & !1) | 2;
        Self(mac)
    }
}

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(':').map(|part| match part.len() {
            // A sign would be read as well.
            2 if part.bytes().all(|byte| byte.is_ascii_hexdigit()) => u8::from_str_radix(part, 16).ok(),
            _ => None,
        });
        let mut mac = [0; 6];
        for byte in &mut mac {
            *byte = parts.next().flatten().ok_or_else(|| InvalidMac(text.into()))?;
        }
        let unicast = mac[0] & 1 == 0 && mac != [0; 6];
        (unicast && parts.next().is_none()).then_some(Self(mac)).ok_or_else(|| InvalidMac(text.into()))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_reads_back() {
        let mac = Mac::derived(b"node-1");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert_eq!(mac.0[0] & 3, 2, "locally administered, unicast");
        for bad in [
            "",
            "02:42",
            "02:42:ac:11:00:02:03",
            "01:00:5e:00:00:01",
            "2:4:a:1:0:2",
            "00:00:00:00:00:00",
            "02:+1:ac:11:00:02",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
