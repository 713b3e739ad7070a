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
//! recorded; the next one opens the file again, so what was in the way may go away. Whoever asks is told while commits
//! fail. The file is locked by redb; a second agent on the same folder refuses to start.

mod file;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use vfio_checkpoint_device::{Executor, Lane, chain};
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, Epoch, LogicalDeviceId, OperationName};

use self::file::{File, Opens};
use crate::environment::UnixMillis;
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
    lane: Box<dyn Lane>,
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

/// A request id, which is its caller's own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestKey {
    /// The identity that used it.
    pub caller: String,
    /// The id.
    pub request_id: String,
}

impl RequestKey {
    /// As the journal's key. No identity holds a line break, so no two keys are the same.
    fn text(&self) -> String {
        format!("{}\n{}", self.caller, self.request_id)
    }

    fn parse(text: &str) -> Option<Self> {
        let (caller, request_id) = text.split_once('\n')?;
        Some(Self { caller: caller.to_owned(), request_id: request_id.to_owned() })
    }
}

/// What a request id stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestRecord {
    /// Digest of the request without the id, as 64 hexadecimal digits.
    pub digest: String,
    /// When it came.
    pub at: UnixMillis,
    /// What it brought.
    pub answer: RequestAnswer,
}

/// What a request brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RequestAnswer {
    /// An operation.
    Operation(OperationName),
    /// A device was reset.
    Reset {
        /// Whether its state is gone. None while the reset was under way: the agent ended before it was known.
        state_lost: Option<bool>,
    },
}

/// What is to be done to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owed {
    /// To mark it INCONSISTENT.
    Inconsistent,
    /// To discard it. It goes beyond a mark.
    Discard,
}

/// What is still to be done to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebtRecord {
    /// That.
    pub owed: Owed,
}

/// What lives in a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// The logical device.
    pub logical: LogicalDeviceId,
    /// Its epoch.
    pub epoch: Epoch,
    /// What its state moved at, the last time that was measured.
    pub rate_bytes_per_second: Option<u64>,
    /// It waits for somebody to decide.
    pub quarantined: bool,
    /// It was left stopped on request.
    pub left_stopped: bool,
    /// What lived in it before, as far as it has to be known whether that may run still. The last is the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub past: Vec<PastRecord>,
}

/// A logical device that a reset discarded, or that was brought back to life after that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PastRecord {
    /// Which logical device.
    pub logical: LogicalDeviceId,
    /// Under which epoch.
    pub epoch: Epoch,
    /// It was discarded while nobody else could have it.
    pub runs_nowhere: bool,
}

impl DeviceRecord {
    /// The most that is kept of the past. What is forgotten counts as running somewhere, which is the safe side.
    const MAX_PAST: usize = 64;

    /// The record of a device whose state was discarded: `new` lives in it.
    #[must_use]
    pub fn after_discard(self, new: LogicalDeviceId) -> Self {
        // What was left stopped, or stands still because nobody knows what it is, may have been brought to run elsewhere
        // meanwhile: that it is discarded here says nothing of that.
        let runs_nowhere = !self.left_stopped && !self.quarantined;
        let past = PastRecord { logical: self.logical.clone(), epoch: self.epoch, runs_nowhere };
        Self { logical: new, epoch: Epoch(1), ..self }.with_past(past)
    }

    /// Notes what became of a logical device.
    #[must_use]
    pub fn with_past(mut self, past: PastRecord) -> Self {
        self.past.retain(|before| before.logical != past.logical);
        self.past.push(past);
        if self.past.len() > Self::MAX_PAST {
            // One that may run somewhere is what keeps an older record, of another device, from being believed.
            let first = self.past.iter().position(|past| past.runs_nowhere).unwrap_or(0);
            self.past.remove(first);
        }
        self
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
    /// Opens the journal in `folder`, and makes both where they are not there. Blocks.
    pub fn open(folder: &Path, executor: &dyn Executor) -> Result<Self, JournalError> {
        Self::open_by(folder, executor, Box::new(file::on_disk))
    }

    fn open_by(folder: &Path, executor: &dyn Executor, opens: Opens) -> Result<Self, JournalError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|source| JournalError::Folder { path: folder.to_owned(), source })?;
        let mut file = File::open(folder.join("journal.redb"), opens)?;
        let path = file.path().to_owned();
        file.run(|database| prepare(database, &path))?;
        let lane = executor.lane("journal").map_err(JournalError::Lane)?;
        let (file, failing) = (Arc::new(Mutex::new(file)), watch::Sender::new(false));
        Ok(Self { shared: Arc::new(Shared { path, file, failing, lane }) })
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
        self.shared.lane.submit(Box::new(move || {
            reached(format_args!("before {}", Announced(&changes)));
            let written = locked(&file).run(|database| write(database, &changes));
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

fn write(database: &Database, changes: &[Change]) -> Result<(), JournalError> {
    let mut transaction = database.begin_write().map_err(JournalError::storage)?;
    transaction.set_durability(Durability::Immediate).map_err(JournalError::storage)?;
    {
        let mut operations = transaction.open_table(OPERATIONS).map_err(JournalError::storage)?;
        let mut requests = transaction.open_table(REQUESTS).map_err(JournalError::storage)?;
        let mut devices = transaction.open_table(DEVICES).map_err(JournalError::storage)?;
        let mut debts = transaction.open_table(DEBTS).map_err(JournalError::storage)?;
        for change in changes {
            match change {
                Change::Operation(record) => {
                    let name = record.name.to_string();
                    let text = encode("operations", &name, record)?;
                    operations.insert(name.as_str(), text.as_slice()).map_err(JournalError::storage)?;
                }
                Change::ForgetOperation(name) => {
                    operations.remove(name.to_string().as_str()).map_err(JournalError::storage)?;
                }
                Change::Request(key, record) => {
                    let text = encode("requests", &key.request_id, record)?;
                    requests.insert(key.text().as_str(), text.as_slice()).map_err(JournalError::storage)?;
                }
                Change::ForgetRequest(key) => {
                    requests.remove(key.text().as_str()).map_err(JournalError::storage)?;
                }
                Change::Device(name, record) => {
                    let name = name.to_string();
                    let text = encode("devices", &name, record)?;
                    devices.insert(name.as_str(), text.as_slice()).map_err(JournalError::storage)?;
                }
                Change::Debt(name, record) => {
                    let name = name.to_string();
                    let text = encode("debts", &name, record)?;
                    debts.insert(name.as_str(), text.as_slice()).map_err(JournalError::storage)?;
                }
                Change::ForgetDebt(name) => {
                    debts.remove(name.to_string().as_str()).map_err(JournalError::storage)?;
                }
            }
        }
    }
    transaction.commit().map_err(JournalError::storage)
}

fn encode(table: &'static str, key: &str, record: &impl Serialize) -> Result<Vec<u8>, JournalError> {
    serde_json::to_vec(record).map_err(|source| JournalError::Record { table, key: key.to_owned(), source })
}
