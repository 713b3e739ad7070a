//! Whether a checkpoint could be written into a folder: before devices are stopped for it.
//!
//! ```text
//!   check_free  what is in it -> lock -> make, write and remove a file      what a save would do first
//!   check_room  bytes that are free, and those that a replacement frees     what it would need last
//! ```
//!
//! Rights are not computed but tried: a superuser, an export of NFS, a quota and a read-only mount each have rules of their
//! own. Invariants: what was made is removed, and nothing else is. Failure paths: the same errors as those of a save.

use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::writer::{above, lock, look, make_folder};
use super::{Existing, Folder, FolderError, PROBE_FILE, off_runtime};

/// The unit of a file's blocks, whatever the file system's own are.
const STAT_BLOCK_BYTES: u64 = 512;

/// Says whether a checkpoint could be written there, and leaves everything as it is.
pub async fn check_free(path: &Path, existing: Existing) -> Result<(), FolderError> {
    let path = path.to_owned();
    off_runtime(move || {
        let is_new = make_folder(&path)?;
        let probed = Folder::open(&path).and_then(|folder| probe(&folder, existing));
        let removed = if is_new { std::fs::remove_dir(&path) } else { Ok(()) };
        probed?;
        removed.map_err(|source| FolderError::io("remove", &path, source))
    })
    .await
}

fn probe(folder: &Folder, existing: Existing) -> Result<(), FolderError> {
    look(folder, existing)?;
    lock(folder)?;
    // One that a probe left behind which was killed.
    folder.remove_file(PROBE_FILE)?;
    let mut file = folder.create_file(PROBE_FILE)?;
    // Some file systems find only at a sync that there is no room.
    let written = file.write_all(b"\n").and_then(|()| file.sync_all());
    let removed = folder.remove_file(PROBE_FILE);
    written.map_err(|source| FolderError::io("write", &folder.path_of(PROBE_FILE), source))?;
    removed
}

/// Says whether so much could be written there, as far as the file system tells.
pub async fn check_room(path: &Path, existing: Existing, needed_bytes: u64) -> Result<(), FolderError> {
    let path = path.to_owned();
    off_runtime(move || {
        let (folder, replaced_bytes) = match Folder::open(&path) {
            Ok(folder) => {
                let replaced_bytes =
                    look(&folder, existing)?.iter().map(|name| taken_bytes(&folder, name)).sum();
                (folder, replaced_bytes)
            }
            Err(FolderError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                (Folder::open(above(&path))?, 0_u64)
            }
            Err(error) => return Err(error),
        };
        let found = rustix::fs::fstatvfs(&folder.file)
            .map_err(|errno| FolderError::io("look at the file system of", &path, errno.into()))?;
        let free_bytes = found.f_bavail.saturating_mul(found.f_frsize).saturating_add(replaced_bytes);
        if free_bytes < needed_bytes {
            return Err(FolderError::NoRoom { path, needed_bytes, free_bytes });
        }
        Ok(())
    })
    .await
}

/// What a file takes. One that is gone takes nothing.
fn taken_bytes(folder: &Folder, name: &str) -> u64 {
    std::fs::symlink_metadata(folder.path_of(name))
        .map_or(0, |found| found.blocks().saturating_mul(STAT_BLOCK_BYTES))
}
