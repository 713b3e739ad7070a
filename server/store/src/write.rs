//! Into a store: one checkpoint, from its intent to its manifest.
//!
//! ```text
//!   begin:  reserve space; read the newest checkpoints of the same devices; say what it builds on; look again
//!   chunk:  cut --known--> noted            (on a thread that may block)
//!               '--new----> pack, upload    (several at a time)
//!   commit: all uploads done -> flush -> pointers, table -> manifest, create-only -> intent removed
//! ```
//! # Failure paths
//! The point of no return is the creation of the manifest. Where its answer is lost for good, the writer tries to create
//! the word that it is revoked in its place: one of the two is there then, and says what is true. A writer that is dropped
//! leaves its intent and its chunks to a collector; [`Writer::abort`] removes them at once.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use vfio_checkpoint_seal::Seal;

use crate::bucket::{Bucket, Created};
use crate::collect::condemned;
use crate::cut::{Cutter, Piece};
use crate::intent::Intent;
use crate::key::{self, ChunkKey, Part};
use crate::local::off_runtime;
use crate::manifest::{Added, Document, MOST_STATES, Manifest, State, check_logical_device};
use crate::space::Reservation;
use crate::table::{self, Entry, Table};
use crate::{Ambient, CheckpointId, Limits, Store, StoreError};

/// How many checkpoints of one logical device a save builds on.
const BASES_OF_A_DEVICE: usize = 2;
/// How many checkpoints a save builds on.
const MOST_BASES: usize = 8;
/// How many of their chunks it knows. Each takes about 100 bytes while it runs.
pub(crate) const MOST_TRUSTED: usize = 128 << 10;
/// How many uploads these may be of: half of what a table can name, so that a table can always be written.
const MOST_TRUSTED_UPLOADS: usize = table::MOST_UPLOADS / 2;

/// What a save begins with.
#[derive(Debug, Clone)]
pub struct Begin {
    /// The checkpoint that it makes.
    pub id: CheckpointId,
    /// Whose states it saves, in the order of the set.
    pub logical_devices: Vec<String>,
    /// How much state there will be at most. Zero where it is not known, and nothing is reserved.
    pub reserve_bytes: u64,
}

/// A step of a save: what a store has of it changes between two of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteStep {
    /// Space was taken, where it can be.
    Reserved,
    /// The intent is there.
    Intended,
    /// A new chunk is there.
    Uploaded,
    /// Everything but the manifest is there.
    Prepared,
    /// The manifest is there, and so is the intent still.
    Created,
}

/// One save at work.
#[derive(Debug)]
pub struct Writer {
    id: CheckpointId,
    bucket: Bucket,
    ambient: Arc<dyn Ambient>,
    intent_at_work: AbortHandle,
    reservation: Reservation,
    known: HashMap<[u8; 32], Known>,
    devices: Vec<Seat>,
    uploads: JoinSet<Result<([u8; 32], Known), StoreError>>,
    permits: Arc<Semaphore>,
    added: Added,
    chunks: usize,
    /// A call failed, or was dropped, in the middle: a part of a state is missing.
    is_torn: bool,
    /// Somebody removed the intent: the writer was taken for gone.
    is_revoked: Arc<AtomicBool>,
    keep_free_bytes: u64,
}

#[derive(Debug)]
struct Seat {
    logical_device: String,
    cutter: Option<Cutter>,
    seal: Option<Seal>,
    chunks: Vec<([u8; 32], u32)>,
}

/// What is known of a chunk.
#[derive(Debug, Clone, Copy)]
enum Known {
    /// Another checkpoint says that it has it, and nobody has looked yet.
    Claimed(Entry),
    /// It is being looked at, or is on its way.
    Pending,
    /// It is there.
    There(Entry),
}

