//! What the shim leaves where no agent answered a DEL: `<run dir>/tombstones/<host interface>.json`.
//!
//! The name is the attachment's hash, so no path is made from what a caller chose; a file whose name begins with a
//! dot is not finished yet.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::types::AttachmentKey;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Where the tombstones are.
pub fn directory(run_dir: &Path) -> PathBuf {
    run_dir.join(DIRECTORY)
}

pub fn file_name(key: &AttachmentKey) -> String {
    format!("{}.json", key.host_interface())
}

/// Whether a file in the directory is a finished tombstone.
pub fn is_finished(name: &str) -> bool {
    !name.starts_with('.') && name.ends_with(".json")
}

/// Reads one; none if it is not one, or is not the one that its name says.
pub fn parse(name: &str, text: &str) -> Option<AttachmentKey> {
    let Body { container_id, ifname } = serde_json::from_str(text).ok()?;
    let key = AttachmentKey::new(&container_id, &ifname).ok()?;
    (file_name(&key) == name).then_some(key)
}

/// In the run directory.
pub const DIRECTORY: &str = "tombstones";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    container_id: String,
    ifname: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_finished_tombstone_of_its_own_name_is_worked_off() {
        let key = AttachmentKey::new("c1", "eth0").unwrap();
        let name = file_name(&key);
        let text = r#"{"containerId":"c1","ifname":"eth0"}"#;
        assert_eq!(parse(&name, text), Some(key));
        assert_eq!(parse("wf000000000000.json", text), None);
        assert_eq!(parse(&name, r#"{"containerId":"../x","ifname":"eth0"}"#), None);
        assert_eq!(parse(&name, ""), None);
        assert!(is_finished(&name) && !is_finished(".wf1.json") && !is_finished("wf1.json.tmp"));
    }
}
