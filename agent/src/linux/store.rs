//! The state file `weft.redb`: a few tables of bytes, changed all at once or not at all.
//!
//! ```text
//!   meta         format, universe, node name, incarnation, key of the data plane
//!   ring         start address          -> token
//!   allocations  address                -> who has it
//!   resting      address                -> when it was freed
//!   items        channel, 0, key        -> a gossiped item that is to last, such as a death
//! ```
//!
//! Calls block for as long as the disk takes.

use crate::types::{DataSecret, Incarnation, PeerName, Universe};
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend, StorageError, TableDefinition,
    backends::InMemoryBackend,
};
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};
use zeroize::Zeroizing;

/// The open state file, locked against other agents until all clones are gone.
#[derive(Clone, Debug)]
pub struct Store {
    /// Closed after a failed write, to be opened anew with the next: the database takes no more after an I/O error,
    /// but a full disk may have room again.
    database: Arc<Mutex<Option<Database>>>,
    path: Arc<Path>,
}

/// How the state file was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreState {
    Opened,
    Created,
    /// It could not be read; what there is now is empty.
    Damaged {
        moved_to: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    Meta,
    Ring,
    Allocations,
    Resting,
    Items,
}

/// One entry to put, or to remove where the value is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub table: Table,
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// A key and its value.
pub type Entry = (Vec<u8>, Vec<u8>);

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{} is locked: another agent runs with this --state-dir", .0.display())]
    Locked(PathBuf),
    #[error("{} belongs to universe {stored}, but --universe is {given}; use that one, or `weft reset` this node first", path.display())]
    AnotherUniverse { path: PathBuf, stored: String, given: Universe },
    #[error("{} belongs to node {stored}, but --name is {given}; use that one, or `weft reset` this node first", path.display())]
    AnotherName { path: PathBuf, stored: String, given: PeerName },
    #[error("{} has format {stored}, but this version of weft reads format {FORMAT}; start the version that wrote it", path.display())]
    AnotherFormat { path: PathBuf, stored: u32 },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: {error}", path.display())]
    Database { path: PathBuf, error: Box<redb::Error> },
}

