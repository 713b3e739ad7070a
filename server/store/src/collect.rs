//! Collection of what nobody needs: chunks of deleted checkpoints and of saves that never came to be.
//!
//! ```text
//!   1 finish what dead collectors began
//!   2 revoke writers that have not been heard of, with what leads to them; clear away what was deleted long ago
//!   3 list chunks, without those that checkpoints name, and writers upload or build on      -> candidates
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
use std::time::{Duration, SystemTime};

use futures_util::{TryStreamExt as _, stream};
use object_store::path::Path;

use crate::bucket::{Bucket, Created, Found};
use crate::intent::{self, Writing};
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
    /// Files that were never whole, of writers that died.
    pub swept: u64,
}

/// Every chunk that some collector is about to delete. None where that cannot be told.
pub(crate) async fn condemned(bucket: &Bucket) -> Result<Option<HashSet<ChunkKey>>, StoreError> {
    let mut all = HashSet::new();
    for found in bucket.list(&key::CONDEMNED.into()).await? {
        if key::id_of(&found.path).is_none() {
            continue;
        }
        match read_condemned(bucket, &found.path).await {
            Ok(Some(list)) => all.extend(list.iter().map(|entry| entry.key)),
            // It has been carried out. Whatever it named is not needed by who asks: see the module's page.
            Ok(None) => {}
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(%error, "what is condemned cannot be told, so nothing is built on");
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(all))
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
        self.bucket.before_freeing().await;
        let mut collected = Collected::default();
        let done = self.collect_into(&mut collected).await;
        self.bucket.after_freeing().await;
        done.map(|()| collected)
    }

    async fn collect_into(&self, collected: &mut Collected) -> Result<(), StoreError> {
        let now = self.bucket.now(self.new_id()).await?;
        collected.swept = self.bucket.sweep(self.limits.abandoned_after).await?;
        for left in self.bucket.list(&key::CONDEMNED.into()).await? {
            if key::id_of(&left.path).is_none() {
                continue;
            }
            match self.carry_out(&left.path, collected).await {
                // Written by a collector that died in the middle, or by none. Nobody carries it out any more.
                Err(error @ StoreError::Damaged { .. })
                    if error.is_about(&left.path)
                        && is_older(now, left.modified, self.limits.abandoned_after) =>
                {
                    self.bucket.delete(&left.path).await?;
                }
                done => done?,
            }
        }
        let revoked = self.revoke_abandoned(now, collected).await?;
        self.clear_deleted(now, &revoked, collected).await?;

        let needed = self.needed().await?;
        let mut list = Table::default();
        self.bucket
            .each(&key::CHUNKS.into(), |found| {
                let Some(key) = ChunkKey::parse(&found.path).filter(|key| !needed.has(key)) else {
                    return true;
                };
                // Lengths are for the count of what was freed.
                let bytes = u32::try_from(found.bytes).unwrap_or(u32::MAX).clamp(1, 1 << 20);
                let entry = Entry { key, plain_bytes: bytes, stored_bytes: bytes };
                // Where the list is full the next collection takes the rest.
                list.len() < MOST_CONDEMNED && list.push(entry).is_ok()
            })
            .await?;
        if list.len() > 0 {
            let at = key::condemned(self.new_id());
            self.bucket.put(&at, list.encode()).await?;
            tokio::time::sleep(self.limits.grace).await;
            self.carry_out(&at, collected).await?;
        }
        Ok(())
    }

    /// Deletes what was condemned, as far as nobody needs it, and then the word.
    async fn carry_out(&self, at: &Path, collected: &mut Collected) -> Result<(), StoreError> {
        let Some(list) = read_condemned(&self.bucket, at).await? else { return Ok(()) };
        let needed = self.needed().await?;
        let unneeded: Vec<Entry> = list.iter().filter(|entry| !needed.has(&entry.key)).collect();
        stream::iter(unneeded.iter().map(Ok))
            .try_for_each_concurrent(self.limits.parallel.max(1), |entry| async {
                self.bucket.delete(&entry.key.path()).await
            })
            .await?;
        collected.chunks += unneeded.len() as u64;
        collected.stored_bytes += unneeded.iter().map(|entry| u64::from(entry.stored_bytes)).sum::<u64>();
        self.bucket.delete(at).await
    }

    /// Who needs what, now: intents first, then manifests.
    async fn needed(&self) -> Result<Needed, StoreError> {
        let (mut uploads, mut built_on) = (BTreeSet::new(), BTreeSet::new());
        for (id, writing) in intent::all(&self.bucket).await? {
            // What it builds on cannot be told, so nothing may go. It is revoked when it has not been heard of for long.
            built_on.extend(writing.intent?.bases);
            uploads.insert(id);
        }
        let mut chunks = HashSet::new();
        for (id, parts) in parts(&self.bucket).await? {
            if parts.manifest
                && (parts.deleted.is_none() || built_on.contains(&id))
                && let Some((_, table)) = self.bucket.read_whole(id).await?
            {
                chunks.extend(table.iter().map(|entry| short(&entry.key)));
            }
        }
        Ok(Needed { uploads, chunks })
    }

    /// Ends writers that have not been heard of: whoever creates the manifest first decides whether it came to be.
    async fn revoke_abandoned(
        &self,
        now: SystemTime,
        collected: &mut Collected,
    ) -> Result<BTreeSet<CheckpointId>, StoreError> {
        let mut revoked = BTreeSet::new();
        for (id, Writing { heard, .. }) in intent::all(&self.bucket).await? {
            if !is_older(now, heard, self.limits.abandoned_after) {
                continue;
            }
            let at = key::part(id, Part::Manifest);
            if self.bucket.read_manifest(id).await?.is_none()
                && self.bucket.create(&at, Document::revoked(id).encode()?).await? == Created::Yes
            {
                tracing::warn!(checkpoint = %id, "a save has not been heard of for too long, and was revoked");
                self.bucket.put(&key::part(id, Part::Deleted), bytes::Bytes::new()).await?;
                revoked.insert(id);
                collected.revoked += 1;
            }
            self.bucket.delete(&key::intent(id)).await?;
        }
        // Now, and not only when its last traces go: the newest of them are what the next saves would build on.
        self.clear_pointers(&revoked).await?;
        Ok(revoked)
    }

    /// Clears away what leads from devices to checkpoints that never came to be, or of which nothing says whose states they
    /// had.
    async fn clear_pointers(&self, of: &BTreeSet<CheckpointId>) -> Result<(), StoreError> {
        if of.is_empty() {
            return Ok(());
        }
        let mut pointers = Vec::new();
        let see = |found: Found| {
            if key::id_of(&found.path).is_some_and(|id| of.contains(&id)) {
                pointers.push(found.path);
            }
            true
        };
        self.bucket.each(&key::DEVICES.into(), see).await?;
        for at in pointers {
            self.bucket.delete(&at).await?;
        }
        Ok(())
    }

    /// Clears away checkpoints that were marked deleted long ago, and that no writer builds on. The mark is the last to go,
    /// so that whoever sees neither it nor the manifest knows that there is nothing.
    async fn clear_deleted(
        &self,
        now: SystemTime,
        just_revoked: &BTreeSet<CheckpointId>,
        collected: &mut Collected,
    ) -> Result<(), StoreError> {
        let deleted = parts(&self.bucket).await?.into_iter().filter(|(id, Parts { deleted, .. })| {
            deleted.is_some_and(|since| is_older(now, since, self.limits.keep_marks))
                && !just_revoked.contains(id)
        });
        let deleted: Vec<CheckpointId> = deleted.map(|(id, _)| id).collect();
        // After the marks were seen: a writer that does not see them is seen here.
        let writing: BTreeMap<CheckpointId, Writing> =
            if deleted.is_empty() { BTreeMap::new() } else { intent::all(&self.bucket).await? };
        let is_needed = |id: &CheckpointId| {
            let builds = |writing: &Writing| writing.intent.as_ref().map_or(true, |it| it.bases.contains(id));
            writing.contains_key(id) || writing.values().any(builds)
        };
        let going: BTreeSet<CheckpointId> = deleted.into_iter().filter(|id| !is_needed(id)).collect();
        self.clear_pointers(&going).await?;
        for id in going {
            for part in [Part::Manifest, Part::Table, Part::Inconsistent, Part::Deleted] {
                self.bucket.delete(&key::part(id, part)).await?;
            }
            collected.cleared += 1;
        }
        Ok(())
    }
}

/// By the store's own clock, from which its objects have their times: that of this machine may be wrong.
fn is_older(now: SystemTime, since: SystemTime, than: Duration) -> bool {
    now.duration_since(since).is_ok_and(|age| age >= than)
}

/// Chunks that must stay.
struct Needed {
    uploads: BTreeSet<CheckpointId>,
    /// Digests of their keys, 8 bytes each: a store may have millions. Two that are alike spare a chunk that could go.
    chunks: HashSet<u64>,
}

impl Needed {
    fn has(&self, key: &ChunkKey) -> bool {
        self.uploads.contains(&key.upload) || self.chunks.contains(&short(key))
    }
}

fn short(key: &ChunkKey) -> u64 {
    let upload = key.upload.to_bytes();
    let fold = |bytes: &[u8]| bytes.iter().take(8).fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte));
    fold(&key.blake3) ^ fold(&upload[8..]).rotate_left(17) ^ fold(&upload[..8])
}
