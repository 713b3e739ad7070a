//! The checkpoint repository: device state as content-defined chunks, in a local folder or an S3-compatible store.
//!
//! ```text
//!   Store::begin -> Writer: intent -> chunks/… (new ones only) -> table -> manifest, create-only
//!   Store::get   -> Checkpoint -> Reader: chunk by chunk, each compared with its name, then the seal
//!   Store::collect: chunks that no manifest and no writer needs -> condemned -> deleted
//! ```
//! What lies where ([`key`]):
//! ```text
//!   chunks/3f/3f…-{upload}              one chunk, plain or a zstd frame; named for its plain bytes and for its upload
//!   checkpoints/{id}/table              which chunks make up the states, 32 + 4 + 4 + 4 bytes each
//!   checkpoints/{id}/manifest           what it is; it is there last, and never changed
//!   checkpoints/{id}/{deleted,inconsistent}    marks beside it
//!   devices/{logical device}/{id}       finds the checkpoints of a logical device without reading manifests
//!   intents/{id}                        a writer at work, and whose chunks it builds on
//!   condemned/{id}                      what a collector is about to delete
//! ```
//!
//! # Invariants
//! - A checkpoint is there whole or not at all: its manifest is created last, by an operation of which one of two racers
//!   wins, after everything that it names is durable.
//! - The name of a chunk is never used twice. It says which upload brought it, so what is deleted late, by a collector that
//!   slept, can be nothing that came later.
//! - Nothing that is read is trusted: lengths are bounded before memory is taken, each chunk is compared with its name, and
//!   each state with its seal. No path comes out of a manifest, and a local path never follows a link.
//! - Memory is bounded by what is in flight, and the table: 44 bytes a chunk.
//!
//! # Several agents, one store
//! Nobody locks anything. A writer says what it builds on before it looks whether that is still there; a collector says
//! what it is about to delete before it looks who builds on it. So of two that meet at least one sees the other:
//! ```text
//!   writer                                         collector
//!     read checkpoints to build on                   list chunks; subtract what manifests and intents need
//!     put intents/{id}, naming them                  put condemned/{id}, naming the rest
//!     read condemned: build on none of it            read intents, then manifests: spare what they need
//!     are they still there? else not on them         delete the rest
//!     … upload, table, manifest, remove the intent   remove condemned/{id}
//! ```
//! A writer that is gone leaves its intent. After [`Limits::abandoned_after`] a collector creates a manifest in its stead
//! that says "revoked". Whoever creates it first has won: a writer that wakes up finds that its checkpoint cannot be.
//!
//! # Failure paths
//! A writer that fails or is dropped leaves no checkpoint; what it uploaded is removed by it, or by a collector. A lost
//! answer to the creation of a manifest is cleared up by reading it. ENOSPC is told before a save begins where space can
//! be reserved ([`Store::begin`]).

mod bucket;
mod collect;
mod cut;
mod error;
mod id;
mod intent;
pub mod key;
mod list;
mod local;
mod location;
mod manifest;
mod read;
mod space;
mod table;
mod write;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use collect::Collected;
pub use error::StoreError;
pub use id::CheckpointId;
pub use list::{Listed, Page};
pub use location::{Location, S3Options};
pub use manifest::{Added, Manifest, State};
pub use read::{Checkpoint, Reader, Verified};
pub use space::Space;
pub use table::Entry;
pub use write::{Begin, WriteStep, Writer};

use bucket::Bucket;

/// What a store is told.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Uploads, or downloads, at the same time.
    pub parallel: usize,
    /// Space that a local store leaves free, in bytes.
    pub keep_free_bytes: u64,
    /// A writer says this often that it is still there.
    pub renew_interval: Duration,
    /// A writer that has not said so for this long is taken for gone. Many times `renew_interval`.
    pub abandoned_after: Duration,
    /// How long marks of deleted and revoked checkpoints outlive them.
    pub keep_marks: Duration,
    /// How long a collector waits between naming chunks and deleting them. No invariant rests on it; it spares writers
    /// that begin meanwhile from uploading again.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            parallel: 4,
            keep_free_bytes: 64 << 20,
            renew_interval: Duration::from_mins(5),
            abandoned_after: Duration::from_hours(2),
            keep_marks: Duration::from_hours(24 * 30),
            grace: Duration::from_mins(1),
        }
    }
}

/// Where a store takes the time and its random numbers from, and whom it tells how far a save is.
pub trait Ambient: fmt::Debug + Send + Sync {
    /// What time it is.
    fn now(&self) -> SystemTime;
    /// 64 random bits.
    fn random(&self) -> u64;
    /// A save has come to a step. Nothing has to come of it; tests stop there.
    fn passes(&self, step: WriteStep) {
        let _ = step;
    }
}

/// A store of checkpoints. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    bucket: Bucket,
    limits: Arc<Limits>,
    ambient: Arc<dyn Ambient>,
}

impl Store {
    /// Opens a store, and makes one where there is none yet. A folder that holds something else is refused.
    pub async fn open(
        location: &Location,
        limits: Limits,
        ambient: Arc<dyn Ambient>,
    ) -> Result<Self, StoreError> {
        let bucket = location.bucket(true).await?;
        Self::over(bucket, limits, ambient).await
    }

    /// Opens a store that is known to have been there. Where it is missing, because its disk is not mounted for one, it is
    /// not made anew: an empty one would say of every checkpoint that it is gone.
    pub async fn open_again(
        location: &Location,
        limits: Limits,
        ambient: Arc<dyn Ambient>,
    ) -> Result<Self, StoreError> {
        let bucket = location.bucket(false).await?;
        let store = Self { bucket, limits: Arc::new(limits), ambient };
        store.is_there().await?;
        // Its marker is there, and may be of another format.
        store.bucket.claim().await?;
        Ok(store)
    }

    /// Whether the store is where it was when it was opened: a disk may have gone from under it since.
    pub async fn is_there(&self) -> Result<(), StoreError> {
        if self.bucket.has(&key::MARKER.into()).await? {
            Ok(())
        } else {
            Err(StoreError::Missing { name: self.bucket.name().to_owned() })
        }
    }

    async fn over(bucket: Bucket, limits: Limits, ambient: Arc<dyn Ambient>) -> Result<Self, StoreError> {
        bucket.claim().await?;
        Ok(Self { bucket, limits: Arc::new(limits), ambient })
    }

    /// A new id, for a checkpoint that is about to be made.
    pub fn new_id(&self) -> CheckpointId {
        CheckpointId::new(self.ambient.now(), self.ambient.random())
    }

    /// Where it is, for people.
    pub fn location(&self) -> &str {
        self.bucket.name()
    }
}