impl Store {
    /// Opens the state file in `dir`, makes it where there is none, and moves it aside where it is damaged.
    ///
    /// # Errors
    /// The file is another agent's, another node's or universe's, or the directory cannot be written.
    pub fn open(dir: &Path, name: &PeerName, universe: &Universe) -> Result<(Self, StoreState), StoreError> {
        let path = dir.join(FILE);
        let io_error = |error| StoreError::Io { path: dir.into(), error };
        // One that is there keeps its mode: it may be shared, or named by mistake. The files in it are ours alone.
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error)?;
        if !path.try_exists().map_err(io_error)? {
            return Ok((Self::create(dir, name, universe)?, StoreState::Created));
        }
        // The database checks its input with assertions in places: garbage must not take the agent down.
        let opened = catch_unwind(AssertUnwindSafe(|| open_checked(&path)));
        let reason = match opened {
            Ok(Ok(database)) => {
                let store = Self::of(database, &path);
                match catch_unwind(AssertUnwindSafe(|| store.check_meta(name, universe))) {
                    Ok(Ok(true)) => return Ok((store, StoreState::Opened)),
                    Ok(Ok(false)) => "it has no format version".to_owned(),
                    Ok(Err(StoreError::Database { error, .. })) => error.to_string(),
                    Ok(Err(error)) => return Err(error),
                    Err(_) => "reading it failed".into(),
                }
            }
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => return Err(StoreError::Locked(path)),
            Ok(Err(DatabaseError::Storage(StorageError::Io(error)))) if !is_damage(&error) => {
                return Err(StoreError::Io { path, error });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "opening it failed".into(),
        };
        let moved_to = move_aside(dir).map_err(io_error)?;
        tracing::error!(
            file = %dir.join(FILE).display(), moved_to = %moved_to.display(), %reason,
            "the state file is damaged: starting with an empty one; address space is learned from peers, addresses from veths"
        );
        Ok((Self::create(dir, name, universe)?, StoreState::Damaged { moved_to }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// This start's incarnation: later than all before, also if the clock went back. It is written down.
    pub fn next_incarnation(&self, unix_micros: u64) -> Result<Incarnation, StoreError> {
        let last = self.meta(INCARNATION)?.and_then(|bytes| Some(u64::from_be_bytes(bytes.try_into().ok()?)));
        let next = last.map_or(unix_micros, |last| unix_micros.max(last.saturating_add(1)));
        self.commit(&[meta_write(INCARNATION, &next.to_be_bytes())])?;
        Ok(Incarnation(next))
    }

    /// This node's key of the data plane: the one from before, or `fresh`, which is then written down.
    pub fn data_secret(&self, fresh: DataSecret) -> Result<DataSecret, StoreError> {
        let stored = self.meta(DATA_SECRET)?.map(Zeroizing::new);
        if let Some(bytes) = stored.and_then(|bytes| bytes.as_slice().try_into().ok()) {
            return Ok(DataSecret::new(bytes));
        }
        self.commit(&[meta_write(DATA_SECRET, fresh.bytes())])?;
        Ok(fresh)
    }

    /// Removes the file: what was never in use need not be remembered.
    pub fn discard(self) -> Result<(), StoreError> {
        fs::remove_file(&self.path).map_err(|error| StoreError::Io { path: self.path.to_path_buf(), error })
    }

    /// Writes all or nothing; on disk when it returns.
    pub fn commit(&self, writes: &[Write]) -> Result<(), StoreError> {
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let mut write = || -> Result<(), redb::Error> {
            let open = match &mut *database {
                Some(open) => open,
                none => none.insert(Database::open(&self.path)?),
            };
            let transaction = open.begin_write()?;
            for table in ALL {
                let mut open = None;
                for write in writes.iter().filter(|write| write.table == table) {
                    let open = match &mut open {
                        Some(open) => open,
                        none => none.insert(transaction.open_table(table.definition())?),
                    };
                    match &write.value {
                        Some(value) => open.insert(&*write.key, &**value)?,
                        None => open.remove(&*write.key)?,
                    };
                }
            }
            Ok(transaction.commit()?)
        };
        write().map_err(|error| {
            *database = None;
            self.error(error)
        })
    }

    /// All entries of a table in the order of their keys.
    pub fn read(&self, table: Table) -> Result<Vec<Entry>, StoreError> {
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let mut read = || -> Result<_, redb::Error> {
            let open = match &mut *database {
                Some(open) => open,
                none => none.insert(Database::open(&self.path)?),
            };
            let table = open.begin_read()?.open_table(table.definition())?;
            let mut entries = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                entries.push((key.value().to_vec(), value.value().to_vec()));
            }
            Ok(entries)
        };
        read().map_err(|error| self.error(error))
    }

    fn of(database: Database, path: &Path) -> Self {
        Self { database: Arc::new(Mutex::new(Some(database))), path: path.into() }
    }

    /// A new file is made under another name, so that the state file is never half there.
    fn create(dir: &Path, name: &PeerName, universe: &Universe) -> Result<Self, StoreError> {
        let (path, new) = (dir.join(FILE), dir.join(NEW_FILE));
        let io_error = |error| StoreError::Io { path: new.clone(), error };
        let database_error =
            |error: redb::Error| StoreError::Database { path: new.clone(), error: Box::new(error) };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&new).map_err(io_error)?;
        if file.try_lock().is_err() {
            return Err(StoreError::Locked(new));
        }
        file.set_len(0).map_err(io_error)?;
        let make = || -> Result<Database, redb::Error> {
            let database = redb::Builder::new().create_file(file)?;
            let transaction = database.begin_write()?;
            for table in ALL {
                transaction.open_table(table.definition())?;
            }
            transaction.commit()?;
            Ok(database)
        };
        let store = Self::of(make().map_err(database_error)?, &path);
        store.commit(&[
            meta_write(FORMAT_KEY, &FORMAT.to_be_bytes()),
            meta_write(UNIVERSE, universe.to_string().as_bytes()),
            meta_write(NAME, name.as_str().as_bytes()),
        ])?;
        fs::rename(&new, &path).and_then(|()| File::open(dir)?.sync_all()).map_err(io_error)?;
        Ok(store)
    }

    /// False where the file is a database but not a state file.
    fn check_meta(&self, name: &PeerName, universe: &Universe) -> Result<bool, StoreError> {
        let path = || self.path.to_path_buf();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let format =
            self.meta(FORMAT_KEY)?.and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?)));
        let Some(format) = format else { return Ok(false) };
        if format != FORMAT {
            return Err(StoreError::AnotherFormat { path: path(), stored: format });
        }
        let stored = self.meta(UNIVERSE)?.map(text).unwrap_or_default();
        if stored != universe.to_string() {
            return Err(StoreError::AnotherUniverse { path: path(), stored, given: *universe });
        }
        let stored = self.meta(NAME)?.map(text).unwrap_or_default();
        if stored != name.as_str() {
            return Err(StoreError::AnotherName { path: path(), stored, given: name.clone() });
        }
        for table in ALL {
            self.read(table)?;
        }
        Ok(true)
    }

    fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let entries = self.read(Table::Meta)?;
        Ok(entries.into_iter().find(|(name, _)| name == key.as_bytes()).map(|(_, value)| value))
    }

    fn error(&self, error: redb::Error) -> StoreError {
        StoreError::Database { path: self.path.to_path_buf(), error: Box::new(error) }
    }
}

