//! A container image built here: a static `pause`, and busybox for what tests run in a pod.
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::debian::Suite;

/// Writes the image, as `docker save` would, to a file in the directory.
pub fn pod_image(directory: &Path) -> anyhow::Result<PathBuf> {
    let pause = compile(directory)?;
    let busybox = fs::read(Suite::Bookworm.program("busybox")?)?;
    let mut layer = Builder::new(Vec::new());
    add(&mut layer, "pause", &pause, 0o755)?;
    add(&mut layer, "bin/busybox", &busybox, 0o755)?;
    add(&mut layer, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)?;
    for applet in ["sh", "wget", "httpd", "nc", "nslookup", "ping", "ip", "cat", "sleep"] {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let layer = layer.into_inner()?;
    let config = json!({
        "architecture": match std::env::consts::ARCH { "aarch64" => "arm64", _ => "amd64" },
        "os": "linux",
        "config": { "Entrypoint": ["/pause"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{:x}", Sha256::digest(&layer))] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [POD_IMAGE], "Layers": ["layer.tar"] }]);
    let path = directory.join("pod-image.tar");
    let mut archive = Builder::new(fs::File::create(&path)?);
    add(&mut archive, "config.json", config.to_string().as_bytes(), 0o644)?;
    add(&mut archive, "layer.tar", &layer, 0o644)?;
    add(&mut archive, "manifest.json", manifest.to_string().as_bytes(), 0o644)?;
    archive.into_inner()?.flush()?;
    Ok(path)
}

fn add(archive: &mut Builder<impl Write>, path: &str, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let mut header = Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path, bytes).with_context(|| format!("add {path} to the image"))
}

fn compile(directory: &Path) -> anyhow::Result<Vec<u8>> {
    let (source, program) = (directory.join("pause.c"), directory.join("pause"));
    fs::write(&source, PAUSE)?;
    let output = Command::new("cc").args(["-Os", "-static", "-s", "-o"]).args([&program, &source]).output();
    let output = output.context("run cc: a C compiler with a static libc is needed (gcc, libc6-dev)")?;
    ensure!(output.status.success(), "build pause: {}", String::from_utf8_lossy(&output.stderr));
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(fs::read(&program)?)
}

/// By which the runtimes know it, tag and all.
pub const POD_IMAGE: &str = "weft.invalid/lab/pod:1";

/// Process 1 of a pod: reaps what it inherits, ends when told.
const PAUSE: &str = r#"
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
static void reap(int signal) { (void)signal; while (waitpid(-1, NULL, WNOHANG) > 0); }
int main(void) {
    signal(SIGTERM, end);
    signal(SIGINT, end);
    signal(SIGCHLD, reap);
    for (;;) pause();
}
"#;
