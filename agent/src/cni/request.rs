//! What the shim asks, as types: everything is parsed before anything is done.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Allocation, answer::Code, answer::Failure};
use crate::types::{AttachmentKey, Mac, PodRef, Prefix};
use std::{collections::BTreeMap, net::IpAddr};
use weft_proto::local;

/// Which address an attachment would like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    pub attachment: AttachmentKey,
    pub pod: PodRef,
    /// Exactly these, at most one of each family; empty: any.
    pub addresses: Vec<IpAddr>,
    /// From one of these; empty: from anywhere.
    pub ranges: Vec<Prefix>,
    /// The pod's end: the caller's, or ours, which is the same for the same attachment.
    pub mac: Mac,
    pub labels: BTreeMap<String, String>,
}

/// # Errors
/// Names the field and its value.
pub fn wish(request: local::ReserveRequest) -> Result<Wish, Failure> {
    let attachment = attachment(request.attachment)?;
    let pod = request.pod.unwrap_or_default();
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in &request.addresses {
        let address: IpAddr = parse("address", text)?;
        if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            let msg = format!("address {address} is the second of its family; a pod gets one of each");
            return Err(Failure::new(Code::UnsupportedField, msg));
        }
        addresses.push(address);
    }
    addresses.sort();
    let ranges = request.ranges.iter().map(|text| parse("range", text)).collect::<Result<_, _>>()?;
    let mac = match request.mac.as_str() {
        "" => attachment.pod_mac(),
        text => parse("mac", text)?,
    };
    let pod = PodRef { uid: pod.uid, namespace: pod.namespace, name: pod.name };
    let labels = request.labels.into_iter().collect();
    Ok(Wish { attachment, pod, addresses, ranges, mac, labels })
}

/// # Errors
/// It is missing or not one that CNI allows.
pub fn attachment(given: Option<local::Attachment>) -> Result<AttachmentKey, Failure> {
    let given = given.unwrap_or_default();
    AttachmentKey::new(&given.container_id, &given.ifname)
        .map_err(|error| Failure::new(Code::Environment, error.to_string()))
}

/// A late ADD for a pod whose successor of the same name is attached already.
///
/// # Errors
/// Names both UIDs.
pub fn refuse_an_old_pod(wish: &Wish, allocations: &[Allocation]) -> Result<(), Failure> {
    let PodRef { uid, namespace, name } = &wish.pod;
    if uid.is_empty() || name.is_empty() {
        return Ok(());
    }
    let same_name = || allocations.iter().filter(|a| a.pod.namespace == *namespace && a.pod.name == *name);
    let Some(known) = same_name().filter(|a| a.pod.uid == *uid).map(|a| a.reserved).min() else {
        return Ok(());
    };
    let successor = same_name().find(|a| a.pod.uid != *uid && !a.pod.uid.is_empty() && a.reserved > known);
    successor.map_or(Ok(()), |newer| {
        let msg = format!(
            "K8S_POD_UID {uid} is an older pod {namespace}/{name}: {} has taken its place",
            newer.pod.uid
        );
        Err(Failure::new(Code::Environment, msg))
    })
}

/// The host's end of the veth.
pub fn host_mac(key: &AttachmentKey) -> Mac {
    Mac::derived(format!("host {key}").as_bytes())
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(field: &str, text: &str) -> Result<T, Failure> {
    text.parse().map_err(|error| Failure::new(Code::UnsupportedField, format!("{field} `{text}`: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    fn request() -> local::ReserveRequest {
        local::ReserveRequest {
            attachment: Some(local::Attachment { container_id: "c1".into(), ifname: "eth0".into() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_wish_is_parsed_or_refused_by_name() {
        let plain = wish(request()).unwrap();
        assert_eq!(plain.mac, wish(request()).unwrap().mac, "the same attachment, the same MAC");
        assert_ne!(plain.mac, host_mac(&plain.attachment));
        let refused = |change: fn(&mut local::ReserveRequest)| {
            let mut request = request();
            change(&mut request);
            wish(request).unwrap_err()
        };
        assert_eq!(refused(|r| r.attachment = None).code, Code::Environment);
        let failure = refused(|r| r.addresses = vec!["10.32.0.300".into()]);
        assert_eq!(failure.code, Code::UnsupportedField);
        assert!(failure.msg.contains("10.32.0.300"), "{}", failure.msg);
        refused(|r| r.addresses = vec!["10.32.0.3".into(), "10.32.0.4".into()]);
        refused(|r| r.ranges = vec!["10.32.0.0".into()]);
        refused(|r| r.mac = "01:00:5e:00:00:01".into());
    }

    #[test]
    fn a_late_add_for_an_old_pod_is_refused() {
        let pod = |uid: &str| PodRef { uid: uid.into(), namespace: "default".into(), name: "web".into() };
        let allocation = |id: &str, uid: &str, seconds: u64| Allocation {
            attachment: AttachmentKey::new(id, "eth0").unwrap(),
            pod: pod(uid),
            addresses: vec![],
            mac: Mac::derived(b"x"),
            reserved: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        };
        let mut asked = wish(request()).unwrap();
        asked.pod = pod("old");
        let both = [allocation("a", "old", 1), allocation("b", "new", 2)];
        assert!(refuse_an_old_pod(&asked, &both).unwrap_err().msg.contains("new has taken its place"));
        assert_eq!(refuse_an_old_pod(&asked, &both[..1]), Ok(()));
        asked.pod = pod("new");
        assert_eq!(refuse_an_old_pod(&asked, &both), Ok(()));
        asked.pod = pod("newest");
        assert_eq!(refuse_an_old_pod(&asked, &both), Ok(()));
    }
}
