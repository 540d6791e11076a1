//! The file by which a container runtime finds us: `10-weft.conflist`.
//!
//! It is written once the node is ready and never removed: without it a runtime can't even stop a pod.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use serde_json::json;
use std::path::Path;

pub const FILE_NAME: &str = "10-weft.conflist";
/// In the same directory, so that finishing it is a rename there, which runtimes notice.
pub const TEMPORARY_NAME: &str = ".weft.tmp";

/// The file's text. `cniVersion` alone is what runtimes before `cniVersions` speak; the list lets newer ones speak
/// 1.1.0, with STATUS.
pub fn text(socket: &Path, run_dir: &Path) -> String {
    let list = json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": "weft",
        "plugins": [
            {
                "type": "weft-cni",
                "socket": socket,
                "runDir": run_dir,
                "capabilities": { "ips": true, "mac": true, "ipRanges": true },
            },
            { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } },
            { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        ],
    });
    format!("{list:#}\n")
}

/// Files that a runtime would take before ours: the lexically first configuration wins.
pub fn winners(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let is_configuration =
        |name: &String| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end));
    let mut winners: Vec<_> =
        names.into_iter().filter(is_configuration).filter(|name| name.as_str() < FILE_NAME).collect();
    winners.sort();
    winners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_conflist_speaks_to_old_and_new_runtimes() {
        insta::assert_snapshot!(text(Path::new("/run/weft/weft.sock"), Path::new("/run/weft")), @r#"
        {
          "cniVersion": "1.0.0",
          "cniVersions": [
            "0.4.0",
            "1.0.0",
            "1.1.0"
          ],
          "name": "weft",
          "plugins": [
            {
              "capabilities": {
                "ipRanges": true,
                "ips": true,
                "mac": true
              },
              "runDir": "/run/weft",
              "socket": "/run/weft/weft.sock",
              "type": "weft-cni"
            },
            {
              "capabilities": {
                "portMappings": true
              },
              "snat": true,
              "type": "portmap"
            },
            {
              "capabilities": {
                "bandwidth": true
              },
              "type": "bandwidth"
            }
          ]
        }
        "#);
    }

    #[test]
    fn files_that_sort_before_ours_are_named() {
        let names = ["20-z.conf", "10-weft.conflist", "10-a.conflist", "05-b.conf", "00-README", ".weft.tmp"];
        assert_eq!(winners(names.map(String::from)), ["05-b.conf", "10-a.conflist"]);
    }
}
