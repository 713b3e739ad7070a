//! Collection of what nobody needs: chunks of deleted checkpoints and of saves that never came to be.
//!
//! ```text
//!   1 finish what dead collectors began
//!   2 revoke writers that have not been heard of; clear away what was deleted long ago
//!   3 list chunks; subtract what checkpoints name, and what writers upload or build on     -> candidates
//!   4 put condemned/{id}                                                                  -> nobody builds on them from now on
//!   5 wait; read intents, then manifests, again; spare what they need; delete the rest; remove condemned/{id}
//! ```
//! # Why nothing is deleted that is needed
//! Who needs a chunk is a checkpoint that names it, the writer whose upload it is, or a writer that builds on a checkpoint
//! that names it. Step 4 ends the coming of new ones: a writer that says what it builds on after step 4 sees the word, and
//! one that said it before is read in step 5. It is read there as a writer, or, where it is done, as a checkpoint, because
//! a manifest is created before its intent is removed, and intents are read before manifests.
//!
//! A collector that sleeps between step 5 and its deletes does no harm either. Others may finish its list meanwhile: they
//! come to delete at least what it would. And a name is never used again, so there is nothing new under it.
//!
//! # Failure paths
//! Any error ends a collection. What it began is finished by the next one. A damaged manifest ends it, too: what it names
//! cannot be told, so nothing may go; delete the checkpoint that the error names.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::SystemTime;

use object_store::path::Path;

use crate::bucket::{Bucket, Created};
use crate::intent::{self, Intent};
use crate::key::{self, ChunkKey, Part};
use crate::list::{Parts, parts};
use crate::manifest::Document;
use crate::table::{self, Entry, Table};
use crate::{CheckpointId, Store, StoreError};

/// The most chunks that are condemned at once. Their list is a table.
const MOST_CONDEMNED: usize = 200_000;

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Chunks that were deleted.
    pub chunks: u64,
    /// Bytes that they took.
    pub stored_bytes: u64,
    /// Writers that were taken for gone, and can no longer commit.
    pub revoked: u64,
    /// Checkpoints of which the last traces were cleared away.
    pub cleared: u64,
}

type Intents = BTreeMap<CheckpointId, (Intent, SystemTime)>;

/// Every chunk that some collector is about to delete.
pub(crate) async fn condemned(bucket: &Bucket) -> Result<HashSet<ChunkKey>, StoreError> {
    let mut all = HashSet::new();
    for found in bucket.list(&key::CONDEMNED.into()).await? {
        // One that is gone has been carried out. Whatever it named is not needed by who asks: see the module's page.
        if let Some(list) = read_condemned(bucket, &found.path).await? {
            all.extend(list.iter().map(|entry| entry.key));
        }
    }
    Ok(all)
}

async fn read_condemned(bucket: &Bucket, at: &Path) -> Result<Option<Table>, StoreError> {
    match bucket.get(at, table::MOST_BYTES).await? {
        Some(bytes) => Table::decode(bytes).map(Some).map_err(|problem| StoreError::damaged(at, problem)),
        None => Ok(None),
    }
}

impl Store {
    /// Collects once. Any number of agents may do so at the same time.
    pub async fn collect(&self) -> Result<Collected, StoreError> {
        let mut collected = Collected::default();
        for left in self.bucket.list(&key::CONDEMNED.into()).await? {
            self.carry_out(&left.path, &mut collected).await?;
        }
        self.revoke_abandoned(&mut collected).await?;
        self.clear_deleted(&mut collected).await?;

        let listed = self.bucket.list(&key::CHUNKS.into()).await?;
        let needed = self.needed().await?;
        let mut list = Table::default();
        for found in listed {
            let Some(key) = ChunkKey::parse(&found.path) else { continue };
            // Lengths are for the count of what was freed.
            let bytes = u32::try_from(found.bytes).unwrap_or(u32::MAX).clamp(1, 1 << 20);
            let entry = Entry { key, plain_bytes: bytes, stored_bytes: bytes };
            if list.len() < MOST_CONDEMNED && !needed.has(&key) && list.push(entry).is_err() {
                // Of too many uploads for one list. The next collection takes the rest.
                break;
            }
        }
        if list.len() > 0 {
            let at = key::condemned(self.new_id());
            self.bucket.put(&at, list.encode()).await?;
            tokio::time::sleep(self.limits.grace).await;
            self.carry_out(&at, &mut collected).await?;
        }
        Ok(collected)
    }

