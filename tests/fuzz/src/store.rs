//! A damaged state file: all of it is read, or it is moved aside, and then there is an empty one.

use super::script::Script;
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process,
    sync::LazyLock,
};
use weft::linux::store::{FILE, Store, StoreError, StoreState, Table, Write};

/// Where the file is hit, in 2¹⁶ths of its length, and by what; an odd number of hits cuts it there as well.
pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let _ = fs::remove_dir_all(&*FOLDER);
    fs::create_dir_all(&*FOLDER).expect("a folder in memory");
    let (file, len) = (WHOLE.lay_down(), WHOLE.len);
    for _ in 0..script.below(16) {
        let at = u64::from(script.number()) * len / (1 << 16) + script.below(8) as u64;
        let count = script.below(64);
        let hit = script.take(count);
        if at + hit.len() as u64 <= len {
            file.write_all_at(hit, at).expect("room in memory");
        }
    }
    if script.byte() & 1 != 0 {
        file.set_len(u64::from(script.number()) * len / (1 << 16)).expect("it is ours");
    }
    drop(file);
    // The database's own assertions are caught by the store: only what it lets through counts.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = open(&FOLDER);
    std::panic::set_hook(hook);
    match opened {
        Ok((store, state)) => {
            for table in [Table::Meta, Table::Ring, Table::Allocations, Table::Resting, Table::Items] {
                let entries = store.read(table).expect("what was opened can be read");
                let written = if state == StoreState::Opened { ENTRIES } else { 0 };
                assert!(table != Table::Ring || entries.len() == written, "{state:?}: {entries:?}");
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

fn open(folder: &Path) -> Result<(Store, StoreState), StoreError> {
    let (name, universe) = ("n0".parse().expect("a name"), "10.32.0.0/24".parse().expect("a universe"));
    Store::open(folder, &name, &universe)
}

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| format!("/dev/shm/weft-fuzz-{}", process::id()).into());

/// A file that nothing has happened to.
struct Whole {
    len: u64,
    /// All but its zeros, which are most of it, each with its place.
    pages: Vec<(u64, Vec<u8>)>,
}

static WHOLE: LazyLock<Whole> = LazyLock::new(|| {
    let (store, _) = open(&FOLDER).expect("a new one");
    let write = |key: u8| Write { table: Table::Ring, key: vec![key], value: Some(vec![key; 100]) };
    store.commit(&(0..ENTRIES as u8).map(write).collect::<Vec<_>>()).expect("room in memory");
    drop(store);
    let bytes = fs::read(FOLDER.join(FILE)).expect("it was made");
    let pages = bytes.chunks(PAGE).zip((0..).step_by(PAGE)).filter(|(page, _)| *page != &[0; PAGE][..]);
    Whole { len: bytes.len() as u64, pages: pages.map(|(page, at)| (at, page.to_vec())).collect() }
});

impl Whole {
    fn lay_down(&self) -> File {
        let file = File::create(FOLDER.join(FILE)).expect("room in memory");
        file.set_len(self.len).expect("zeros take no room");
        self.pages.iter().for_each(|(at, page)| file.write_all_at(page, *at).expect("room in memory"));
        file
    }
}

/// In the ring's table.
const ENTRIES: usize = 20;
const PAGE: usize = 4096;
