//! Network sysctls, by their path below `/proc/sys`: `net/ipv4/conf/weft/forwarding`.
//!
//! `/proc/sys/net` shows the network namespace of the thread that reads it, not of the process. Container runtimes mount
//! `/proc/sys` read-only and nothing over it: the manifests mount the host's `/proc/sys/net` below `/host`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

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
    match fs::read_to_string(path(key)) {
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
    fs::write(path(key), value).map_err(|errno| {
        let hint = match errno.kind() {
            io::ErrorKind::ReadOnlyFilesystem => {
                " (in a container, mount the host's /proc/sys/net writable at /host/proc/sys/net)"
            }
            _ => "",
        };
        SysctlError { action: "write", key: key.into(), hint, errno }
    })
}

fn path(key: &str) -> PathBuf {
    let mounted = Path::new(MOUNTED).join(key);
    if mounted.exists() { mounted } else { Path::new(ROOT).join(key) }
}

const ROOT: &str = "/proc/sys";
const MOUNTED: &str = "/host/proc/sys";
