//! A damaged state file: it is read, or moved aside, and then there is an empty one.

use super::script::Script;
use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::LazyLock,
};
use weft::linux::store::{FILE, Store, StoreError, Table, Write};

/// Where the file is hit, in 2¹⁶ths of its length, and by what; an odd number of hits cuts it there as well.
pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut file = WHOLE.clone();
    for _ in 0..script.below(16) {
        let at = usize::from(script.number()) * file.len() / (1 << 16) + script.below(8);
        let len = script.below(64);
        let hit = script.take(len);
        if let Some(place) = file.get_mut(at..at + hit.len()) {
            place.copy_from_slice(hit);
        }
    }
    if script.byte() & 1 != 0 {
        file.truncate(usize::from(script.number()) * file.len() / (1 << 16));
    }
    let _ = fs::remove_dir_all(&*FOLDER);
    fs::create_dir_all(&*FOLDER).expect("a folder in memory");
    fs::write(FOLDER.join(FILE), &file).expect("room in memory");
    // The database's own assertions are caught by the store: only what it lets through counts.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = open(&FOLDER);
    std::panic::set_hook(hook);
    match opened {
        Ok(store) => {
            for table in [Table::Meta, Table::Ring, Table::Allocations, Table::Resting, Table::Items] {
                store.read(table).expect("what was opened can be read");
            }
            store.next_incarnation(1).expect("and written");
        }
        Err(
            StoreError::AnotherUniverse { .. }
            | StoreError::AnotherName { .. }
            | StoreError::AnotherFormat { .. },
        ) => {}
        Err(error) => panic!("{error}"),
    }
    fs::remove_dir_all(&*FOLDER).expect("it is ours");
}

fn open(folder: &Path) -> Result<Store, StoreError> {
    let (name, universe) = ("n0".parse().expect("a name"), "10.32.0.0/24".parse().expect("a universe"));
    Store::open(folder, &name, &universe).map(|(store, _)| store)
}

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| format!("/dev/shm/weft-fuzz-{}", process::id()).into());

static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let store = open(&FOLDER).expect("a new one");
    let write = |key: u8| Write { table: Table::Ring, key: vec![key], value: Some(vec![key; 100]) };
    store.commit(&(0..20).map(write).collect::<Vec<_>>()).expect("room in memory");
    drop(store);
    fs::read(FOLDER.join(FILE)).expect("it was made")
});
