//! CHECK, the host's side: the allocation, the veth, the bridge, the host route.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    Allocation, Veth,
    answer::{Code, Failure},
};
use crate::types::{AttachmentKey, Prefix};
use std::net::IpAddr;

/// Compares what should be with what is. More addresses in `expected` than we gave are somebody else's: fewer or
/// others are a mismatch.
///
/// # Errors
/// `UnknownContainer` if neither allocation nor veth exist, else `CheckMismatch` with every difference in its details.
pub fn check(
    key: &AttachmentKey,
    expected: &[IpAddr],
    allocation: Option<&Allocation>,
    veth: Option<&Veth>,
) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    match allocation {
        None if veth.is_none() => {
            return Err(Failure::new(Code::UnknownContainer, format!("{key} is not attached to this node")));
        }
        None => wrong.push(format!("{key} has no allocation")),
        Some(allocation) => {
            for address in allocation.addresses.iter().filter(|ip| !expected.contains(ip)) {
                wrong.push(format!("{address} is allocated, but not in prevResult"));
            }
            for address in &allocation.addresses {
                let route = Prefix::from(*address);
                if veth.is_some_and(|veth| !veth.routes.contains(&route)) {
                    wrong.push(format!("the host has no route to {route}"));
                }
            }
        }
    }
    let name = key.host_interface();
    match veth {
        None => wrong.push(format!("host interface {name} is gone")),
        Some(veth) => {
            if !veth.on_bridge {
                wrong.push(format!("{name} is not a port of the bridge"));
            }
            if !veth.up {
                wrong.push(format!("{name} is down"));
            }
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Code::CheckMismatch, format!("{key} is not as it was set up"))
            .with_details(wrong.join("; "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Mac, PodRef, VethAlias};
    use std::time::SystemTime;

    #[test]
    fn every_difference_is_told() {
        let key = AttachmentKey::new("c1", "eth0").unwrap();
        let ip: IpAddr = "10.32.0.2".parse().unwrap();
        let allocation = Allocation {
            attachment: key.clone(),
            pod: PodRef::default(),
            addresses: vec![ip],
            mac: Mac::derived(b"x"),
            reserved: SystemTime::UNIX_EPOCH,
        };
        let mut veth = Veth {
            alias: VethAlias { attachment: key.clone(), addresses: vec![ip], pod: PodRef::default() },
            host_interface: key.host_interface(),
            up: true,
            on_bridge: true,
            routes: vec![Prefix::from(ip)],
        };
        assert_eq!(check(&key, &[ip], Some(&allocation), Some(&veth)), Ok(()));
        assert_eq!(check(&key, &[ip], None, None).unwrap_err().code, Code::UnknownContainer);
        let details = |failure: Result<(), Failure>| failure.unwrap_err().details;
        assert!(details(check(&key, &[ip], None, Some(&veth))).contains("no allocation"));
        assert!(details(check(&key, &[ip], Some(&allocation), None)).contains("is gone"));
        assert!(details(check(&key, &[], Some(&allocation), Some(&veth))).contains("not in prevResult"));
        (veth.on_bridge, veth.up, veth.routes) = (false, false, vec![]);
        let all = details(check(&key, &[ip], Some(&allocation), Some(&veth)));
        assert_eq!(all.matches("; ").count(), 2, "{all}");
    }
}
