use crate::version::Version;
use serde_json::{Value, json};

/// CNI's codes, and ours from 100 on. Some of them only the agent answers with.
pub mod code {
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    pub const UNSUPPORTED_FIELD: u32 = 2;
    pub const ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const DECODE: u32 = 6;
    pub const INVALID_CONFIG: u32 = 7;
    pub const BAD_NETNS: u32 = 8;
    pub const CANNOT_ADD: u32 = 50;
    pub const AGENT_UNREACHABLE: u32 = 100;
    pub const INTERFACE_EXISTS: u32 = 102;
    pub const CHECK_MISMATCH: u32 = 103;
    pub const KERNEL_REFUSED: u32 = 104;
    pub const INTERNAL: u32 = 999;
}

/// What is printed instead of a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct Failure {
    pub code: u32,
    pub msg: String,
    pub details: String,
}

impl Failure {
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    pub fn with_details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }

    pub fn json(&self, version: Version) -> Value {
        let Self { code, msg, details } = self;
        json!({ "cniVersion": version.as_str(), "code": code, "msg": msg, "details": details })
    }
}

impl From<weft::linux::netlink::NetlinkError> for Failure {
    fn from(error: weft::linux::netlink::NetlinkError) -> Self {
        Self::new(code::KERNEL_REFUSED, error.to_string())
    }
}

impl From<weft::linux::sysctl::SysctlError> for Failure {
    fn from(error: weft::linux::sysctl::SysctlError) -> Self {
        Self::new(code::KERNEL_REFUSED, error.to_string())
    }
}

impl From<weft::linux::netns::NetnsError> for Failure {
    fn from(error: weft::linux::netns::NetnsError) -> Self {
        Self::new(code::KERNEL_REFUSED, error.to_string())
    }
}
