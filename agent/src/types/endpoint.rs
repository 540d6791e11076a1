use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// TCP port of control links and UDP port of data: Weave's, which firewalls let through already.
pub const CONTROL_PORT: u16 = 6783;

/// An underlay address of a node, for control (TCP) and data (UDP) alike: `addr[:port]`, `[v6]:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub SocketAddr);

/// Where to look for a peer: a host name or an address, with a port. Names are resolved at each attempt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerAddress {
    pub host: String,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not host[:port] or an address; examples: node-2, 192.0.2.7:6783, [2001:db8::7]:6783")]
pub struct InvalidPeerAddress(String);

impl FromStr for Endpoint {
    type Err = InvalidPeerAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address: PeerAddress = text.parse()?;
        let ip: IpAddr = address.host.parse().map_err(|_| InvalidPeerAddress(text.into()))?;
        Ok(Self(SocketAddr::new(ip, address.port)))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for PeerAddress {
    type Err = InvalidPeerAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidPeerAddress(text.into());
        if let Ok(ip) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            return Ok(Self { host: ip.to_string(), port: CONTROL_PORT });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port != 0).ok_or_else(invalid)?),
            None => (text, CONTROL_PORT),
        };
        if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            let ip: Ipv6Addr = inner.parse().map_err(|_| invalid())?;
            return Ok(Self { host: ip.to_string(), port });
        }
        let is_name = |host: &str| {
            !host.is_empty()
                && host.len() <= 253
                && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        };
        if !is_name(host) {
            return Err(invalid());
        }
        Ok(Self { host: host.into(), port })
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_default_port() {
        let shown = |text: &str| text.parse::<PeerAddress>().map(|a| a.to_string());
        assert_eq!(shown("node-2").unwrap(), "node-2:6783");
        assert_eq!(shown("192.0.2.7:99").unwrap(), "192.0.2.7:99");
        assert_eq!(shown("2001:db8::7").unwrap(), "[2001:db8::7]:6783");
        assert_eq!(shown("[2001:db8::7]:99").unwrap(), "[2001:db8::7]:99");
        for bad in ["", ":1", "a:0", "a:b", "a b", "http://a", "[zz]:1"] {
            assert!(shown(bad).is_err(), "{bad}");
        }
        assert!("node-2".parse::<Endpoint>().is_err());
    }
}
