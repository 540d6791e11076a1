//! What is left for an agent that does not answer: it releases the attachment once it is back.

use serde_json::json;
use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    process,
};
use weft::types::AttachmentKey;

/// Leaves a tombstone that survives a crash right after. A second one for the same attachment replaces the first.
///
/// # Errors
/// The directory can't be made or written.
pub fn leave(run_dir: &Path, key: &AttachmentKey) -> io::Result<()> {
    let directory = run_dir.join("tombstones");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    let name = key.host_interface();
    // A name with a dot in front is not finished; the process id keeps parallel calls apart.
    let temporary = directory.join(format!(".{name}.{}", process::id()));
    let text = json!({ "containerId": key.container_id(), "ifname": key.ifname() }).to_string();
    let written = write(&temporary, &text).and_then(|()| {
        fs::rename(&temporary, directory.join(format!("{name}.json")))?;
        fs::File::open(&directory)?.sync_all()
    });
    if written.is_err() {
        // Nothing more can be done about it; the name says that it is not finished.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
