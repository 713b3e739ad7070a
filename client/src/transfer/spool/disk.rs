//! The part of a spool that is on disk: a file without a name, used as a ring.
//!
//! ```text
//!   0 ...... first record ====== next ...... capacity        records are in one piece each
//!   0 === next ...... first record ====== (unused) capacity  the next one begins at 0 where it would not fit
//! ```
//! The capacity is what was asked for, or as long as the file is and may become, where that is less.
//!
//! Invariants: records are freed in the order in which they were placed, and none overlaps one that is not free. Room is
//! used again, and goes back to the file system when the file is closed. The file grows only while the file system has
//! [`KEEP_FREE_BYTES`] besides: whoever shares it, a journal for one, must be able to write in an outage, too.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};
use vfio_checkpoint_proto::frame::is_intact;
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::wire::{Assembly, Encoded, Sender, encode};

use super::SpoolError;

/// What the spools leave free of their file system. Each looks after each write of its own, so that many at once may come
/// short of it by a chunk each.
pub(super) const KEEP_FREE_BYTES: u64 = 512 << 20;

/// Where a frame is in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

#[derive(Debug)]
pub(super) struct Disk {
    folder: PathBuf,
    file: Arc<File>,
    ring: Ring,
    capacity_bytes: u64,
    /// How long the file is.
    grown_bytes: u64,
    /// How much longer it may become, as far as is known.
    room_bytes: u64,
    /// The write that is under way. Whoever waited for it may be gone; the next one comes after it, or the two could be
    /// of the same place.
    writing: Option<JoinHandle<io::Result<u64>>>,
}

impl Disk {
    pub(super) async fn create(folder: PathBuf, capacity_bytes: u64) -> Result<Self, SpoolError> {
        let at = folder.clone();
        let made = blocking(move || nameless(&at).and_then(|file| Ok((room(&file)?, file))));
        match made.await {
            Ok((room_bytes, file)) => Ok(Self { room_bytes, ..Self::of(folder, file, capacity_bytes) }),
            Err(source) => Err(SpoolError::Folder { folder, source }),
        }
    }

    pub(super) fn of(folder: PathBuf, file: File, capacity_bytes: u64) -> Self {
        Self {
            folder,
            file: Arc::new(file),
            ring: Ring::default(),
            capacity_bytes,
            grown_bytes: 0,
            room_bytes: u64::MAX,
            writing: None,
        }
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.ring.records.iter().map(|record| record.bytes).sum()
    }

    pub(super) fn fits(&self, bytes: u64) -> bool {
        self.ring.next(bytes, self.end_bytes()).is_some()
    }

    /// How far the file may reach.
    fn end_bytes(&self) -> u64 {
        self.capacity_bytes.min(self.grown_bytes.saturating_add(self.room_bytes))
    }

    /// Makes a place for a message, if there is one.
    pub(super) fn place(&mut self, message: &StreamMessage) -> Option<Record> {
        let Encoded { head, state } = encode(message.clone());
        let bytes = (head.len() + state.len()) as u64;
        let record = self.ring.place(bytes, self.end_bytes())?;
        let growth = (record.offset + bytes).saturating_sub(self.grown_bytes);
        self.grown_bytes += growth;
        self.room_bytes = self.room_bytes.saturating_sub(growth);
        Some(record)
    }

    pub(super) fn free_first(&mut self) {
        self.ring.records.pop_front();
    }

    pub(super) async fn write(&mut self, message: StreamMessage, record: Record) -> Result<(), SpoolError> {
        self.written().await?;
        let file = Arc::clone(&self.file);
        self.writing = Some(spawn_blocking(move || {
            let Encoded { head, state } = encode(message);
            file.write_all_at(&head, record.offset)?;
            file.write_all_at(&state, record.offset + head.len() as u64)?;
            room(&file)
        }));
        self.written().await
    }

    async fn written(&mut self) -> Result<(), SpoolError> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let written = writing.await.map_err(io::Error::other).flatten();
        self.writing = None;
        self.room_bytes =
            written.map_err(|source| SpoolError::Write { folder: self.folder.clone(), source })?;
        Ok(())
    }

    /// The frame that was written there, if it is the one of this number and whole.
    pub(super) async fn read(&self, record: Record, sequence: u64) -> Result<StreamMessage, SpoolError> {
        let file = Arc::clone(&self.file);
        let read = blocking(move || {
            // No longer than what this process has placed there.
            let mut bytes = vec![0; usize::try_from(record.bytes).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut bytes, record.offset)?;
            Ok(Bytes::from(bytes))
        });
        let bytes = read.await.map_err(|source| SpoolError::Read { folder: self.folder.clone(), source })?;
        let damaged = || SpoolError::Damaged { folder: self.folder.clone(), sequence };
        let mut assembly = Assembly::new(Sender::Agent);
        assembly.push(bytes);
        let message = assembly.message().ok().flatten().ok_or_else(damaged)?;
        let is_whole = assembly.finish().is_ok()
            && matches!(&message.kind, Some(Kind::Frame(frame)) if frame.sequence == sequence && is_intact(frame));
        if is_whole { Ok(message) } else { Err(damaged()) }
    }
}

/// Runs what may block on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// What spools may take of the file system that a file is on.
fn room(file: &File) -> io::Result<u64> {
    let known = rustix::fs::fstatvfs(file)?;
    Ok(known.f_bavail.saturating_mul(known.f_frsize).saturating_sub(KEEP_FREE_BYTES))
}

