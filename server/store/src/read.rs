//! Out of a store: a checkpoint, and the state of its devices.
//!
//! ```text
//!   manifest (bounded, strict) -> table (its digest) -> chunk after chunk, some ahead -> compared with its name
//! ```
//! What comes out of a [`Reader`] is what was saved, as far as each chunk goes. Whether all of it is there and in its order
//! is for the seal to say, and the reader's user compares it.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use vfio_checkpoint_seal::{Seal, SealHasher};

use crate::bucket::Bucket;
use crate::cut::unpack;
use crate::key::{self, Part};
use crate::local::off_runtime;
use crate::manifest::{self, Document, Manifest};
use crate::table::{self, Entry, Table};
use crate::{CheckpointId, Store, StoreError};

/// A checkpoint that is whole as far as its manifest and its table tell.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What it is.
    pub manifest: Manifest,
    /// Its hold ran out: memory that was captured along with it may have moved on.
    pub is_inconsistent: bool,
    store: Store,
    table: Arc<Table>,
}

/// What a full verification found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that were read.
    pub chunks: u64,
    /// Plain bytes that were hashed.
    pub plain_bytes: u64,
    /// What is wrong: one line a device. Empty where nothing is.
    pub problems: Vec<String>,
}

impl Store {
    /// A checkpoint, with its table read and compared.
    pub async fn get(&self, id: CheckpointId) -> Result<Checkpoint, StoreError> {
        if self.bucket.has(&key::part(id, Part::Deleted)).await? {
            return Err(StoreError::NotFound { id });
        }
        let (manifest, table) = self.bucket.read_whole(id).await?.ok_or(StoreError::NotFound { id })?;
        let is_inconsistent = self.bucket.has(&key::part(id, Part::Inconsistent)).await?;
        Ok(Checkpoint { manifest, is_inconsistent, store: self.clone(), table: Arc::new(table) })
    }

    /// Reads every chunk of a checkpoint and compares every digest.
    pub async fn verify(
        &self,
        id: CheckpointId,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<Verified, StoreError> {
        let checkpoint = self.get(id).await?;
        let mut verified = Verified { chunks: 0, plain_bytes: 0, problems: Vec::new() };
        for (device, state) in checkpoint.manifest.states.iter().enumerate() {
            let mut hasher = SealHasher::new();
            let mut reader = checkpoint.read(device);
            let read = loop {
                match reader.next().await {
                    Ok(Some(bytes)) => {
                        verified.chunks += 1;
                        verified.plain_bytes += bytes.len() as u64;
                        progress(verified.plain_bytes);
                        hasher = off_runtime(move || {
                            hasher.update(&bytes);
                            hasher
                        })
                        .await?;
                    }
                    Ok(None) => break Ok(hasher.seal()),
                    Err(error @ (StoreError::Damaged { .. } | StoreError::NotRegular { .. })) => {
                        break Err(error.to_string());
                    }
                    Err(other) => return Err(other),
                }
            };
            match read {
                Ok(seal) if seal == state.seal => {}
                Ok(seal) => verified
                    .problems
                    .push(format!("state {device}: sealed are {}, there are {seal}", state.seal)),
                Err(problem) => verified.problems.push(format!("state {device}: {problem}")),
            }
        }
        Ok(verified)
    }
}

impl Bucket {
    /// The manifest of a checkpoint. None where there is none, or where its writer was revoked.
    pub(crate) async fn read_manifest(&self, id: CheckpointId) -> Result<Option<Manifest>, StoreError> {
        Ok(self.read_manifest_sized(id).await?.map(|(manifest, _)| manifest))
    }

    /// The same, and how long it is in bytes.
    pub(crate) async fn read_manifest_sized(
        &self,
        id: CheckpointId,
    ) -> Result<Option<(Manifest, usize)>, StoreError> {
        let Some(bytes) = self.get(&key::part(id, Part::Manifest), manifest::MOST_BYTES).await? else {
            return Ok(None);
        };
        match Document::decode(id, &bytes)? {
            Document::Checkpoint(manifest) => Ok(Some((*manifest, bytes.len()))),
            Document::Revoked(_) => Ok(None),
        }
    }

    /// The manifest and the table of a checkpoint, deleted or not, while they are there.
    pub(crate) async fn read_whole(&self, id: CheckpointId) -> Result<Option<(Manifest, Table)>, StoreError> {
        let Some(manifest) = self.read_manifest(id).await? else { return Ok(None) };
        let at = key::part(id, Part::Table);
        let Some(bytes) = self.get(&at, table::MOST_BYTES).await? else {
            // The manifest goes first when a deleted checkpoint is cleared away.
            return match self.read_manifest(id).await? {
                None => Ok(None),
                Some(_) => Err(StoreError::damaged(&at, "it is missing, and the manifest is there")),
            };
        };
        let (manifest, table) =
            off_runtime(move || manifest.read_table(bytes).map(|table| (manifest, table))).await??;
        Ok(Some((manifest, table)))
    }

    async fn read_chunk(self, entry: Entry) -> Result<Bytes, StoreError> {
        let at = entry.key.path();
        let stored = self.get(&at, u64::from(entry.stored_bytes)).await?;
        let stored = stored.ok_or_else(|| StoreError::damaged(&at, "it is missing"))?;
        if stored.len() != entry.stored_bytes as usize {
            let problem = format!("it has {} bytes, and {} were stored", stored.len(), entry.stored_bytes);
            return Err(StoreError::damaged(&at, problem));
        }
        let unpacked = off_runtime(move || unpack(stored, entry.plain_bytes, &entry.key.blake3)).await?;
        unpacked.map_err(|problem| StoreError::damaged(&at, problem.to_string()))
    }
}

impl Checkpoint {
    /// The state of one device, from its beginning. Nothing for a device that the checkpoint does not have.
    pub fn read(&self, device: usize) -> Reader {
        let chunks = |states: &[manifest::State]| -> usize {
            states.iter().map(|state| usize::try_from(state.chunks).unwrap_or(usize::MAX)).sum()
        };
        let states = &self.manifest.states;
        let from = chunks(&states[..device.min(states.len())]);
        let to = chunks(&states[..(device + 1).min(states.len())]);
        let (bucket, table) = (self.store.bucket.clone(), Arc::clone(&self.table));
        let chunks = stream::iter((from..to).filter_map(move |index| table.get(index)))
            .map(move |entry| bucket.clone().read_chunk(entry))
            .buffered(self.store.limits.parallel.max(1))
            .boxed();
        Reader { chunks }
    }

    /// Length and digest of one device's state.
    pub fn seal(&self, device: usize) -> Option<Seal> {
        self.manifest.states.get(device).map(|state| state.seal)
    }
}

/// The state of one device, chunk by chunk.
pub struct Reader {
    chunks: BoxStream<'static, Result<Bytes, StoreError>>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Reader {
    /// The next chunk; none at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        self.chunks.try_next().await
    }
}
