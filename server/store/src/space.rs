//! Space for a checkpoint, before its save begins.
//!
//! In a local store the space is taken: a hidden file of that length is allocated, and it shrinks as chunks are written.
//! Where the file system cannot allocate, the free space is looked at instead. A bucket elsewhere has no such notion.
//!
//! Deleting takes a little space, too, before it gives any back. So a local store keeps ballast, a file that it drops where
//! its disk is full. It is taken in by who keeps the store, and again after each collection.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, fallocate, fstatvfs, ftruncate, openat, unlinkat};
use rustix::io::Errno;

use crate::local::{LocalFolder, off_runtime};
use crate::{CheckpointId, Store, StoreError};

/// Space of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What a checkpoint may take, in bytes.
    pub free_bytes: u64,
    /// What the file system has, in bytes.
    pub total_bytes: u64,
}

impl Store {
    /// How much space there is. None where the store does not know.
    pub async fn space(&self) -> Result<Option<Space>, StoreError> {
        match self.bucket.folder() {
            Some(folder) => folder.space(self.limits.keep_free_bytes).await.map(Some),
            None => Ok(None),
        }
    }

    /// Takes a little space in now, so that a disk that is full later can still be freed. For whoever keeps the store; who
    /// only looks into it has no need of this.
    pub async fn keep_ballast(&self) {
        self.bucket.after_freeing().await;
    }

    pub(crate) async fn reserve(&self, id: CheckpointId, bytes: u64) -> Result<Reservation, StoreError> {
        match self.bucket.folder() {
            Some(folder) => Reservation::take(folder, id, bytes, self.limits.keep_free_bytes).await,
            None => Ok(Reservation { file: None, left_bytes: 0 }),
        }
    }
}

impl LocalFolder {
    async fn space(&self, keep_free_bytes: u64) -> Result<Space, StoreError> {
        let root = Arc::clone(self.root());
        let stat = off_runtime(move || fstatvfs(&*root)).await?;
        let stat = stat.map_err(|errno| self.failed("look at the space of", errno))?;
        Ok(Space {
            free_bytes: (stat.f_bavail.saturating_mul(stat.f_frsize)).saturating_sub(keep_free_bytes),
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    /// Whether there is room for so many bytes beside what is to stay free.
    pub(crate) async fn check_room(&self, bytes: u64, keep_free_bytes: u64) -> Result<(), StoreError> {
        let free_bytes = self.space(keep_free_bytes).await?.free_bytes;
        if bytes <= free_bytes {
            Ok(())
        } else {
            Err(StoreError::NoSpace { needed_bytes: bytes, free_bytes })
        }
    }

    /// Drops the ballast, so that what frees space has space to do so.
    pub(crate) async fn drop_ballast(&self) {
        let root = Arc::clone(self.root());
        let dropped = off_runtime(move || unlinkat(&*root, BALLAST, AtFlags::empty())).await;
        if !matches!(dropped, Ok(Ok(()) | Err(Errno::NOENT))) {
            tracing::info!(store = %self.path().display(), ?dropped, "the ballast cannot be dropped");
        }
    }

    /// Takes the ballast in, if there is room for it.
    pub(crate) async fn take_ballast(&self) {
        let root = Arc::clone(self.root());
        let taken = off_runtime(move || {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::NOFOLLOW;
            let file = openat(&*root, BALLAST, flags, Mode::RUSR | Mode::WUSR)?;
            fallocate(&file, FallocateFlags::empty(), 0, BALLAST_BYTES)
        })
        .await;
        // On a full disk, or a file system that cannot, the store works without.
        if !matches!(taken, Ok(Ok(()))) {
            tracing::debug!(store = %self.path().display(), ?taken, "no ballast");
        }
    }

    fn failed(&self, what: &'static str, errno: Errno) -> StoreError {
        StoreError::Folder { what, path: self.path().to_owned(), source: errno.into() }
    }
}

const BALLAST: &str = ".ballast";
/// Enough for the largest list of what is to be deleted, and a few words.
const BALLAST_BYTES: u64 = 16 << 20;

/// Space that was taken. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    file: Option<Arc<OwnedFd>>,
    left_bytes: u64,
}

impl Reservation {
    async fn take(
        folder: &LocalFolder,
        id: CheckpointId,
        bytes: u64,
        keep_free_bytes: u64,
    ) -> Result<Self, StoreError> {
        let space = folder.space(keep_free_bytes).await?;
        let no_space = StoreError::NoSpace { needed_bytes: bytes, free_bytes: space.free_bytes };
        if bytes > space.free_bytes || space.free_bytes == 0 {
            return Err(no_space);
        }
        if bytes == 0 {
            return Ok(Self { file: None, left_bytes: 0 });
        }
        let root = Arc::clone(folder.root());
        let allocated = off_runtime(move || allocate(&root, id, bytes)).await?;
        match allocated {
            Ok(file) => Ok(Self { file: Some(Arc::new(file)), left_bytes: bytes }),
            // The look at the free space has to do.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Self { file: None, left_bytes: 0 }),
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Err(no_space),
            Err(errno) => Err(folder.failed("reserve space in", errno)),
        }
    }

    /// Gives some of it back, for what is about to be written.
    pub(crate) async fn shrink(&mut self, bytes: u64) -> Result<(), StoreError> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        self.left_bytes = self.left_bytes.saturating_sub(bytes);
        let left = self.left_bytes;
        // Where it does not shrink there is less space than there could be, and nothing else is wrong.
        let _ = off_runtime(move || ftruncate(&*file, left)).await?;
        Ok(())
    }
}

/// A file without a name: it goes with its last descriptor, also when the process is killed.
fn allocate(root: &OwnedFd, id: CheckpointId, bytes: u64) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = match openat(root, ".", flags | OFlags::TMPFILE, mode) {
        Ok(file) => file,
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let name = format!(".reserved-{id}");
            let file = openat(root, &*name, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
            unlinkat(root, &*name, AtFlags::empty())?;
            file
        }
        Err(errno) => return Err(errno),
    };
    fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    Ok(file)
}
