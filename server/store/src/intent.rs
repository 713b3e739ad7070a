//! A writer at work, and what it builds on: `intents/{id}`.
//!
//! The time of the object is what counts: the writer puts it again and again while it works.

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::bucket::Bucket;
use crate::key;
use crate::{CheckpointId, StoreError};

const FORMAT: u32 = 1;
/// The longest intent that is read.
const MOST_BYTES: u64 = 64 << 10;

/// What a writer builds on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Intent {
    format: u32,
    /// Checkpoints whose chunks it may name as its own.
    pub bases: Vec<CheckpointId>,
    /// Tells two writers of one name apart.
    writer: u64,
}

impl Intent {
    pub(crate) fn new(bases: Vec<CheckpointId>, writer: u64) -> Self {
        Self { format: FORMAT, bases, writer }
    }

    pub(crate) fn encode(&self) -> Result<Bytes, StoreError> {
        let invalid = |problem: String| StoreError::Invalid { field: "intent", problem };
        Ok(serde_json::to_vec(self).map_err(|error| invalid(error.to_string()))?.into())
    }
}

/// A writer at work.
#[derive(Debug)]
pub(crate) struct Writing {
    /// What it builds on, or why that cannot be told.
    pub intent: Result<Intent, StoreError>,
    /// When it was last heard of.
    pub heard: SystemTime,
}

/// All writers at work.
pub(crate) async fn all(bucket: &Bucket) -> Result<BTreeMap<CheckpointId, Writing>, StoreError> {
    let mut intents = BTreeMap::new();
    for found in bucket.list(&key::INTENTS.into()).await? {
        let Some(id) = key::id_of(&found.path) else { continue };
        let bytes = match bucket.get(&found.path, MOST_BYTES).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => continue,
            Err(error @ StoreError::Damaged { .. }) => {
                intents.insert(id, Writing { intent: Err(error), heard: found.modified });
                continue;
            }
            Err(error) => return Err(error),
        };
        let intent = match serde_json::from_slice::<Intent>(&bytes) {
            Ok(intent) if intent.format == FORMAT => Ok(intent),
            Ok(other) => Err(format!("it has format {}, and this version reads {FORMAT}", other.format)),
            Err(error) => Err(error.to_string()),
        };
        let intent = intent.map_err(|problem| StoreError::damaged(&found.path, problem));
        intents.insert(id, Writing { intent, heard: found.modified });
    }
    Ok(intents)
}
