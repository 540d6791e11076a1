//! Network sysctls, by their path below `/proc/sys`: `net/ipv4/conf/weft/forwarding`.
//!
//! `/proc/sys/net` shows the network namespace of the thread that reads it, not of the process.

use std::{fs, io, path::Path};

#[derive(Debug, thiserror::Error)]
#[error("{action} sysctl {key}: {errno}{hint}")]
pub struct SysctlError {
    action: &'static str,
    key: String,
    hint: &'static str,
    errno: io::Error,
}

/// Reads a value, without its line end; none where this kernel or namespace has no such sysctl.
///
/// # Errors
/// It is there, but unreadable.
pub fn read(key: &str) -> Result<Option<String>, SysctlError> {
    match fs::read_to_string(Path::new(ROOT).join(key)) {
        Ok(text) => Ok(Some(text.trim_end().to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(errno) => Err(SysctlError { action: "read", key: key.into(), hint: "", errno }),
    }
}

/// Writes a value.
///
/// # Errors
/// There is no such sysctl, the kernel refuses the value, or `/proc/sys` is mounted read-only.
pub fn write(key: &str, value: &str) -> Result<(), SysctlError> {
    fs::write(Path::new(ROOT).join(key), value).map_err(|errno| {
        let hint = match errno.kind() {
            io::ErrorKind::ReadOnlyFilesystem => " (mount the host's /proc/sys/net writable)",
            _ => "",
        };
        SysctlError { action: "write", key: key.into(), hint, errno }
    })
}

const ROOT: &str = "/proc/sys";
