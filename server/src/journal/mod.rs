//! What the agent must still know after it was killed.
//!
//! ```text
//!   operation task --commit(changes)--> journal's own lane --one transaction, synced--> redb file
//!   start of the agent <-------------------- load() ------------------------------------/
//! ```
//! One file, one writer. A commit is durable when its future is ready, and all of its changes are there or none: a
//! request id and the operation that it stands for, for one, can never be apart.
//!
//! # Invariants
//! - What is announced by a commit is done only after the commit returned.
//! - Nothing that the journal does not understand is thrown away: the agent refuses to start instead.
//!
//! # Failure paths
//! A commit that fails (no space, an I/O error) fails the step that it announces, so nothing is done that is not
//! recorded; the next one opens the file again, so what was in the way may go away. What failed may be durable all the
//! same, and whoever announced it is told that it is not: what it changed is taken back at once, or, where that fails too,
//! before the next commit. An agent that dies in between finds a step that was never done, and something else was perhaps. Whoever asks is told while commits
//! fail. The file is locked by redb; a second agent on the same folder refuses to start.

mod file;
mod records;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use tokio::sync::{oneshot, watch};
use vfio_checkpoint_device::{Executor, Lane, chain};
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, OperationName};

pub use self::records::{
    DebtRecord, DeviceRecord, Owed, PastRecord, RequestAnswer, RequestKey, RequestRecord,
};

use self::file::File;
pub use self::file::{Disk, Files, Wanted};
use crate::failpoint::{failing, reached};
use crate::operation::record::OperationRecord;

/// Version of what is in the file. A file of another version is refused.
const FORMAT: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const OPERATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("operations");
const REQUESTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("requests");
const DEVICES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("devices");
/// Not there in a file of an agent that had no debts. It is made when the file is opened.
const DEBTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("debts");

/// The journal. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Journal {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    file: Arc<Mutex<File>>,
    /// Whether the last commit failed.
    failing: watch::Sender<bool>,
    /// How long commits took.
    syncs: Arc<Mutex<Syncs>>,
    lane: Box<dyn Lane>,
    clock: Arc<dyn Executor>,
}

/// How long commits took until they were durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Syncs {
    /// How many there were.
    pub count: u64,
    /// All of them together.
    pub total: Duration,
    /// About the last few: a moving average.
    pub usual: Duration,
}

impl Syncs {
    /// Takes in one.
    fn took(&mut self, took: Duration) {
        self.usual = if self.count == 0 { took } else { (self.usual * 7 + took) / 8 };
        self.count += 1;
        self.total = self.total.saturating_add(took);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What is written in one commit.
#[derive(Debug, Clone)]
pub enum Change {
    /// An operation as it is now.
    Operation(Box<OperationRecord>),
    /// A finished operation that nobody asks for any more.
    ForgetOperation(OperationName),
    /// What a request id stands for.
    Request(RequestKey, RequestRecord),
    /// A request id that may be used anew.
    ForgetRequest(RequestKey),
    /// What lives in a device.
    Device(DeviceName, DeviceRecord),
    /// What is still to be done to a checkpoint, whose store did not take it.
    Debt(CheckpointName, DebtRecord),
    /// It was done.
    ForgetDebt(CheckpointName),
}

/// What a commit announces, in a word: the step of the operation that it is about, where it is about one.
struct Announced<'a>(&'a [Change]);

impl fmt::Display for Announced<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = self.0.iter().find_map(|change| match change {
            Change::Operation(record) => Some(record.step.name()),
            Change::ForgetOperation(_)
            | Change::Request(..)
            | Change::ForgetRequest(_)
            | Change::Device(..)
            | Change::Debt(..)
            | Change::ForgetDebt(_) => None,
        });
        write!(f, "commit of {}", step.unwrap_or("devices"))
    }
}