impl Store {
    /// Begins a save. Nothing of it can be seen before its commit.
    pub async fn begin(&self, begin: Begin) -> Result<Writer, StoreError> {
        let Begin { id, logical_devices, reserve_bytes } = begin;
        if logical_devices.is_empty() || logical_devices.len() > MOST_STATES {
            let problem = format!("there are {}; 1 to {MOST_STATES} are possible", logical_devices.len());
            return Err(StoreError::Invalid { field: "logical_devices", problem });
        }
        for name in &logical_devices {
            let invalid = |problem| StoreError::Invalid { field: "logical_devices", problem };
            check_logical_device(name).map_err(invalid)?;
        }
        if logical_devices.iter().collect::<BTreeSet<_>>().len() != logical_devices.len() {
            let problem = "a logical device is there twice; one set holds it once".to_owned();
            return Err(StoreError::Invalid { field: "logical_devices", problem });
        }
        let taken = || StoreError::Invalid {
            field: "id",
            problem: format!("there is a checkpoint {id} already, or a save of it; take another id"),
        };
        for part in Part::ALL {
            if self.bucket.has(&key::part(id, part)).await? {
                return Err(taken());
            }
        }
        let reservation = self.reserve(id, reserve_bytes).await?;
        self.ambient.passes(WriteStep::Reserved);
        let bases = self.bases(&logical_devices).await?;
        let intent = Intent::new(bases.clone(), self.ambient.random()).encode()?;
        let at = key::intent(id);
        if self.bucket.create(&at, intent.clone()).await? == Created::Taken {
            return Err(taken());
        }
        self.ambient.passes(WriteStep::Intended);
        let is_revoked = Arc::new(AtomicBool::new(false));
        let renewal =
            renew(self.bucket.clone(), Arc::clone(&self.limits), at, intent, Arc::clone(&is_revoked));
        let mut writer = Writer {
            id,
            bucket: self.bucket.clone(),
            ambient: Arc::clone(&self.ambient),
            intent_at_work: tokio::spawn(renewal).abort_handle(),
            reservation,
            known: HashMap::new(),
            devices: logical_devices.into_iter().map(Seat::new).collect(),
            uploads: JoinSet::new(),
            permits: Arc::new(Semaphore::new(self.limits.parallel.max(1))),
            added: Added::default(),
            chunks: 0,
            is_torn: false,
            is_revoked,
            keep_free_bytes: self.limits.keep_free_bytes,
        };
        match writer.trust(bases).await {
            Ok(()) => Ok(writer),
            Err(error) => {
                writer.abort().await;
                Err(error)
            }
        }
    }

    /// The newest checkpoints of these logical devices.
    async fn bases(&self, logical_devices: &[String]) -> Result<Vec<CheckpointId>, StoreError> {
        let mut ids = BTreeSet::new();
        for name in logical_devices {
            let listed = self.bucket.list(&key::of_device(name)).await?;
            let mut of_device: Vec<CheckpointId> =
                listed.iter().filter_map(|found| key::id_of(&found.path)).collect();
            of_device.sort_unstable();
            ids.extend(of_device.into_iter().rev().take(BASES_OF_A_DEVICE));
        }
        Ok(ids.into_iter().rev().take(MOST_BASES).collect())
    }
}

/// Says again and again that a writer is there. Where its intent is gone it was taken for gone, and stays so.
async fn renew(
    bucket: Bucket,
    limits: Arc<Limits>,
    at: object_store::path::Path,
    intent: Bytes,
    is_revoked: Arc<AtomicBool>,
) {
    loop {
        tokio::time::sleep(limits.renew_interval).await;
        let renewed = match bucket.has(&at).await {
            Ok(true) => bucket.put(&at, intent.clone()).await,
            Ok(false) => {
                is_revoked.store(true, Ordering::Release);
                return;
            }
            Err(error) => Err(error),
        };
        if let Err(error) = renewed {
            tracing::warn!(%error, "a save cannot say that it is still there");
        }
    }
}

impl Seat {
    fn new(logical_device: String) -> Self {
        Self { logical_device, cutter: Some(Cutter::default()), seal: None, chunks: Vec::new() }
    }
}

impl Writer {
    /// The checkpoint that it makes.
    pub fn id(&self) -> CheckpointId {
        self.id
    }

    /// What was new so far.
    pub fn added(&self) -> Added {
        self.added
    }

    #[cfg(test)]
    pub(crate) fn known_chunks(&self) -> usize {
        self.known.len()
    }

    /// Takes note of the chunks of these checkpoints, now that the intent names them: those that no collector has condemned,
    /// of those checkpoints that are still there. In this order. A checkpoint that is damaged is left out: a save must not
    /// fail because an old one rotted.
    async fn trust(&mut self, bases: Vec<CheckpointId>) -> Result<(), StoreError> {
        if bases.is_empty() {
            return Ok(());
        }
        // Where that cannot be told nothing is built on.
        let Some(condemned) = condemned(&self.bucket).await? else { return Ok(()) };
        let mut uploads = BTreeSet::new();
        for id in bases {
            // The mark first: it outlives the manifest, so that without either it is not there.
            if self.bucket.has(&key::part(id, Part::Deleted)).await? {
                continue;
            }
            let table = match self.bucket.read_whole(id).await {
                Ok(Some((_, table))) => table,
                Ok(None) => continue,
                Err(error @ StoreError::Damaged { .. }) => {
                    tracing::warn!(checkpoint = %id, %error, "an earlier checkpoint cannot be built on");
                    continue;
                }
                Err(error) => return Err(error),
            };
            for entry in table.iter().filter(|entry| !condemned.contains(&entry.key)) {
                if self.known.len() == MOST_TRUSTED {
                    return Ok(());
                }
                if uploads.len() < MOST_TRUSTED_UPLOADS || uploads.contains(&entry.key.upload) {
                    uploads.insert(entry.key.upload);
                    // The newest first: what it says counts.
                    self.known.entry(entry.key.blake3).or_insert(Known::Claimed(entry));
                }
            }
        }
        Ok(())
    }

