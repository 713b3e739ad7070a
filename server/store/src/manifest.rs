//! What a checkpoint is: `checkpoints/{id}/manifest`, JSON, created once and never changed.
//!
//! The same name holds the word that a writer was revoked. Both are created, never overwritten, so that there is exactly
//! one answer to whether a checkpoint came to be.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use vfio_checkpoint_seal::Seal;

use crate::key::{self, Part};
use crate::table::{self, Table};
use crate::{CheckpointId, StoreError};

const FORMAT: u32 = 1;
/// The longest manifest that is written or read.
pub(crate) const MOST_BYTES: u64 = 1 << 20;
/// The most states in a checkpoint.
pub(crate) const MOST_STATES: usize = 64;
/// The longest name of a logical device.
const MOST_NAME_BYTES: usize = 64;

/// What lies under the name of a manifest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Document {
    Checkpoint(Box<Manifest>),
    Revoked(Revoked),
}

/// The writer of a checkpoint was taken for gone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Revoked {
    pub format: u32,
    pub id: CheckpointId,
}

/// What a checkpoint is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this document.
    pub format: u32,
    /// Which checkpoint.
    pub id: CheckpointId,
    /// What its maker says of it. The store does not look into it.
    pub about: serde_json::Value,
    /// The states, in the order of the set.
    pub states: Vec<State>,
    /// What the checkpoint cost.
    pub added: Added,
    pub(crate) table: TableSeal,
}

/// One device's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Whose state it is.
    pub logical_device: String,
    /// Length and digest of it.
    pub seal: Seal,
    /// How many chunks of the table it has.
    pub chunks: u64,
}

/// What was new in a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Added {
    /// Chunks that were uploaded for it.
    pub chunks: u64,
    /// Plain bytes of them.
    pub plain_bytes: u64,
    /// Bytes that are stored of them.
    pub stored_bytes: u64,
}

/// What the table must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TableSeal {
    pub bytes: u64,
    pub blake3: String,
}

impl Document {
    pub(crate) fn revoked(id: CheckpointId) -> Self {
        Self::Revoked(Revoked { format: FORMAT, id })
    }

    pub(crate) fn encode(&self) -> Result<Bytes, StoreError> {
        let invalid = |problem: String| StoreError::Invalid { field: "manifest", problem };
        let bytes = serde_json::to_vec(self).map_err(|error| invalid(error.to_string()))?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err(StoreError::TooLarge {
                what: "the manifest",
                bytes: bytes.len() as u64,
                most_bytes: MOST_BYTES,
            });
        }
        Ok(bytes.into())
    }

    /// Reads what lies under the name of the manifest of `id`, and believes nothing.
    pub(crate) fn decode(id: CheckpointId, bytes: &[u8]) -> Result<Self, StoreError> {
        let at = key::part(id, Part::Manifest);
        let document: Self =
            serde_json::from_slice(bytes).map_err(|error| StoreError::damaged(&at, error.to_string()))?;
        let (format, said) = match &document {
            Self::Checkpoint(manifest) => (manifest.format, manifest.id),
            Self::Revoked(revoked) => (revoked.format, revoked.id),
        };
        if format != FORMAT {
            let problem = format!("it has format {format}, and this version reads {FORMAT}");
            return Err(StoreError::damaged(&at, problem));
        }
        if said != id {
            return Err(StoreError::damaged(&at, format!("it is of {said}, another checkpoint")));
        }
        if let Self::Checkpoint(manifest) = &document {
            manifest.check().map_err(|problem| StoreError::damaged(&at, problem))?;
        }
        Ok(document)
    }
}

impl Manifest {
    pub(crate) fn new(
        id: CheckpointId,
        about: serde_json::Value,
        states: Vec<State>,
        added: Added,
        encoded_table: &Bytes,
    ) -> Self {
        let table = TableSeal {
            bytes: encoded_table.len() as u64,
            blake3: blake3::hash(encoded_table).to_hex().to_string(),
        };
        Self { format: FORMAT, id, about, states, added, table }
    }

    /// Bytes of all states.
    pub fn plain_bytes(&self) -> u64 {
        self.states.iter().map(|state| state.seal.bytes).fold(0, u64::saturating_add)
    }

    fn check(&self) -> Result<(), String> {
        if self.states.is_empty() || self.states.len() > MOST_STATES {
            return Err(format!("it has {} states; 1 to {MOST_STATES} are possible", self.states.len()));
        }
        let mut names = BTreeSet::new();
        for (index, state) in self.states.iter().enumerate() {
            if !names.insert(&state.logical_device) {
                return Err(format!("states[{index}].logical_device: it is there twice"));
            }
            check_logical_device(&state.logical_device)
                .map_err(|problem| format!("states[{index}].logical_device: {problem}"))?;
        }
        if self.table.bytes > table::MOST_BYTES {
            return Err(format!(
                "its table has {} bytes; at most {} are possible",
                self.table.bytes,
                table::MOST_BYTES
            ));
        }
        Ok(())
    }

    /// Reads the table, and compares it with what the manifest says of it.
    pub(crate) fn read_table(&self, bytes: Bytes) -> Result<Table, StoreError> {
        let at = key::part(self.id, Part::Table);
        let damaged = |problem: String| StoreError::damaged(&at, problem);
        if bytes.len() as u64 != self.table.bytes || blake3::hash(&bytes).to_hex()[..] != self.table.blake3 {
            return Err(damaged("it is not the table that the manifest was made with".to_owned()));
        }
        let table = Table::decode(bytes).map_err(&damaged)?;
        let said = self.states.iter().map(|state| state.chunks).fold(0, u64::saturating_add);
        if said != table.len() as u64 {
            return Err(damaged(format!("it has {} chunks, and the manifest counts {said}", table.len())));
        }
        let mut rows = table.iter();
        for (index, state) in self.states.iter().enumerate() {
            let count = usize::try_from(state.chunks).unwrap_or(usize::MAX);
            let bytes: u64 = rows.by_ref().take(count).map(|entry| u64::from(entry.plain_bytes)).sum();
            if bytes != state.seal.bytes {
                let sealed = state.seal.bytes;
                return Err(damaged(format!(
                    "state {index} has {bytes} bytes in it, and {sealed} are sealed"
                )));
            }
        }
        drop(rows);
        Ok(table)
    }
}

/// A logical device's name becomes part of a path.
pub(crate) fn check_logical_device(name: &str) -> Result<(), String> {
    let is_plain = name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if is_plain && (1..=MOST_NAME_BYTES).contains(&name.len()) {
        Ok(())
    } else {
        Err(format!("a logical device is named by 1 to {MOST_NAME_BYTES} of a-z, 0-9 and hyphen"))
    }
}
