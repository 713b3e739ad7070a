//! What a giver keeps of the frames that it has made, until the taker has acknowledged them.
//!
//! ```text
//!   keep(frame) --> memory, while there is room: the frame as it is, its state shared and not copied
//!                --> disk, after that: a file without a name
//!   acked(next) frees what is before `next`; frame(n) gives any that is left, to be sent again as it was
//! ```
//!
//! Invariants:
//! - It holds the frames from the last acknowledged one on, all of them and in order.
//! - It is bounded: `memory_bytes`, then `disk_bytes`. Whoever makes frames asks for room first, and waits for acks.
//! - Memory alone holds what a taker may leave unacknowledged, so that waiting for an ack is never in vain: see
//!   [`Spool::least_memory_bytes`].
//! - Files are written and read off the async workers. What is read back is compared with what was written: its length,
//!   its number, its CRC.
//!
//! Failure paths: [`SpoolError`], with the folder in it. A frame that could not be written is still in memory, so nothing
//! is lost, but nothing more is kept. A process that ends takes the file with it.

mod disk;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;

use vfio_checkpoint_proto::domain::StreamLimits;
use vfio_checkpoint_proto::stream::ACK_INTERVAL_FRAMES;
use vfio_checkpoint_proto::v1::StreamMessage;

use self::disk::{Disk, Record};

/// What a frame takes beside its state: the message, and its encoding around the state.
const FRAME_BYTES: u64 = 256;
/// Chunks that are under way while an ack is, beside what makes the ack due: in the queues of both sides.
const CHUNKS_UNDER_WAY: u64 = 4;

/// How much is kept, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolOptions {
    /// Bytes in memory. At least [`Spool::least_memory_bytes`]; what the network holds on top (up to 8 MiB with this
    /// library at both ends) keeps a connection that is well from ever needing the disk.
    pub memory_bytes: u64,
    /// Bytes on disk, once memory is full. 0 for none.
    pub disk_bytes: u64,
    /// Where they go. Not looked at without `disk_bytes`.
    pub folder: PathBuf,
}

impl Default for SpoolOptions {
    fn default() -> Self {
        Self { memory_bytes: 32 << 20, disk_bytes: 0, folder: std::env::temp_dir() }
    }
}

/// Frames that may have to be sent again.
#[derive(Debug)]
pub struct Spool {
    /// Each with the bytes of its state.
    frames: VecDeque<(Kept, u64)>,
    /// The number of the first of them.
    first: u64,
    memory_bytes: u64,
    in_memory_bytes: u64,
    disk: Option<Disk>,
    /// How many of the frames, counted from the last, may wait to be written.
    unwritten: usize,
}

#[derive(Debug)]
enum Kept {
    Memory {
        message: StreamMessage,
        bytes: u64,
    },
    /// It has its place on disk, and is not there yet.
    Unwritten {
        message: StreamMessage,
        record: Record,
    },
    Disk(Record),
}

impl Spool {
    /// Nothing is kept yet. The file on disk, where there is to be one, is made now.
    pub async fn open(options: SpoolOptions) -> Result<Self, SpoolError> {
        let SpoolOptions { memory_bytes, disk_bytes, folder } = options;
        let disk = if disk_bytes == 0 { None } else { Some(Disk::create(folder, disk_bytes).await?) };
        Ok(Self { disk, ..Self::in_memory(memory_bytes) })
    }

    /// The same without a disk.
    pub fn in_memory(memory_bytes: u64) -> Self {
        Self { frames: VecDeque::new(), first: 0, memory_bytes, in_memory_bytes: 0, disk: None, unwritten: 0 }
    }

    /// The least `memory_bytes` for a stream of these limits: what a taker may have without an ack, and what is under way
    /// meanwhile. With less a giver would wait for an ack that is not due.
    pub fn least_memory_bytes(limits: &StreamLimits) -> u64 {
        let chunk = FRAME_BYTES + u64::from(limits.max_chunk_bytes);
        limits
            .ack_interval_bytes
            .saturating_add(ACK_INTERVAL_FRAMES * FRAME_BYTES)
            .saturating_add(CHUNKS_UNDER_WAY * chunk)
    }

    /// Whether it is large enough for a stream of these limits.
    pub(super) fn check(&self, limits: &StreamLimits) -> Result<(), SpoolError> {
        let least_bytes = Self::least_memory_bytes(limits);
        if self.memory_bytes < least_bytes {
            return Err(SpoolError::TooSmall { memory_bytes: self.memory_bytes, least_bytes });
        }
        Ok(())
    }

    /// Whether there is state among what is kept.
    pub(super) fn has_state(&self) -> bool {
        self.frames.iter().any(|(_, state_bytes)| *state_bytes > 0)
    }

