//! Where a runtime puts its pods' processes, so that nothing of it stays.
use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{claim::Claim, node::Node};

/// A cgroup in each hierarchy that has one by its name; removed when this is dropped, once the processes have ended.
pub struct Cgroup(String);

impl Cgroup {
    pub fn new(node: &Node, claim: &Claim) -> Self {
        Self(format!("weft-lab-{}-{}", claim.id(), node.name()))
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    fn directories(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let directory = |line: &str| {
            let mut fields = line.split(' ').skip(1);
            let (point, kind) = (fields.next()?, fields.next()?);
            kind.starts_with("cgroup").then(|| Path::new(point).join(&self.0))
        };
        mounts.lines().filter_map(directory).filter(|directory| directory.exists()).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in self.directories() {
            if let Err(error) = remove(&directory) {
                eprintln!("remove cgroup {}: {error}", directory.display());
            }
        }
    }
}

/// Depth first; a cgroup's files go with it.
fn remove(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove(&entry.path())?;
    }
    fs::remove_dir(directory)
}