impl Table {
    fn definition(self) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
        TableDefinition::new(match self {
            Self::Meta => "meta",
            Self::Ring => "ring",
            Self::Allocations => "allocations",
            Self::Resting => "resting",
            Self::Items => "items",
        })
    }
}

fn meta_write(key: &str, value: &[u8]) -> Write {
    Write { table: Table::Meta, key: key.into(), value: Some(value.into()) }
}

/// Opens a file that exists; one that was repaired by falling back to an older state counts as damaged, because an
/// older state may own what has been given away since.
fn open_checked(path: &Path) -> Result<Database, DatabaseError> {
    if fs::metadata(path)?.len() == 0 {
        return Err(StorageError::Corrupted("the file is empty".into()).into());
    }
    try_copy(path)?;
    let mut database = Database::open(path)?;
    match database.check_integrity()? {
        true => Ok(database),
        false => Err(StorageError::Corrupted("its checksums do not match".into()).into()),
    }
}

/// Opens a copy in memory as if its last user had been killed: the database then checks each page before it goes where the
/// page says. A file that was closed it trusts, and where one number in it is wrong it takes four gigabytes.
fn try_copy(path: &Path) -> Result<(), DatabaseError> {
    let mut bytes = fs::read(path)?;
    let Some(flags) = bytes.get_mut(FLAGS_AT).filter(|flags| **flags & CLOSED != 0) else { return Ok(()) };
    *flags &= !CLOSED;
    let copy = InMemoryBackend::new();
    copy.set_len(bytes.len() as u64)?;
    copy.write(0, &bytes)?;
    let mut builder = redb::Builder::new();
    builder.set_repair_callback(|session| {
        if OLDER_STATE.contains(&session.progress()) {
            session.abort();
        }
    });
    builder.create_with_backend(copy).map(drop)
}

fn is_damage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
    )
}

fn move_aside(dir: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let free = |seconds: &u64| !dir.join(format!("{FILE}.damaged-{seconds}")).exists();
    let seconds = (seconds..).find(free).expect("there are free names");
    let aside = dir.join(format!("{FILE}.damaged-{seconds}"));
    fs::rename(dir.join(FILE), &aside)?;
    Ok(aside)
}

pub const FILE: &str = "weft.redb";
/// Where redb has its flags, and the one that says that all of it was written for good, as when the file is closed.
const FLAGS_AT: usize = 9;
const CLOSED: u8 = 4;
/// What it says of the progress of a repair before it takes an older state; the other steps are 0, 0.6 and 0.9.
const OLDER_STATE: Range<f64> = 0.1..0.5;
const NEW_FILE: &str = "weft.redb.new";
const ALL: [Table; 5] = [Table::Meta, Table::Ring, Table::Allocations, Table::Resting, Table::Items];

