//! Why a folder cannot take or give a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use vfio_checkpoint_seal::Seal;

use super::{MANIFEST_FILE, MAX_MANIFEST_BYTES};

/// Why a folder cannot take or give a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A path is not a folder.
    #[error("{} is not a folder; give a folder", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// A folder holds something already.
    #[error("{} is not empty: it holds {found:?}; give a new or empty folder{}", path.display(),
        if *replaceable { ", or say that the checkpoint in it may be replaced" } else { "" })]
    NotEmpty {
        /// The folder.
        path: PathBuf,
        /// One of the things in it.
        found: String,
        /// Whether all that it holds is a checkpoint.
        replaceable: bool,
    },
    /// A file system that has too little room.
    #[error("{} has room for {free_bytes} bytes, and the state has {needed_bytes}; free some space or give a folder on another file system", path.display())]
    NoRoom {
        /// The folder.
        path: PathBuf,
        /// What is to be written.
        needed_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// A folder without a manifest.
    #[error("{} holds no checkpoint: there is no {MANIFEST_FILE}; a save that was cut off leaves none, so save again", path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
    },
    /// A symbolic link, a pipe or a device where a file should be.
    #[error("{} is not a regular file; links are not followed, so put the file itself there", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// A manifest that is too long.
    #[error("{} is longer than {MAX_MANIFEST_BYTES} bytes, so it is not the manifest of a checkpoint", path.display())]
    ManifestTooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A manifest that is not the JSON that it should be.
    #[error("{} cannot be read: {source}; take the checkpoint from an untouched copy", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// A manifest of another version.
    #[error("{} has format version {found}, but this program reads version {known}; use a newer program", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// What is known.
        known: u32,
    },
    /// A field of a manifest that cannot be.
    #[error("{}: {field}: {problem}; take the checkpoint from an untouched copy", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A file with more or less than the manifest says.
    #[error("{} has {found_bytes} bytes, but the manifest says {expected_bytes}; take the checkpoint from an untouched copy", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// What the manifest says.
        expected_bytes: u64,
        /// What is there.
        found_bytes: u64,
    },
    /// A file with something else than the manifest says.
    #[error("{} is damaged: sealed were {expected}, there are {found}; take the checkpoint from an untouched copy", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the manifest says.
        expected: Seal,
        /// What is there.
        found: Seal,
    },
    /// The manifest that the agent sent cannot be written down.
    #[error("the agent's manifest cannot be stored: {field}: {problem}")]
    Manifest {
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// State that came in another order than it can be written.
    #[error("the state of device {device} cannot be written: {problem}")]
    Order {
        /// The device.
        device: u32,
        /// What is wrong.
        problem: &'static str,
    },
    /// The thread that works on the files is gone.
    #[error("the work on the folder ended early: {0}")]
    Worker(#[source] io::Error),
}

impl FolderError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}

fn advice(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::StorageFull || source.kind() == io::ErrorKind::QuotaExceeded {
        "; free some space or give a folder on another file system"
    } else if source.kind() == io::ErrorKind::PermissionDenied
        || source.kind() == io::ErrorKind::ReadOnlyFilesystem
    {
        "; give a folder that this user may use"
    } else if source.kind() == io::ErrorKind::NotFound {
        "; see that the path is right"
    } else {
        ""
    }
}
