use super::Mac;
use std::{fmt, net::IpAddr, str::FromStr};

/// What a pod's attachment is known by: the runtime's container id and the interface's name in the pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentKey {
    container_id: String,
    ifname: String,
}

/// The pod behind an attachment, as far as the runtime told: empty strings where it did not.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodRef {
    pub uid: String,
    pub namespace: String,
    pub name: String,
}

/// What the host end of a pod's veth carries in its `ifalias`, so that an agent that lost its state finds it again:
/// `weft <container id> <ifname> <address> <uid> <namespace> <name>`, with `-` for what is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethAlias {
    pub attachment: AttachmentKey,
    pub addresses: Vec<IpAddr>,
    pub pod: PodRef,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAttachment {
    #[error("container id `{0}` must match ^[a-zA-Z0-9][a-zA-Z0-9_.-]*$ and be at most 256 characters")]
    ContainerId(String),
    #[error(
        "interface name `{0}` must be 1 to 15 characters, not `.`, `..`, `all` or `default`, and free of `/`, `:`, `%` and white space"
    )]
    Ifname(String),
    #[error("`{0}` is not an alias of a Weft veth")]
    Alias(String),
}

impl AttachmentKey {
    pub fn new(container_id: &str, ifname: &str) -> Result<Self, InvalidAttachment> {
        let shown = |text: &str| text.chars().take(64).collect();
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if container_id.len() > 256
            || !container_id.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !container_id.chars().all(ok)
        {
            return Err(InvalidAttachment::ContainerId(shown(container_id)));
        }
        let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
        if !(1..=15).contains(&ifname.len())
            || matches!(ifname, "." | ".." | "all" | "default")
            || ifname.contains(bad)
        {
            return Err(InvalidAttachment::Ifname(shown(ifname)));
        }
        Ok(Self { container_id: container_id.into(), ifname: ifname.into() })
    }

    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// MAC of the pod's end, unless the runtime asks for another: stable for the key.
    pub fn pod_mac(&self) -> Mac {
        Mac::derived(format!("pod {self}").as_bytes())
    }

    /// Name of the host's end of the veth: `wf` and 12 hex digits, stable for the key.
    pub fn host_interface(&self) -> String {
        format!("wf{:012x}", fnv1a(self.to_string().as_bytes()) & 0xffff_ffff_ffff)
    }
}

impl fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for VethAlias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dash =
            |text: &str| if text.is_empty() { "-".into() } else { text.replace(char::is_whitespace, "_") };
        let addresses: Vec<_> = self.addresses.iter().map(IpAddr::to_string).collect();
        let AttachmentKey { container_id, ifname } = &self.attachment;
        let PodRef { uid, namespace, name } = &self.pod;
        write!(f, "weft {container_id} {ifname} {} ", dash(&addresses.join(",")))?;
        // The kernel keeps 255 bytes: the name goes last, as it is the least needed.
        write!(f, "{} {} {}", dash(uid), dash(namespace), dash(name))
    }
}

impl FromStr for VethAlias {
    type Err = InvalidAttachment;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidAttachment::Alias(text.into());
        let fields: Vec<&str> = text.split(' ').collect();
        let ["weft", container_id, ifname, addresses, rest @ ..] = &fields[..] else { return Err(invalid()) };
        let field = |n: usize| rest.get(n).filter(|text| **text != "-").map(|text| text.to_string());
        let addresses = match *addresses {
            "-" => Vec::new(),
            list => list.split(',').map(|a| a.parse().map_err(|_| invalid())).collect::<Result<_, _>>()?,
        };
        Ok(Self {
            attachment: AttachmentKey::new(container_id, ifname)?,
            addresses,
            pod: PodRef {
                uid: field(0).unwrap_or_default(),
                namespace: field(1).unwrap_or_default(),
                name: field(2).unwrap_or_default(),
            },
        })
    }
}

/// FNV-1a, 64 bits: a stable hash for names, not for secrets.
pub(super) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_named_as_cni_allows() {
        let key = AttachmentKey::new("4f3c", "eth0").unwrap();
        assert_eq!(key.host_interface().len(), 14);
        assert_ne!(key.host_interface(), AttachmentKey::new("4f3c", "eth1").unwrap().host_interface());
        for (id, ifname) in
            [("", "eth0"), ("-x", "eth0"), ("a/b", "eth0"), ("a", ""), ("a", ".."), ("a", "e:0")]
        {
            assert!(AttachmentKey::new(id, ifname).is_err(), "{id} {ifname}");
        }
        assert!(AttachmentKey::new("a", "sixteen-letters-").is_err());
    }

    #[test]
    fn an_alias_reads_back() {
        let alias = VethAlias {
            attachment: AttachmentKey::new("4f3c", "eth0").unwrap(),
            addresses: vec!["10.32.0.2".parse().unwrap()],
            pod: PodRef { uid: "u-1".into(), namespace: String::new(), name: "web".into() },
        };
        assert_eq!(alias.to_string(), "weft 4f3c eth0 10.32.0.2 u-1 - web");
        assert_eq!(alias.to_string().parse(), Ok(alias));
        assert!("somebody's veth".parse::<VethAlias>().is_err());
    }
}
