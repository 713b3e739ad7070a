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
//! - A panic of redb, which it has for files that were damaged, ends neither the agent nor the journal's thread.
//!
//! # Failure paths
//! Where the file cannot be opened again the run fails, and the next one tries again.

use std::fmt;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Builder, Database, DatabaseError, StorageError};

use super::JournalError;

/// How a database is opened: whether it is to be there already is the last argument.
pub(super) type Opens = Box<dyn Fn(&Path, Wanted) -> Result<Database, DatabaseError> + Send>;

/// What is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A file that is there, or a new one.
    OldOrNew,
    /// The file that was open before.
    Old,
}

/// The file, open or to be opened again.
pub(super) struct File {
    path: PathBuf,
    opens: Opens,
    database: Option<Database>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File").field("path", &self.path).finish_non_exhaustive()
    }
}

impl File {
    /// Opens it, and begins it where it is not there.
    pub(super) fn open(path: PathBuf, opens: Opens) -> Result<Self, JournalError> {
        let mut file = Self { path, opens, database: None };
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
        let database = match self.database.take() {
            Some(database) => database,
            None => self.opened(Wanted::Old)?,
        };
        let done = self.unless_it_panics(|| {
            let done = work(&database);
            let keeps = match &done {
                Ok(_) => true,
                Err(error) => !error.is_of_storage(),
            };
            (done, keeps.then_some(database))
        });
        let (done, database) = done?;
        self.database = database;
        done
    }

    fn opened(&self, wanted: Wanted) -> Result<Database, JournalError> {
        // A database was never empty. To begin a new one here would forget which devices must stay stopped.
        if std::fs::metadata(&self.path).is_ok_and(|found| found.len() == 0) {
            return Err(JournalError::Empty { path: self.path.clone() });
        }
        let source = match self.unless_it_panics(|| (self.opens)(&self.path, wanted))? {
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

/// Opens a file on disk.
pub(super) fn on_disk(path: &Path, wanted: Wanted) -> Result<Database, DatabaseError> {
    let mut builder = Builder::new();
    // It is small, and what is damaged is an error then, and not a panic later.
    builder.set_check_integrity_on_open(true);
    match wanted {
        Wanted::OldOrNew => builder.create(path),
        Wanted::Old => builder.open(path),
    }
}