    /// Bytes of state among what is kept.
    pub(super) fn state_bytes(&self) -> u64 {
        self.frames.iter().map(|(_, state_bytes)| state_bytes).sum()
    }

    /// Bytes that are kept in memory.
    pub fn in_memory_bytes(&self) -> u64 {
        self.in_memory_bytes
    }

    /// Bytes that are kept on disk.
    pub fn on_disk_bytes(&self) -> u64 {
        self.disk.as_ref().map_or(0, Disk::used_bytes)
    }

    /// Whether one more frame with so much state can be kept now.
    pub(super) fn has_room(&self, state_bytes: usize) -> bool {
        let bytes = FRAME_BYTES.saturating_add(state_bytes as u64);
        self.fits_memory(bytes) || self.disk.as_ref().is_some_and(|disk| disk.fits(bytes))
    }

    fn fits_memory(&self, bytes: u64) -> bool {
        self.in_memory_bytes.saturating_add(bytes) <= self.memory_bytes
    }

    /// Keeps the next frame, for which there is room. What belongs on disk is written by [`Spool::settle`].
    pub(super) fn keep(&mut self, message: StreamMessage, state_bytes: usize) {
        let bytes = FRAME_BYTES.saturating_add(state_bytes as u64);
        if !self.fits_memory(bytes)
            && let Some(record) = self.disk.as_mut().and_then(|disk| disk.place(&message))
        {
            self.unwritten += 1;
            self.frames.push_back((Kept::Unwritten { message, record }, state_bytes as u64));
            return;
        }
        self.in_memory_bytes = self.in_memory_bytes.saturating_add(bytes);
        self.frames.push_back((Kept::Memory { message, bytes }, state_bytes as u64));
        if self.unwritten > 0 {
            self.unwritten += 1;
        }
    }

    /// Writes what belongs on disk. Cancel-safe: what was not written is written with the next call.
    pub(super) async fn settle(&mut self) -> Result<(), SpoolError> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        while self.unwritten > 0 {
            let at = self.frames.len().saturating_sub(self.unwritten);
            if let Some((kept, _)) = self.frames.get_mut(at)
                && let Kept::Unwritten { message, record } = kept
            {
                let record = *record;
                disk.write(message.clone(), record).await?;
                *kept = Kept::Disk(record);
            }
            self.unwritten -= 1;
        }
        Ok(())
    }

    /// The frame of this number, as it was made; none where it is not kept. Cancel-safe.
    pub(super) async fn frame(&self, sequence: u64) -> Result<Option<StreamMessage>, SpoolError> {
        let at = sequence.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        let kept = at.and_then(|at| self.frames.get(at)).map(|(kept, _)| kept);
        Ok(match (kept, &self.disk) {
            (Some(Kept::Memory { message, .. } | Kept::Unwritten { message, .. }), _) => {
                Some(message.clone())
            }
            (Some(Kept::Disk(record)), Some(disk)) => Some(disk.read(*record, sequence).await?),
            (Some(Kept::Disk(_)), None) | (None, _) => None,
        })
    }

    /// Forgets what is before the frame of this number, and says how many bytes of state that was.
    pub(super) fn acked(&mut self, next_sequence: u64) -> u64 {
        let mut acked_bytes = 0;
        while self.first < next_sequence {
            let Some((kept, state_bytes)) = self.frames.pop_front() else { break };
            self.first += 1;
            acked_bytes += state_bytes;
            match kept {
                Kept::Memory { bytes, .. } => {
                    self.in_memory_bytes = self.in_memory_bytes.saturating_sub(bytes);
                }
                Kept::Unwritten { .. } | Kept::Disk(_) => {
                    if let Some(disk) = &mut self.disk {
                        disk.free_first();
                    }
                }
            }
        }
        self.unwritten = self.unwritten.min(self.frames.len());
        acked_bytes
    }
}

/// Why frames cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// It would make the giver wait for an ack that is not due.
    #[error(
        "the spool has {memory_bytes} bytes of memory, and this stream takes at least {least_bytes}; give it more"
    )]
    TooSmall {
        /// What it has.
        memory_bytes: u64,
        /// What it takes.
        least_bytes: u64,
    },
    /// There can be no file.
    #[error("the spool cannot make a file in {}: {source}; see that the folder is there and may be written to", folder.display())]
    Folder {
        /// Where.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A frame was not written.
    #[error("the spool in {} cannot be written: {source}; see that there is room", folder.display())]
    Write {
        /// Where.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A frame cannot be read back.
    #[error("the spool in {} cannot be read: {source}", folder.display())]
    Read {
        /// Where.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What was read back is not what was written.
    #[error("the spool in {} does not give frame {sequence} back as it was; see that its disk is well", folder.display())]
    Damaged {
        /// Where.
        folder: PathBuf,
        /// Which frame.
        sequence: u64,
    },
}
