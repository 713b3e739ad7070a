//! A checkpoint in a local folder.
//!
//! ```text
//!   Taker -> FolderWriter -> device-0.state, device-1.state ...   fsynced in steps while they grow
//!                         -> manifest.json                        last: temporary file, fsync, rename, fsync of the folder
//!   FolderReader: manifest.json -> sizes -> seals -> chunks -> Giver
//! ```
//!
//! Invariants:
//! - A folder without `manifest.json` is no checkpoint. The manifest is there only once all state is durable.
//! - A folder that holds something is refused, unless the caller says that a checkpoint in it may be replaced. Nothing
//!   is ever deleted that this module would not have written.
//! - What is read is not trusted: no path comes from the manifest, symbolic links are not followed, lengths are bounded,
//!   and every seal is compared before a byte is sent.
//! - Files are worked on in threads of their own, with a short bounded queue, never on the runtime's.
//! - Device state may hold secrets: files are for their owner only.
//!
//! Failure paths: a writer that fails or is dropped removes what it wrote. A crash leaves files without a manifest.

mod error;
mod manifest;
mod probe;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open, openat};

pub use error::FolderError;
pub use manifest::{FolderManifest, SavedDevice};
pub use probe::{check_free, check_room};
pub use reader::{ChunkReader, FolderReader};
pub use writer::{Existing, FolderWriter, set_consistency};

/// The name of the manifest.
pub const MANIFEST_FILE: &str = "manifest.json";
/// What the manifest is called until it is whole.
const MANIFEST_TEMPORARY: &str = "manifest.json.new";
/// What is made and removed to see whether a folder can be written into.
const PROBE_FILE: &str = "probe.new";
/// The longest manifest that is read or written.
pub const MAX_MANIFEST_BYTES: u64 = 1024 * 1024;
/// The most devices of a checkpoint, as in the contract.
pub const MAX_DEVICES: usize = 64;
/// How many chunks may wait for the disk, or for the network.
const QUEUED_CHUNKS: usize = 2;

/// The name of a device's file.
fn state_file(device: usize) -> String {
    format!("device-{device}.state")
}

/// Whether this module would have given a file that name.
fn is_ours(name: &str) -> bool {
    name == MANIFEST_FILE
        || name == MANIFEST_TEMPORARY
        || name == PROBE_FILE
        || (0..MAX_DEVICES).any(|device| name == state_file(device))
}

/// An open folder. All files in it are reached through it, so that it stays the same one.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    file: File,
}

impl Folder {
    fn open(path: &Path) -> Result<Self, FolderError> {
        // A pipe that nobody writes to would be waited for, if it were opened as a file.
        match open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Self { path: path.to_owned(), file: File::from(fd) }),
            Err(rustix::io::Errno::NOTDIR) => Err(FolderError::NotAFolder { path: path.to_owned() }),
            Err(errno) => Err(FolderError::io("open", path, errno.into())),
        }
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a regular file that is there. A pipe does not block it and a symbolic link is refused.
    fn open_file(&self, name: &str) -> Result<File, FolderError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.file, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(rustix::io::Errno::LOOP) => return Err(FolderError::NotRegular { path: self.path_of(name) }),
            Err(errno) => return Err(FolderError::io("open", &self.path_of(name), errno.into())),
        };
        let metadata =
            file.metadata().map_err(|source| FolderError::io("look at", &self.path_of(name), source))?;
        if !metadata.is_file() {
            return Err(FolderError::NotRegular { path: self.path_of(name) });
        }
        Ok(file)
    }

    fn create_file(&self, name: &str) -> Result<File, FolderError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&self.file, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(File::from(fd)),
            Err(errno) => Err(FolderError::io("create", &self.path_of(name), errno.into())),
        }
    }

    /// Removes a file if it is there.
    fn remove_file(&self, name: &str) -> Result<(), FolderError> {
        match rustix::fs::unlinkat(&self.file, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(errno) => Err(FolderError::io("remove", &self.path_of(name), errno.into())),
        }
    }

    fn sync(&self) -> Result<(), FolderError> {
        self.file.sync_all().map_err(|source| FolderError::io("sync", &self.path, source))
    }
}

/// Runs work on files off the runtime.
async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FolderError> + Send + 'static,
) -> Result<T, FolderError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(join) => Err(FolderError::Worker(io::Error::other(join))),
    }
}
