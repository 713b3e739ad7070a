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
}

impl Intent {
    pub(crate) fn new(bases: Vec<CheckpointId>) -> Self {
        Self { format: FORMAT, bases }
    }

    pub(crate) fn encode(&self) -> Result<Bytes, StoreError> {
        let invalid = |problem: String| StoreError::Invalid { field: "intent", problem };
        Ok(serde_json::to_vec(self).map_err(|error| invalid(error.to_string()))?.into())
    }
}

/// All writers at work, with the time at which each was last heard of.
pub(crate) async fn all(bucket: &Bucket) -> Result<BTreeMap<CheckpointId, (Intent, SystemTime)>, StoreError> {
    let mut intents = BTreeMap::new();
    for found in bucket.list(&key::INTENTS.into()).await? {
        let Some(id) = key::id_of(&found.path) else { continue };
        let Some(bytes) = bucket.get(&found.path, MOST_BYTES).await? else { continue };
        let intent: Intent = serde_json::from_slice(&bytes)
            .map_err(|error| StoreError::damaged(&found.path, error.to_string()))?;
        if intent.format != FORMAT {
            let problem = format!("it has format {}, and this version reads {FORMAT}", intent.format);
            return Err(StoreError::damaged(&found.path, problem));
        }
        intents.insert(id, (intent, found.modified));
    }
    Ok(intents)
}
