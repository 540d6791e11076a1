//! What the shim is told: a reservation, or a failure with CNI's code.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{AddressError, Allocation, Node, PortError, Readiness, request::host_mac};
use crate::types::{PodRef, Prefix, VethAlias};
use prost::Message;
use weft_proto::local;

/// A CNI error: what the shim prints.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct Failure {
    pub code: Code,
    pub msg: String,
    pub details: String,
}

/// CNI's codes, and ours from 100 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    UnsupportedField = 2,
    UnknownContainer = 3,
    Environment = 4,
    TryAgainLater = 11,
    CannotAdd = 50,
    PodsImpaired = 51,
    AddressesExhausted = 101,
    CheckMismatch = 103,
    KernelRefused = 104,
    PolicyLate = 105,
}

impl Failure {
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    pub fn with_details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }
}

/// What a pod's side of the veth is made from.
///
/// # Errors
/// The bridge has no address of a family that the pod has: try again later.
pub fn reservation(allocation: &Allocation, node: &Node) -> Result<local::Reservation, Failure> {
    let gateway = |ip: &std::net::IpAddr| {
        let same_family = node.gateways.iter().find(|gateway| gateway.is_ipv4() == ip.is_ipv4());
        same_family.map(ToString::to_string).ok_or_else(|| {
            let msg = format!("bridge {} has no address of the family of {ip} yet", node.bridge);
            Failure::new(Code::TryAgainLater, msg)
        })
    };
    let key = &allocation.attachment;
    Ok(local::Reservation {
        addresses: allocation.addresses.iter().map(|ip| Prefix::from(*ip).to_string()).collect(),
        gateways: allocation.addresses.iter().map(gateway).collect::<Result<_, _>>()?,
        mac: allocation.mac.to_string(),
        mtu: node.mtu.into(),
        host_interface: key.host_interface(),
        host_mac: host_mac(key).to_string(),
        host_alias: alias(allocation)?.to_string(),
        bridge: node.bridge.clone(),
        bridge_mac: node.bridge_mac.to_string(),
    })
}

/// What the kernel can keep of it: the pod's words give way to the attachment's and the addresses.
fn alias(allocation: &Allocation) -> Result<VethAlias, Failure> {
    let Allocation { attachment, pod, addresses, .. } = allocation.clone();
    let mut alias = VethAlias { attachment, addresses, pod };
    let forget: [fn(&mut PodRef); 3] =
        [|pod| pod.name.clear(), |pod| pod.namespace.clear(), |pod| pod.uid.clear()];
    for forget in forget {
        if alias.to_string().len() <= ALIAS_BYTES {
            return Ok(alias);
        }
        forget(&mut alias.pod);
    }
    match alias.to_string().len() <= ALIAS_BYTES {
        true => Ok(alias),
        false => {
            Err(Failure::new(Code::Environment, "CNI_CONTAINERID is too long to be kept with the interface"))
        }
    }
}

/// IFALIASZ of linux/if.h less the end mark.
const ALIAS_BYTES: usize = 255;

/// The node's bridge, or why there is none yet.
pub fn node<'a>(node: Option<&'a Node>, readiness: &Readiness) -> Result<&'a Node, Failure> {
    node.filter(|node| !node.gateways.is_empty()).ok_or_else(|| {
        let why = match readiness.reasons.as_slice() {
            [] => "its bridge has no address yet".into(),
            reasons => reasons.join("; "),
        };
        Failure::new(Code::TryAgainLater, format!("the Weft agent is starting: {why}"))
    })
}

/// STATUS, in words that reach the node's condition as they are.
pub fn ready(readiness: &Readiness) -> Result<(), Failure> {
    if readiness.reasons.is_empty() {
        return Ok(());
    }
    let code = if readiness.impaired { Code::PodsImpaired } else { Code::CannotAdd };
    Err(Failure::new(code, format!("Weft can't attach pods: {}", readiness.reasons.join("; "))))
}

impl From<AddressError> for Failure {
    fn from(error: AddressError) -> Self {
        let code = match error {
            AddressError::NotReady(_) | AddressError::Full(_) | AddressError::Store(_) => Code::TryAgainLater,
            AddressError::Taken(_) => Code::AddressesExhausted,
            AddressError::Refused(_) => Code::UnsupportedField,
        };
        Self::new(code, error.to_string())
    }
}

impl From<PortError> for Failure {
    fn from(error: PortError) -> Self {
        let code = match error {
            PortError::NotReady(_) => Code::TryAgainLater,
            PortError::Missing(_) | PortError::Kernel(_) => Code::KernelRefused,
            PortError::Policy(_) => Code::PolicyLate,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Failure> for tonic::Status {
    fn from(failure: Failure) -> Self {
        let grpc = match failure.code {
            Code::UnsupportedField | Code::Environment => tonic::Code::InvalidArgument,
            Code::UnknownContainer => tonic::Code::NotFound,
            Code::AddressesExhausted => tonic::Code::ResourceExhausted,
            Code::TryAgainLater | Code::CannotAdd | Code::PodsImpaired => tonic::Code::Unavailable,
            Code::CheckMismatch | Code::KernelRefused | Code::PolicyLate => tonic::Code::FailedPrecondition,
        };
        let Failure { code, msg, details } = failure;
        let body = local::Failure { code: code as u32, msg: msg.clone(), details };
        Self::with_details(grpc, msg, body.encode_to_vec().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_travels_in_the_details_of_a_status() {
        let failure = Failure::from(AddressError::Full("10.32.0.0/29 is full: a has 4, b has 4".into()));
        let status = tonic::Status::from(failure);
        let read = local::Failure::decode(status.details()).unwrap();
        assert_eq!((read.code, read.msg.as_str()), (11, "10.32.0.0/29 is full: a has 4, b has 4"));
    }

    #[test]
    fn not_ready_is_said_with_the_reasons() {
        let mut readiness =
            Readiness { reasons: vec!["no addresses: no peer answers".into()], impaired: false };
        assert_eq!(ready(&readiness).unwrap_err().code, Code::CannotAdd);
        let starting = node(None, &readiness).unwrap_err();
        assert_eq!(starting.code, Code::TryAgainLater);
        assert!(starting.msg.ends_with("no addresses: no peer answers"), "{}", starting.msg);
        readiness.impaired = true;
        assert_eq!(ready(&readiness).unwrap_err().code, Code::PodsImpaired);
        assert_eq!(ready(&Readiness::default()), Ok(()));
    }
}
