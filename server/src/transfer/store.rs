//! State into a store of the agent, and out of one.
//!
//! ```text
//!   save:     device::operation --chunk, seal--> StoreSink --> store::Writer
//!   restore:  store::Reader --> StoreSource --verified chunks, seals--> device::operation
//!   taken up: LeftBehind: what is left to be said of a checkpoint once its save is over
//! ```
//! A checkpoint is in the store, whole and durable, once [`StateSink::seal`] is over, and not before.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;
use vfio_checkpoint_client::document::{About, Config};
use vfio_checkpoint_device::operation::{Arrival, BoxError, Owner, StateSink, StateSource};
use vfio_checkpoint_device::{ConfigCapture, Rearm};
use vfio_checkpoint_proto::ids::CheckpointName;
use vfio_checkpoint_seal::Verifier;
use vfio_checkpoint_store::{Checkpoint, Manifest, Reader, StoreError, Writer};

use super::{capture_from_wire, capture_to_wire};
use crate::core::Core;
use crate::failpoint::reached;
use crate::journal::Owed;
use crate::operation::Entry;

/// The longest piece that is given to a device at once. Chunks in a store may be longer.
const PIECE_BYTES: usize = 1 << 20;

/// Takes the state of an operation's devices and keeps it in a store.
#[derive(Debug)]
pub struct StoreSink {
    core: Arc<Core>,
    writer: Option<Writer>,
    /// The commit goes on also where nobody waits for it any more: what is discarded must not come about afterwards.
    commit: Option<JoinHandle<Result<Manifest, StoreError>>>,
    about: About,
    entry: Arc<Entry>,
}

impl StoreSink {
    /// A sink for the operation `entry`, whose checkpoint `writer` makes.
    pub fn new(core: Arc<Core>, writer: Writer, about: About, entry: Arc<Entry>) -> Self {
        Self { core, writer: Some(writer), commit: None, about, entry }
    }

    /// Removes what it has put into the store, unless a checkpoint was made of it.
    pub async fn give_up(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.abort().await;
        }
    }

    fn writer(&mut self) -> Result<&mut Writer, BoxError> {
        self.writer.as_mut().ok_or_else(|| "the checkpoint was sealed, or given up, before".into())
    }
}

impl StateSink for StoreSink {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        reached(format_args!("chunk"));
        Ok(self.writer()?.chunk(device, bytes).await?)
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        for device in 0..config.len() {
            let seal = self.writer()?.finish(device).await?;
            self.entry.sealed(device, seal);
        }
        let config = config.iter().map(|capture| {
            capture.as_ref().map(|capture| Config::from_wire(&capture_to_wire(capture).into())).transpose()
        });
        self.about.config = config.collect::<Result<_, _>>()?;
        let about = serde_json::to_value(&self.about)?;
        let Some(writer) = self.writer.take() else { return Err("the checkpoint was sealed before".into()) };
        let commit = self.commit.insert(tokio::spawn(writer.commit(about)));
        let manifest = commit.await??;
        reached(format_args!("checkpoint committed"));
        tracing::info!(
            checkpoint = %manifest.id,
            plain_bytes = manifest.plain_bytes(),
            added_chunks = manifest.added.chunks,
            added_bytes = manifest.added.stored_bytes,
            "checkpoint committed"
        );
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        settle(&self.core, self.entry.fixed.checkpoint.as_ref(), Owed::Inconsistent).await;
        Ok(())
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        if let Some(writer) = self.writer.take() {
            writer.abort().await;
            return Ok(());
        }
        if let Some(commit) = self.commit.take().filter(|commit| !commit.is_finished()) {
            // However it ends: what it leaves is deleted.
            let _ = commit.await;
        }
        settle(&self.core, self.entry.fixed.checkpoint.as_ref(), Owed::Discard).await;
        Ok(())
    }
}

/// Gives the state of a checkpoint.
#[derive(Debug)]
pub struct StoreSource {
    checkpoint: Checkpoint,
    about: About,
    entry: Arc<Entry>,
    device: usize,
    at_work: Option<(Reader, Verifier)>,
    /// What is left of a chunk that is longer than a piece.
    left: Bytes,
}

impl StoreSource {
    /// A source for the operation `entry`.
    pub fn new(checkpoint: Checkpoint, about: About, entry: Arc<Entry>) -> Self {
        Self { checkpoint, about, entry, device: 0, at_work: None, left: Bytes::new() }
    }
}

impl StateSource for StoreSource {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let device = self.device;
        let Some(sealed) = self.checkpoint.seal(device) else { return Ok(None) };
        let (reader, verifier) =
            self.at_work.get_or_insert_with(|| (self.checkpoint.read(device), Verifier::new()));
        if self.left.is_empty()
            && let Some(bytes) = reader.next().await?
        {
            self.left = bytes;
        }
        if !self.left.is_empty() {
            reached(format_args!("chunk"));
            let piece = self.left.split_to(self.left.len().min(PIECE_BYTES));
            return Ok(Some(Arrival::Chunk { device, chunk: verifier.accept(piece) }));
        }
        let Some((_, verifier)) = self.at_work.take() else { return Ok(None) };
        let seal = verifier.finish(&sealed)?;
        self.entry.sealed(device, seal.seal());
        self.device += 1;
        let config = match self.about.config.get(device) {
            Some(Some(config)) => Some(capture_from_wire(&config.to_wire()?.try_into()?)),
            Some(None) | None => None,
        };
        Ok(Some(Arrival::Sealed { device, seal, config }))
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}

/// Does it, or owes it. What the store did not take is on record with the operation's next step.
async fn settle(core: &Core, checkpoint: Option<&CheckpointName>, owed: Owed) {
    if let Some(name) = checkpoint {
        core.stores.settle(name, owed).await;
    }
}

/// What a taken-up operation has in place of a stream or a writer: nothing comes and nothing goes. What is left to be said
/// of a checkpoint in a store is said.
#[derive(Debug)]
pub struct LeftBehind {
    /// The agent.
    pub core: Arc<Core>,
    /// The checkpoint that the operation was making, if it made one in a store.
    pub checkpoint: Option<CheckpointName>,
}

impl StateSink for LeftBehind {
    async fn chunk(&mut self, _device: usize, _bytes: Bytes) -> Result<(), BoxError> {
        Err("a stream does not survive the agent".into())
    }

    async fn seal(&mut self, _config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        Err("a stream does not survive the agent".into())
    }

    /// Of what went over a stream the mark is in the journal.
    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        settle(&self.core, self.checkpoint.as_ref(), Owed::Inconsistent).await;
        Ok(())
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        settle(&self.core, self.checkpoint.as_ref(), Owed::Discard).await;
        Ok(())
    }
}

impl Owner for LeftBehind {
    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}