/// Version of what the tables hold.
const FORMAT: u32 = 1;
const FORMAT_KEY: &str = "format";
const UNIVERSE: &str = "universe";
const NAME: &str = "name";
const INCARNATION: &str = "incarnation";
const DATA_SECRET: &str = "data secret";

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    fn open(dir: &Path) -> Result<(Store, StoreState), StoreError> {
        Store::open(dir, &"a".parse().unwrap(), &"10.32.0.0/12".parse().unwrap())
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn put(key: u32, value: &[u8]) -> Write {
        Write { table: Table::Ring, key: key.to_be_bytes().into(), value: Some(value.into()) }
    }

    #[test]
    fn what_is_committed_is_there_after_a_restart() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("state");
        let (store, state) = open(&dir).unwrap();
        assert_eq!(state, StoreState::Created);
        let later = store.next_incarnation(100).unwrap();
        store.commit(&[put(1, b"one"), put(2, b"two"), Write { value: None, ..put(1, b"") }]).unwrap();
        drop(store);
        let (store, state) = open(&dir).unwrap();
        assert_eq!(state, StoreState::Opened);
        assert_eq!(store.read(Table::Ring).unwrap(), [(vec![0, 0, 0, 2], b"two".to_vec())]);
        assert_eq!(store.next_incarnation(50).unwrap(), Incarnation(later.0 + 1), "the clock went back");
        assert_eq!((mode(&dir), mode(store.path())), (0o700, 0o600));
    }

    #[test]
    fn the_data_planes_key_stays_the_same() {
        let temp = tempfile::tempdir().unwrap();
        let (store, _) = open(temp.path()).unwrap();
        assert_eq!(store.data_secret(DataSecret::new([7; 32])).unwrap().bytes(), &[7; 32]);
        assert_eq!(store.data_secret(DataSecret::new([8; 32])).unwrap().bytes(), &[7; 32]);
    }

    #[test]
    fn a_directory_that_is_there_keeps_its_mode() {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), Permissions::from_mode(0o755)).unwrap();
        let (store, _) = open(temp.path()).unwrap();
        assert_eq!((mode(temp.path()), mode(store.path())), (0o755, 0o600));
    }

    #[test]
    fn a_state_file_is_not_mistaken_for_this_nodes() {
        let temp = tempfile::tempdir().unwrap();
        let (store, _) = open(temp.path()).unwrap();
        assert!(
            open(temp.path()).unwrap_err().to_string().contains("another agent runs with this --state-dir")
        );
        drop(store);
        let refused = |name: &str, universe: &str| {
            Store::open(temp.path(), &name.parse().unwrap(), &universe.parse().unwrap())
                .unwrap_err()
                .to_string()
        };
        assert!(refused("a", "10.0.0.0/8").contains("universe 10.32.0.0/12, but --universe is 10.0.0.0/8"));
        assert!(refused("b", "10.32.0.0/12").contains("node a, but --name is b"));
    }

    #[test]
    fn a_killed_agent_leaves_all_that_was_committed() {
        let temp = tempfile::tempdir().unwrap();
        let (living, dead) = (temp.path().join("living"), temp.path().join("dead"));
        let (store, _) = open(&living).unwrap();
        fs::create_dir(&dead).unwrap();
        for round in 1..40 {
            store.commit(&[put(round, &[7; 500]), put(round / 2, b"again")]).unwrap();
            fs::copy(living.join(FILE), dead.join(FILE)).unwrap();
            let (copy, state) = open(&dead).unwrap();
            assert_eq!(state, StoreState::Opened, "after {round} commits");
            assert_eq!(copy.read(Table::Ring).unwrap(), store.read(Table::Ring).unwrap());
        }
    }

    #[test]
    fn a_damaged_file_is_moved_aside() {
        let temp = tempfile::tempdir().unwrap();
        let (store, _) = open(temp.path()).unwrap();
        store.commit(&(0..2000).map(|n| put(n, &[7; 100])).collect::<Vec<_>>()).unwrap();
        drop(store);
        let file = temp.path().join(FILE);
        let good = fs::read(&file).unwrap();
        assert_ne!(good[FLAGS_AT] & CLOSED, 0);
        let mut seed = 7u64;
        let mut random = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize
        };
        for round in 0..60 {
            let mut bytes = good.clone();
            match round % 3 {
                0 => bytes.truncate(good.len() * round / 60),
                1 => bytes = (0..round * 50).map(|_| random() as u8).collect(),
                _ => (0..1 + round).for_each(|_| {
                    let at = random() % if round % 2 == 0 { 4096 } else { good.len() };
                    bytes[at] = random() as u8;
                }),
            }
            fs::write(&file, &bytes).unwrap();
            match open(temp.path()).unwrap() {
                (store, StoreState::Damaged { moved_to }) => {
                    assert_eq!(store.read(Table::Ring).unwrap(), []);
                    assert_eq!(fs::read(&moved_to).unwrap().len(), bytes.len());
                    fs::remove_file(moved_to).unwrap();
                }
                // A change in a byte that is not in use is no damage.
                (store, StoreState::Opened) => assert_eq!(store.read(Table::Ring).unwrap().len(), 2000),
                (_, StoreState::Created) => panic!("the file was there"),
            }
            fs::remove_file(&file).unwrap();
        }
    }

    #[test]
    fn a_damaged_reference_does_not_cost_gigabytes() {
        let temp = tempfile::tempdir().unwrap();
        let (store, _) = open(temp.path()).unwrap();
        store.commit(&(0..20).map(|n| put(n, &[7; 100])).collect::<Vec<_>>()).unwrap();
        drop(store);
        let file = temp.path().join(FILE);
        let good = fs::read(&file).unwrap();
        let page = |at: usize| u64::from_le_bytes(*good[at..].first_chunk().unwrap());
        let mut tried = 0;
        // What may be the number of a page becomes that of the largest that there can be.
        for at in (0..good.len() - 8).filter(|at| (1..good.len() as u64 / 4096).contains(&page(*at))) {
            let mut bytes = good.clone();
            bytes[at + 7] = 20 << 3;
            fs::write(&file, &bytes).unwrap();
            if let (_, StoreState::Damaged { moved_to }) = open(temp.path()).unwrap() {
                tried += 1;
                fs::remove_file(moved_to).unwrap();
            }
        }
        assert!(tried > 10, "{tried} were in use");
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
        let kilobytes: u64 = peak.trim_end_matches(" kB").parse().unwrap();
        assert!(kilobytes < 1 << 20, "{peak}");
    }
}