    /// Takes the next bytes of one device's state. Waits while as much is in flight as may be. After an error, or where it
    /// was dropped before it was done, the save cannot go on.
    pub async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), StoreError> {
        let mut cutter = self.begin_part(device)?;
        let (cutter, pieces) = off_runtime(move || {
            let pieces = cutter.push(&bytes);
            (cutter, pieces)
        })
        .await?;
        self.place(device, pieces).await?;
        self.devices[device].cutter = Some(cutter);
        self.is_torn = false;
        Ok(())
    }

    /// One device's state is whole. Returns its length and digest.
    pub async fn finish(&mut self, device: usize) -> Result<Seal, StoreError> {
        let cutter = self.begin_part(device)?;
        let (pieces, seal) = off_runtime(move || cutter.finish()).await?;
        self.place(device, pieces).await?;
        self.devices[device].seal = Some(seal);
        self.is_torn = false;
        Ok(seal)
    }

    /// Until the part is taken the save is torn.
    fn begin_part(&mut self, device: usize) -> Result<Cutter, StoreError> {
        self.check()?;
        let cutter = self.devices.get_mut(device).and_then(|device| device.cutter.take());
        let cutter = cutter.ok_or_else(|| StoreError::Invalid {
            field: "device",
            problem: format!("there is no state {device} that is still being written"),
        })?;
        self.is_torn = true;
        Ok(cutter)
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.is_revoked.load(Ordering::Acquire) {
            return Err(StoreError::Revoked { id: self.id });
        }
        if self.is_torn {
            let problem = "a part of a state was not taken; give the save up".to_owned();
            return Err(StoreError::Invalid { field: "states", problem });
        }
        Ok(())
    }

    async fn place(&mut self, device: usize, pieces: Vec<Piece>) -> Result<(), StoreError> {
        for piece in pieces {
            self.chunks += 1;
            let encoded = (self.chunks as u64).saturating_mul(table::ENTRY_BYTES as u64);
            if encoded > table::MOST_BYTES {
                return Err(StoreError::TooLarge {
                    what: "the table of chunks",
                    bytes: encoded,
                    most_bytes: table::MOST_BYTES,
                });
            }
            self.devices[device].chunks.push((piece.blake3, piece.plain_bytes));
            let claimed = match self.known.insert(piece.blake3, Known::Pending) {
                None => None,
                Some(Known::Claimed(entry)) => Some(entry),
                Some(known @ (Known::Pending | Known::There(_))) => {
                    self.known.insert(piece.blake3, known);
                    continue;
                }
            };
            self.settle(piece, claimed).await?;
        }
        Ok(())
    }

    /// Looks whether a chunk is there where it is said to be, and uploads it where it is not.
    async fn settle(&mut self, piece: Piece, claimed: Option<Entry>) -> Result<(), StoreError> {
        while let Some(done) = self.uploads.try_join_next() {
            self.settled(done)?;
        }
        self.reservation.shrink(u64::from(piece.plain_bytes)).await?;
        let permits = Arc::clone(&self.permits);
        let permit = permits.acquire_owned().await.map_err(|_| StoreError::Died)?;
        self.bucket.check_room(u64::from(piece.plain_bytes), self.keep_free_bytes).await?;
        let (bucket, ambient, upload) = (self.bucket.clone(), Arc::clone(&self.ambient), self.id);
        self.uploads.spawn(async move {
            let Piece { blake3, plain_bytes, .. } = piece;
            if let Some(entry) = claimed.filter(|entry| entry.plain_bytes == plain_bytes)
                && bucket.length(&entry.key.path()).await? == Some(u64::from(entry.stored_bytes))
            {
                return Ok((blake3, Known::There(entry)));
            }
            let packed = off_runtime(move || piece.pack()).await?;
            let stored_bytes = u32::try_from(packed.len()).unwrap_or(u32::MAX);
            let key = ChunkKey { blake3, upload };
            bucket.put_chunk(&key.path(), packed).await?;
            ambient.passes(WriteStep::Uploaded);
            drop(permit);
            Ok((blake3, Known::There(Entry { key, plain_bytes, stored_bytes })))
        });
        Ok(())
    }

    fn settled(
        &mut self,
        done: Result<Result<([u8; 32], Known), StoreError>, tokio::task::JoinError>,
    ) -> Result<(), StoreError> {
        let (blake3, known) = done.map_err(|_| StoreError::Died)??;
        if let Known::There(entry) = known
            && entry.key.upload == self.id
        {
            self.added.chunks += 1;
            self.added.plain_bytes += u64::from(entry.plain_bytes);
            self.added.stored_bytes += u64::from(entry.stored_bytes);
        }
        self.known.insert(blake3, known);
        Ok(())
    }

    /// Makes the checkpoint. It is there and durable when this returns.
    pub async fn commit(mut self, about: serde_json::Value) -> Result<Manifest, StoreError> {
        match self.prepare(about).await {
            Ok((manifest, document)) => self.create(manifest, document).await,
            Err(error) => {
                self.abort().await;
                Err(error)
            }
        }
    }

    /// Everything but the manifest.
    async fn prepare(&mut self, about: serde_json::Value) -> Result<(Manifest, Bytes), StoreError> {
        self.check()?;
        while let Some(done) = self.uploads.join_next().await {
            self.settled(done)?;
        }
        let invalid = |problem: String| StoreError::Invalid { field: "states", problem };
        let mut table = Table::default();
        let mut states = Vec::with_capacity(self.devices.len());
        for (index, device) in self.devices.iter().enumerate() {
            let seal = device.seal.ok_or_else(|| invalid(format!("state {index} is not whole yet")))?;
            for (blake3, _) in &device.chunks {
                let Some(Known::There(entry)) = self.known.get(blake3) else { return Err(StoreError::Died) };
                table.push(*entry).map_err(|problem| invalid(problem.to_owned()))?;
            }
            states.push(State {
                logical_device: device.logical_device.clone(),
                seal,
                chunks: device.chunks.len() as u64,
            });
        }
        let encoded = table.encode();
        let manifest = Manifest::new(self.id, about, states, self.added, &encoded);
        let document = Document::Checkpoint(Box::new(manifest.clone())).encode()?;
        self.bucket.flush().await?;
        for device in &self.devices {
            self.bucket.put(&key::device_has(&device.logical_device, self.id), Bytes::new()).await?;
        }
        self.bucket.put(&key::part(self.id, Part::Table), encoded).await?;
        self.ambient.passes(WriteStep::Prepared);
        Ok((manifest, document))
    }

    async fn create(self, manifest: Manifest, document: Bytes) -> Result<Manifest, StoreError> {
        let (id, at) = (self.id, key::part(self.id, Part::Manifest));
        // Whoever takes the intent away takes the name as well; this finds it also where that was so long ago that the name
        // is free again.
        match self.bucket.has(&key::intent(id)).await {
            Ok(true) => {}
            Ok(false) => {
                self.abort().await;
                return Err(StoreError::Revoked { id });
            }
            Err(error) => {
                self.abort().await;
                return Err(error);
            }
        }
        match self.bucket.create(&at, document.clone()).await {
            Ok(Created::Yes) => {
                self.ambient.passes(WriteStep::Created);
                self.intent_at_work.abort();
                if let Err(error) = self.bucket.delete(&key::intent(id)).await {
                    tracing::info!(checkpoint = %id, %error, "an intent is left to be collected");
                }
                Ok(manifest)
            }
            Ok(Created::Taken) => {
                // By a collector. Were it by anybody else, nothing of it would be this writer's to remove.
                if matches!(self.bucket.read_manifest(id).await, Ok(None)) {
                    self.abort().await;
                }
                Err(StoreError::Revoked { id })
            }
            // Whether it is there is not known. What is created now decides it, if the store can be reached again.
            Err(error) => match self.bucket.create(&at, Document::revoked(id).encode()?).await {
                Ok(Created::Yes) => {
                    // So that it is cleared away some day. The word itself is there already.
                    let _ = self.bucket.put(&key::part(id, Part::Deleted), Bytes::new()).await;
                    self.abort().await;
                    Err(error)
                }
                Ok(Created::Taken) if self.bucket.create(&at, document).await? == Created::Yes => {
                    Ok(manifest)
                }
                // A collector will decide it. The chunks must stay until then, and so must the intent.
                Ok(Created::Taken) | Err(_) => Err(error),
            },
        }
    }

    /// Gives the save up, and removes what it has put into the store, as far as that can be done.
    pub async fn abort(mut self) {
        self.intent_at_work.abort();
        self.uploads.shutdown().await;
        let ours = self.known.iter().filter(|(_, known)| match known {
            Known::Claimed(_) => false,
            Known::Pending => true,
            Known::There(entry) => entry.key.upload == self.id,
        });
        let chunks = ours.map(|(blake3, _)| ChunkKey { blake3: *blake3, upload: self.id }.path());
        let pointers = self.devices.iter().map(|device| key::device_has(&device.logical_device, self.id));
        let rest = pointers.chain([key::part(self.id, Part::Table), key::intent(self.id)]);
        for at in chunks.chain(rest).collect::<Vec<_>>() {
            if let Err(error) = self.bucket.delete(&at).await {
                tracing::info!(checkpoint = %self.id, %error, "what a save left is left to be collected");
                return;
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.intent_at_work.abort();
    }
}