/// All that the journal holds.
#[derive(Debug, Default)]
pub struct Recorded {
    /// By name, the oldest first.
    pub operations: Vec<OperationRecord>,
    /// By caller and id.
    pub requests: Vec<(RequestKey, RequestRecord)>,
    /// By name.
    pub devices: Vec<(DeviceName, DeviceRecord)>,
    /// By checkpoint.
    pub debts: Vec<(CheckpointName, DebtRecord)>,
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The folder cannot be made or used.
    #[error("the journal's folder {} cannot be used", path.display())]
    Folder {
        /// Which folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is there, and nothing is in it: what devices may do is not known.
    #[error(
        "the journal {} is empty, so what was in it is lost: put its backup in its place; or, where nothing that was saved \
         here can run elsewhere, remove the file, and devices that the holder keeps begin as quarantined",
        path.display()
    )]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// Another agent has it open.
    #[error("the journal {} is in use; is another agent running with the same node.state_dir?", path.display())]
    InUse {
        /// Which file.
        path: PathBuf,
        /// What says so.
        #[source]
        source: redb::DatabaseError,
    },
    /// It is no journal, or the disk does not do its part.
    #[error("the journal {} cannot be opened", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: redb::DatabaseError,
    },
    /// What is in it is not what was written.
    #[error(
        "the journal {} is damaged ({found}): put its backup in its place; or, where nothing that was saved here can run \
         elsewhere, move the file away, and devices that the holder keeps begin as quarantined",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// It was written by a later version.
    #[error("the journal {} has format {found} and this agent knows format {FORMAT}; run the agent that wrote it", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What it has.
        found: u64,
    },
    /// A record cannot be understood. Nothing was changed.
    #[error("the record `{key}` in table {table} of the journal cannot be understood")]
    Record {
        /// In which table.
        table: &'static str,
        /// Which one.
        key: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// Reading or writing failed.
    #[error("the journal cannot be read or written")]
    Storage(#[source] Box<redb::Error>),
    /// Its thread cannot be started.
    #[error("the journal's thread cannot be started")]
    Lane(#[source] io::Error),
    /// Its thread died.
    #[error("the journal's thread died, which is a defect to report; restart the agent")]
    Died,
}

impl JournalError {
    fn storage(error: impl Into<redb::Error>) -> Self {
        Self::Storage(Box::new(error.into()))
    }

    /// Whether the file or the disk is the reason, and not what was to be written or is written there.
    fn is_of_storage(&self) -> bool {
        match self {
            Self::Folder { .. }
            | Self::Empty { .. }
            | Self::InUse { .. }
            | Self::Open { .. }
            | Self::Damaged { .. }
            | Self::Storage(_) => true,
            Self::Format { .. } | Self::Record { .. } | Self::Lane(_) | Self::Died => false,
        }
    }
}

impl Journal {
    /// Opens the journal in `folder` of `disk`, and makes both where they are not there. Blocks.
    pub fn open(
        folder: &Path,
        executor: &Arc<dyn Executor>,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, JournalError> {
        disk.make_folder(folder)
            .map_err(|source| JournalError::Folder { path: folder.to_owned(), source })?;
        let mut file = File::open(folder.join("journal.redb"), disk)?;
        let path = file.path().to_owned();
        file.run(|database| prepare(database, &path))?;
        let lane = executor.lane("journal").map_err(JournalError::Lane)?;
        let (file, failing) = (Arc::new(Mutex::new(file)), watch::Sender::new(false));
        let (syncs, clock) = (Arc::default(), Arc::clone(executor));
        Ok(Self { shared: Arc::new(Shared { path, file, failing, syncs, lane, clock }) })
    }

    /// How long commits took so far.
    pub fn syncs(&self) -> Syncs {
        *self.shared.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether commits fail, and when that changes. It ends with the journal.
    pub fn failing(&self) -> watch::Receiver<bool> {
        self.shared.failing.subscribe()
    }

    /// Reads everything. Blocks.
    pub fn load(&self) -> Result<Recorded, JournalError> {
        locked(&self.shared.file).run(load)
    }

    /// Writes `changes`, all or none; they are durable when this returns.
    ///
    /// Where the future is dropped the commit goes on.
    pub async fn commit(&self, changes: Vec<Change>) -> Result<(), JournalError> {
        if let Err(error) = failing(&self.shared.path, format_args!("{}", Announced(&changes))) {
            let failed = Err(JournalError::storage(redb::Error::Io(error)));
            tell_of(&self.shared.failing, &failed);
            return failed;
        }
        let (answer, answered) = oneshot::channel();
        let (file, tell) = (Arc::clone(&self.shared.file), self.shared.failing.clone());
        let (syncs, clock) = (Arc::clone(&self.shared.syncs), Arc::clone(&self.shared.clock));
        self.shared.lane.submit(Box::new(move || {
            reached(format_args!("before {}", Announced(&changes)));
            let begun = clock.now();
            let written = locked(&file).commit(&changes);
            let took = clock.now().saturating_sub(begun);
            syncs.lock().unwrap_or_else(PoisonError::into_inner).took(took);
            reached(format_args!("after {}", Announced(&changes)));
            tell_of(&tell, &written);
            // Whoever hears of the last commit may close the journal and open it again.
            drop((file, tell));
            // Nobody waits where the operation was dropped.
            let _ = answer.send(written);
        }));
        answered.await.unwrap_or(Err(JournalError::Died))
    }

    /// Ready once every commit before has come to its end, also where nobody waits for it any more.
    pub async fn settled(&self) {
        let (answer, answered) = oneshot::channel::<()>();
        self.shared.lane.submit(Box::new(move || drop(answer)));
        // The end of it is the answer, also where the thread died.
        let _ = answered.await;
    }
}

fn locked(file: &Mutex<File>) -> MutexGuard<'_, File> {
    file.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes in how a commit went. What is wrong with a single record says nothing of the others.
fn tell_of(failing: &watch::Sender<bool>, written: &Result<(), JournalError>) {
    let fails = written.is_err();
    if written.as_ref().is_err_and(|error| !error.is_of_storage()) {
        return;
    }
    let changed = failing.send_if_modified(|failing| std::mem::replace(failing, fails) != fails);
    match written {
        Ok(()) if changed => tracing::info!("the journal is written again"),
        Err(error) if changed => tracing::error!(
            error = %chain(error),
            "the journal cannot be written: nothing new is begun; look whether node.state_dir has room and its disk is sound"
        ),
        Ok(()) | Err(_) => {}
    }
}

/// Makes the tables, and checks the format of a file that was there.
fn prepare(database: &Database, path: &Path) -> Result<(), JournalError> {
    let transaction = database.begin_write().map_err(JournalError::storage)?;
    {
        let mut meta = transaction.open_table(META).map_err(JournalError::storage)?;
        let found = meta.get("format").map_err(JournalError::storage)?.map(|format| format.value());
        match found {
            None => {
                meta.insert("format", FORMAT).map_err(JournalError::storage)?;
            }
            Some(FORMAT) => {}
            Some(found) => return Err(JournalError::Format { path: path.to_owned(), found }),
        }
        transaction.open_table(OPERATIONS).map_err(JournalError::storage)?;
        transaction.open_table(REQUESTS).map_err(JournalError::storage)?;
        transaction.open_table(DEVICES).map_err(JournalError::storage)?;
        transaction.open_table(DEBTS).map_err(JournalError::storage)?;
    }
    transaction.commit().map_err(JournalError::storage)
}

fn load(database: &Database) -> Result<Recorded, JournalError> {
    let transaction = database.begin_read().map_err(JournalError::storage)?;
    let operations = rows::<OperationRecord>(&transaction, OPERATIONS, "operations")?;
    let requests = rows::<RequestRecord>(&transaction, REQUESTS, "requests")?;
    let devices = rows::<DeviceRecord>(&transaction, DEVICES, "devices")?;
    let debts = rows::<DebtRecord>(&transaction, DEBTS, "debts")?;
    Ok(Recorded {
        operations: operations.into_iter().map(|(_, record)| record).collect(),
        requests: requests
            .into_iter()
            .filter_map(|(key, record)| Some((RequestKey::parse(&key)?, record)))
            .collect(),
        devices: devices.into_iter().filter_map(|(key, record)| Some((key.parse().ok()?, record))).collect(),
        debts: debts.into_iter().filter_map(|(key, record)| Some((key.parse().ok()?, record))).collect(),
    })
}

fn rows<T: DeserializeOwned>(
    transaction: &redb::ReadTransaction,
    table: TableDefinition<'_, &str, &[u8]>,
    name: &'static str,
) -> Result<Vec<(String, T)>, JournalError> {
    let table = transaction.open_table(table).map_err(JournalError::storage)?;
    let mut found = Vec::new();
    for row in table.iter().map_err(JournalError::storage)? {
        let (key, value) = row.map_err(JournalError::storage)?;
        let key = key.value().to_owned();
        match serde_json::from_slice(value.value()) {
            Ok(record) => found.push((key, record)),
            Err(source) => return Err(JournalError::Record { table: name, key, source }),
        }
    }
    Ok(found)
}
