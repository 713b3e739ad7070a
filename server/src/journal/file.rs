//! The journal's file: opened, and opened again after it failed.
//!
//! ```text
//!   run(work) --> Some(database) --work--> Ok
//!        ^                          \----> storage error or panic: dropped
//!        '---- None: opened again, which repairs it --- the next run
//! ```
//! redb takes no call after an I/O error, because what it has in memory may not be what is on disk. Opening the file
//! again reads it, so a disk that was full once is no reason to end the agent, which may have stopped devices.
//!
//! # Invariants
//! - A file is begun at the first opening alone. One that is gone later is not begun anew: what it said is not known.
//! - A file is begun under another name, and gets its own once it is whole and on the disk.
//! - A panic of redb, which it has for files that were damaged, ends neither the agent nor the journal's thread.
//!
//! # Failure paths
//! Where the file cannot be opened again the run fails, and the next one tries again.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Builder, Database, DatabaseError, StorageError};
use vfio_checkpoint_device::chain;

use super::write::{Doubts, settle, write};
use super::{Change, JournalError};

/// Where the journal's file lies. Called from the journal's lane, or from one that may block.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Makes the folder where it is not there.
    fn make_folder(&self, folder: &Path) -> io::Result<()>;

    /// Whether the file is there, and nothing is in it.
    fn is_empty(&self, path: &Path) -> bool;

    /// Opens the database. What it syncs is there still after whatever ends the machine.
    fn open(&self, path: &Path, wanted: Wanted) -> Result<Database, DatabaseError>;
}

/// What is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A file that is there, or a new one.
    OldOrNew,
    /// The file that was open before.
    Old,
}

/// The file, open or to be opened again.
pub(super) struct File {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    database: Option<Database>,
    doubts: Doubts,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File").field("path", &self.path).finish_non_exhaustive()
    }
}

impl File {
    /// Opens it, and begins it where it is not there.
    pub(super) fn open(path: PathBuf, disk: Arc<dyn Disk>) -> Result<Self, JournalError> {
        let mut file = Self { path, disk, database: None, doubts: Doubts::default() };
        file.database = Some(file.opened(Wanted::OldOrNew)?);
        Ok(file)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Does something with the database. After an error of the storage it is closed, for the next run to open again.
    pub(super) fn run<T>(
        &mut self,
        work: impl FnOnce(&Database) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        self.run_with_doubts(|database, _| work(database))
    }

    /// Writes. Where that fails it is tried once to take back what may have been written: whoever is told of the failure is
    /// about to do something else.
    pub(super) fn commit(&mut self, changes: &[Change]) -> Result<(), JournalError> {
        let written = self.run_with_doubts(|database, doubts| write(database, changes, doubts));
        if written.is_err()
            && !self.doubts.is_empty()
            && let Err(error) = self.run_with_doubts(settle)
        {
            tracing::error!(
                error = %chain(&error),
                "whether the last commit is on disk is not known; it is taken back before the next one"
            );
        }
        written
    }

    /// The same for what writes, with what is in doubt of what was written before.
    fn run_with_doubts<T>(
        &mut self,
        work: impl FnOnce(&Database, &mut Doubts) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => self.opened(Wanted::Old)?,
        };
        let mut doubts = std::mem::take(&mut self.doubts);
        let done = self.unless_it_panics(|| {
            let done = work(&database, &mut doubts);
            let keeps = match &done {
                Ok(_) => true,
                Err(error) => !error.is_of_storage(),
            };
            (done, keeps.then_some(database))
        });
        self.doubts = doubts;
        let (done, database) = done?;
        self.database = database;
        done
    }

    fn opened(&self, wanted: Wanted) -> Result<Database, JournalError> {
        // A database was never empty. To begin a new one here would forget which devices must stay stopped.
        if self.disk.is_empty(&self.path) {
            return Err(JournalError::Empty { path: self.path.clone() });
        }
        let source = match self.unless_it_panics(|| self.disk.open(&self.path, wanted))? {
            Ok(database) => return Ok(database),
            Err(source) => source,
        };
        if let DatabaseError::Storage(StorageError::Corrupted(found)) = source {
            return Err(self.damaged(found));
        }
        if let DatabaseError::Storage(StorageError::Io(error)) = &source
            && matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
        {
            return Err(self.damaged(error.to_string()));
        }
        let path = self.path.clone();
        Err(if matches!(source, DatabaseError::DatabaseAlreadyOpen) {
            JournalError::InUse { path, source }
        } else {
            JournalError::Open { path, source }
        })
    }

    fn unless_it_panics<T>(&self, work: impl FnOnce() -> T) -> Result<T, JournalError> {
        // What it had hold of is dropped with it: nobody sees what a panic left half-done.
        catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            self.damaged(
                said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned(),
            )
        })
    }

    fn damaged(&self, found: String) -> JournalError {
        JournalError::Damaged { path: self.path.clone(), found }
    }
}

/// The machine's own disks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files;

impl Disk for Files {
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
    }

    fn is_empty(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|found| found.len() == 0)
    }

    fn open(&self, path: &Path, wanted: Wanted) -> Result<Database, DatabaseError> {
        let mut builder = Builder::new();
        // It is small, and what is damaged is an error then, and not a panic later.
        builder.set_check_integrity_on_open(true);
        match wanted {
            Wanted::OldOrNew if !fs::exists(path)? => {
                begin(&builder, path)?;
                builder.open(path)
            }
            Wanted::OldOrNew | Wanted::Old => builder.open(path),
        }
    }
}

/// Makes a file that is whole from the first moment it is there: one that was begun and not finished would be taken for one
/// that is damaged, by this agent and by every later one.
fn begin(builder: &Builder, path: &Path) -> Result<(), DatabaseError> {
    let draft = path.with_extension("new");
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    drop(builder.create(&draft)?);
    fs::rename(&draft, path)?;
    if let Some(folder) = path.parent() {
        fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}
