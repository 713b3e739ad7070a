//! How changes get into the journal's file: each commit in one transaction, and none in doubt for longer than can be helped.
//!
//! ```text
//!   settle (only after a failure) --> put: rows in, what they replaced kept --> commit --> Ok: forgotten
//!                                                                                  '--> failed, and durable perhaps: Doubts
//! ```
//! # Invariants
//! - What is in doubt is never more than one commit changed: nothing new is written before it is settled.
//!
//! # Failure paths
//! What fails before its commit was never written. What fails in its commit is in doubt until it is settled.

use redb::{Database, Durability, TableDefinition};
use serde::Serialize;

use super::{Change, DEBTS, DEVICES, JournalError, OPERATIONS, REQUESTS};

/// Writes `changes`, after what is in doubt was put back. Where that fails, or they do, nothing is known to be written.
pub(super) fn write(
    database: &Database,
    changes: &[Change],
    doubts: &mut Doubts,
) -> Result<(), JournalError> {
    let rows = changes.iter().map(row).collect::<Result<Vec<_>, _>>()?;
    // On its own: what is in doubt is never more than what one commit changed.
    settle(database, doubts)?;
    put(database, &rows)?.map_err(|NotCommitted { source, replaced }| {
        if !has_no_room(&source) {
            doubts.0 = replaced;
        }
        source
    })
}

/// A full disk takes no pages, and without its pages a commit is none, whatever else of it is there.
fn has_no_room(error: &JournalError) -> bool {
    matches!(error, JournalError::Storage(error)
        if matches!(&**error, redb::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull))
}

/// Takes back what is in doubt.
pub(super) fn settle(database: &Database, doubts: &mut Doubts) -> Result<(), JournalError> {
    if !doubts.0.is_empty() {
        put(database, &doubts.0)?.map_err(|NotCommitted { source, .. }| source)?;
        doubts.0.clear();
    }
    Ok(())
}

/// Puts rows in one transaction. An error is one before anything could become durable.
fn put(database: &Database, rows: &[Row]) -> Result<Result<(), NotCommitted>, JournalError> {
    let mut transaction = database.begin_write().map_err(JournalError::storage)?;
    transaction.set_durability(Durability::Immediate).map_err(JournalError::storage)?;
    let mut replaced = Vec::with_capacity(rows.len());
    for Row { table, key, value } in rows {
        let mut opened = transaction.open_table(*table).map_err(JournalError::storage)?;
        let before = match value {
            Some(value) => opened.insert(key.as_str(), value.as_slice()),
            None => opened.remove(key.as_str()),
        };
        let before = before.map_err(JournalError::storage)?.map(|value| value.value().to_vec());
        replaced.push(Row { table: *table, key: key.clone(), value: before });
    }
    // The last one first, so that a row that was changed twice is put back as it was at the beginning.
    replaced.reverse();
    let committed = transaction.commit().map_err(JournalError::storage);
    Ok(committed.map_err(|source| NotCommitted { source, replaced }))
}

/// A transaction that may be durable, and may not.
struct NotCommitted {
    source: JournalError,
    /// What its rows were before.
    replaced: Vec<Row>,
}

/// One row as it is to be: with this value, or none.
struct Row {
    table: TableDefinition<'static, &'static str, &'static [u8]>,
    key: String,
    value: Option<Vec<u8>>,
}

/// What rows were before a commit that failed and may be durable all the same.
#[derive(Default)]
pub(super) struct Doubts(Vec<Row>);

impl Doubts {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn row(change: &Change) -> Result<Row, JournalError> {
    let (table, key, value) = match change {
        Change::Operation(record) => {
            let name = record.name.to_string();
            let value = encode("operations", &name, record)?;
            (OPERATIONS, name, Some(value))
        }
        Change::ForgetOperation(name) => (OPERATIONS, name.to_string(), None),
        Change::Request(key, record) => {
            (REQUESTS, key.text(), Some(encode("requests", &key.request_id, record)?))
        }
        Change::ForgetRequest(key) => (REQUESTS, key.text(), None),
        Change::Device(name, record) => {
            let name = name.to_string();
            let value = encode("devices", &name, record)?;
            (DEVICES, name, Some(value))
        }
        Change::Debt(name, record) => {
            let name = name.to_string();
            let value = encode("debts", &name, record)?;
            (DEBTS, name, Some(value))
        }
        Change::ForgetDebt(name) => (DEBTS, name.to_string(), None),
    };
    Ok(Row { table, key, value })
}

fn encode(table: &'static str, key: &str, record: &impl Serialize) -> Result<Vec<u8>, JournalError> {
    serde_json::to_vec(record).map_err(|source| JournalError::Record { table, key: key.to_owned(), source })
}
