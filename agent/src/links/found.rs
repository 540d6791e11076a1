//! The sysctls as they were before Weft changed them, on disk, so that a reset can put them back.

use anyhow::Context;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};
use tracing::error;

/// Only sysctls that outlive our links are in here. The first value found counts: later ones are our own.
#[derive(Debug)]
pub(super) struct Found {
    path: PathBuf,
    values: BTreeMap<String, String>,
}

impl Found {
    /// A damaged file is moved aside: what it held is lost, but no reason not to run.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        let path = state_dir.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => b"{}".to_vec(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let values = match serde_json::from_slice(&bytes) {
            Ok(values) => values,
            Err(error) => {
                let aside = path.with_extension("damaged");
                fs::rename(&path, &aside).with_context(|| format!("move {} aside", path.display()))?;
                error!(%error, moved_to = %aside.display(), "the sysctls as they were before Weft are lost");
                BTreeMap::new()
            }
        };
        Ok(Self { path, values })
    }

    pub fn values(&self) -> &BTreeMap<String, String> {
        &self.values
    }

    /// Writes down what is not known yet, and returns only when it is on disk.
    pub fn remember(&mut self, found: impl IntoIterator<Item = (String, String)>) -> anyhow::Result<()> {
        let mut values = self.values.clone();
        for (key, value) in found {
            values.entry(key).or_insert(value);
        }
        if values == self.values {
            return Ok(());
        }
        let write = || -> io::Result<()> {
            let fresh = self.path.with_extension("new");
            fs::write(&fresh, serde_json::to_vec_pretty(&values)?)?;
            fs::File::open(&fresh)?.sync_all()?;
            fs::rename(&fresh, &self.path)
        };
        write().with_context(|| format!("write {}", self.path.display()))?;
        self.values = values;
        Ok(())
    }

    pub fn forget(self) -> anyhow::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}

const FILE: &str = "sysctls.json";
/// What the names of our files in the state directory begin with.
pub const FOUND: &str = "sysctls.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_found_counts() {
        let folder = tempfile::tempdir().unwrap();
        let pair = |value: &str| [("net/ipv4/conf/all/send_redirects".to_string(), value.to_string())];
        Found::open(folder.path()).unwrap().remember(pair("1")).unwrap();
        let mut found = Found::open(folder.path()).unwrap();
        found.remember(pair("0")).unwrap();
        assert_eq!(found.values(), &BTreeMap::from(pair("1")));
        found.forget().unwrap();
        assert!(Found::open(folder.path()).unwrap().values().is_empty());
        fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(Found::open(folder.path()).unwrap().values().is_empty());
        assert!(folder.path().join("sysctls.damaged").exists());
    }
}