/// A file in `folder` that nobody else finds, and that is gone once it is closed.
fn nameless(folder: &Path) -> io::Result<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".vfio-checkpoint-spool-{}-{number}", std::process::id()));
        match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            // Of an earlier process of this number, which ended between the two lines above.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Which parts of the file are in use.
#[derive(Debug, Default)]
struct Ring {
    /// In the order in which they were placed.
    records: VecDeque<Record>,
}

impl Ring {
    /// Where a record of this length goes in so many bytes, if there is room. No record reaches further than that.
    fn next(&self, bytes: u64, capacity_bytes: u64) -> Option<u64> {
        let (Some(first), Some(last)) = (self.records.front(), self.records.back()) else {
            return (bytes <= capacity_bytes).then_some(0);
        };
        let end = last.offset + last.bytes;
        if last.offset < first.offset {
            return (bytes <= first.offset - end).then_some(end);
        }
        if bytes <= capacity_bytes.saturating_sub(end) {
            return Some(end);
        }
        (bytes <= first.offset).then_some(0)
    }

    fn place(&mut self, bytes: u64, capacity_bytes: u64) -> Option<Record> {
        let record = Record { offset: self.next(bytes, capacity_bytes)?, bytes };
        self.records.push_back(record);
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_uses_its_room_again_and_never_twice_at_once() {
        let mut ring = Ring::default();
        let offset = |ring: &mut Ring, bytes| ring.place(bytes, 10).map(|record| record.offset);
        assert_eq!(offset(&mut ring, 11), None);
        assert_eq!([4, 4, 3].map(|bytes| offset(&mut ring, bytes)), [Some(0), Some(4), None]);
        assert_eq!(offset(&mut ring, 2), Some(8));
        ring.records.pop_front();
        assert_eq!([3, 2, 1].map(|bytes| offset(&mut ring, bytes)), [Some(0), None, Some(3)]);
        // What is left is 4..8, 8..10, 0..3, 3..4: full.
        assert_eq!(offset(&mut ring, 1), None);
        for _ in 0..4 {
            ring.records.pop_front();
        }
        assert_eq!(offset(&mut ring, 10), Some(0));
    }

    /// A message that is so long in the file.
    fn message(bytes: u64) -> StreamMessage {
        let abort = |reason: u64| {
            let reason = "x".repeat(usize::try_from(reason).unwrap());
            StreamMessage { kind: Some(Kind::Abort(vfio_checkpoint_proto::v1::StreamAbort { reason })) }
        };
        let length = |message: &StreamMessage| {
            let Encoded { head, state } = encode(message.clone());
            (head.len() + state.len()) as u64
        };
        let message = (0..bytes).map(abort).find(|message| length(message) == bytes);
        message.unwrap_or_else(|| panic!("no message is {bytes} bytes long"))
    }

    #[test]
    fn a_file_does_not_grow_into_what_is_kept_free() {
        let mut disk = Disk::of(PathBuf::new(), tempfile::tempfile().unwrap(), 1000);
        disk.room_bytes = 100;
        let place = |disk: &mut Disk, bytes| disk.place(&message(bytes)).map(|record| record.offset);
        assert_eq!(place(&mut disk, 60), Some(0));
        assert!(disk.fits(40) && !disk.fits(41));
        assert_eq!(place(&mut disk, 41), None);
        assert_eq!(place(&mut disk, 30), Some(60));
        assert_eq!(place(&mut disk, 20), None);
        // Room is used again, also while there are records after it, and though the ring could be longer.
        disk.free_first();
        assert!(disk.fits(60) && !disk.fits(61));
        assert_eq!(place(&mut disk, 20), Some(0));
        assert_eq!(place(&mut disk, 41), None, "it would be where the last one is");
        assert_eq!(place(&mut disk, 40), Some(20));
        for _ in 0..3 {
            disk.free_first();
        }
        assert!(disk.fits(100) && !disk.fits(101), "what it has it may use again");
    }

    /// Others write to the same file system: after each write it is looked at again what there is.
    #[tokio::test]
    async fn what_there_is_is_looked_at_after_each_write() {
        let file = tempfile::tempfile().unwrap();
        let known = rustix::fs::fstatvfs(&file).unwrap();
        let mut disk = Disk::of(PathBuf::new(), file, 1000);
        let message = message(60);
        let record = disk.place(&message).unwrap();
        assert!(disk.room_bytes > u64::MAX / 2, "nobody has looked");
        disk.write(message, record).await.unwrap();
        // Whoever else writes here meanwhile does not write as much as is kept free.
        let free_bytes = known.f_bavail * known.f_frsize;
        let found = disk.room_bytes;
        assert!(found <= free_bytes.saturating_sub(KEEP_FREE_BYTES / 2), "{found} of {free_bytes}");
        assert!(found >= free_bytes.saturating_sub(2 * KEEP_FREE_BYTES), "{found} of {free_bytes}");
    }

    #[test]
    fn no_two_records_overlap_whatever_is_placed_and_freed() {
        let mut ring = Ring::default();
        let mut random = 7_u64;
        let mut placed = 0;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if random >> 63 == 0 {
                ring.records.pop_front();
            } else if ring.place(1 + (random >> 33) % 300, 1000).is_some() {
                placed += 1;
            }
            let mut used: Vec<_> =
                ring.records.iter().map(|record| (record.offset, record.offset + record.bytes)).collect();
            used.sort_unstable();
            assert!(used.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{used:?}");
            assert!(used.iter().all(|(_, end)| *end <= 1000), "{used:?}");
        }
        assert!(placed > 1000);
    }
}