    /// Deletes what was condemned, as far as nobody needs it, and then the word.
    async fn carry_out(&self, at: &Path, collected: &mut Collected) -> Result<(), StoreError> {
        let Some(list) = read_condemned(&self.bucket, at).await? else { return Ok(()) };
        let needed = self.needed().await?;
        for entry in list.iter().filter(|entry| !needed.has(&entry.key)) {
            self.bucket.delete(&entry.key.path()).await?;
            collected.chunks += 1;
            collected.stored_bytes += u64::from(entry.stored_bytes);
        }
        self.bucket.delete(at).await
    }

    /// Who needs what, now: intents first, then manifests.
    async fn needed(&self) -> Result<Needed, StoreError> {
        let intents = intent::all(&self.bucket).await?;
        let built_on: BTreeSet<CheckpointId> =
            intents.values().flat_map(|(intent, _)| intent.bases.iter().copied()).collect();
        let mut chunks = HashSet::new();
        for (id, parts) in parts(&self.bucket).await? {
            if parts.manifest
                && (parts.deleted.is_none() || built_on.contains(&id))
                && let Some((_, table)) = self.bucket.read_whole(id).await?
            {
                chunks.extend(table.iter().map(|entry| entry.key));
            }
        }
        Ok(Needed { uploads: intents.into_keys().collect(), chunks })
    }

    /// Ends writers that have not been heard of: whoever creates the manifest first decides whether it came to be.
    async fn revoke_abandoned(&self, collected: &mut Collected) -> Result<(), StoreError> {
        for (id, (_, heard)) in intent::all(&self.bucket).await? {
            if !self.is_older(heard, self.limits.abandoned_after) {
                continue;
            }
            let at = key::part(id, Part::Manifest);
            if self.bucket.read_manifest(id).await?.is_none()
                && self.bucket.create(&at, Document::revoked(id).encode()?).await? == Created::Yes
            {
                tracing::warn!(checkpoint = %id, "a save has not been heard of for too long, and was revoked");
                self.bucket.put(&key::part(id, Part::Deleted), bytes::Bytes::new()).await?;
                collected.revoked += 1;
            }
            self.bucket.delete(&key::intent(id)).await?;
        }
        Ok(())
    }

    /// Clears away checkpoints that are marked deleted, and that no writer builds on: at first the table, which is large, and
    /// after a long time the rest. The manifest is the last to go but for the mark, so that its name stays taken.
    async fn clear_deleted(&self, collected: &mut Collected) -> Result<(), StoreError> {
        let deleted: Vec<(CheckpointId, Parts)> =
            parts(&self.bucket).await?.into_iter().filter(|(_, parts)| parts.deleted.is_some()).collect();
        // After the marks were seen: a writer that does not see them is seen here.
        let intents: Intents =
            if deleted.is_empty() { Intents::new() } else { intent::all(&self.bucket).await? };
        for (id, parts) in deleted {
            let is_built_on = intents.values().any(|(intent, _)| intent.bases.contains(&id));
            let Some(since) = parts.deleted.filter(|_| !is_built_on && !intents.contains_key(&id)) else {
                continue;
            };
            if !self.is_older(since, self.limits.keep_marks) {
                continue;
            }
            if let Ok(Some(manifest)) = self.bucket.read_manifest(id).await {
                for state in &manifest.states {
                    self.bucket.delete(&key::device_has(&state.logical_device, id)).await?;
                }
            }
            for part in [Part::Manifest, Part::Table, Part::Inconsistent, Part::Deleted] {
                self.bucket.delete(&key::part(id, part)).await?;
            }
            collected.cleared += 1;
        }
        Ok(())
    }

    fn is_older(&self, since: SystemTime, than: std::time::Duration) -> bool {
        self.ambient.now().duration_since(since).is_ok_and(|age| age > than)
    }
}

/// Chunks that must stay.
struct Needed {
    uploads: BTreeSet<CheckpointId>,
    chunks: HashSet<ChunkKey>,
}

impl Needed {
    fn has(&self, key: &ChunkKey) -> bool {
        self.uploads.contains(&key.upload) || self.chunks.contains(key)
    }
}
