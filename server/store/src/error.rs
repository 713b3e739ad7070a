//! What can be wrong with a store.

use std::io;
use std::path::PathBuf;

use crate::CheckpointId;

/// What went wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store did not do what it was asked, for now or for good: network, permissions, disk.
    #[error("the store cannot {what} {key}")]
    Unavailable {
        /// What was asked.
        what: &'static str,
        /// Of which object.
        key: String,
        /// What it answered.
        #[source]
        source: object_store::Error,
    },
    /// There is no room.
    #[error(
        "the store has no room: {needed_bytes} bytes are needed and {free_bytes} are free; delete checkpoints, and collect"
    )]
    NoSpace {
        /// What is needed.
        needed_bytes: u64,
        /// What is free, beside what is to be left free.
        free_bytes: u64,
    },
    /// The disk became full on the way.
    #[error("the store's disk became full when {key} was written; delete checkpoints, and collect")]
    DiskFull {
        /// What was written.
        key: String,
        /// What the system said.
        #[source]
        source: object_store::Error,
    },
    /// There is no such checkpoint.
    #[error("there is no checkpoint {id} in the store; it was deleted, or never whole")]
    NotFound {
        /// Its id.
        id: CheckpointId,
    },
    /// What is stored is not what was stored.
    #[error("{key} is damaged: {problem}")]
    Damaged {
        /// Which object.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The store was written by another version, or is none.
    #[error("{name} is no store that this version reads: {problem}")]
    Foreign {
        /// Where.
        name: String,
        /// What was found.
        problem: String,
    },
    /// There was a store, and now there is none.
    #[error(
        "{name} was a store and has no marker of one now: mount its disk; where it is gone for good, give the store \
         another name in the configuration"
    )]
    Missing {
        /// Where.
        name: String,
    },
    /// Something in a local store is a link, or no regular file.
    #[error("{} is a symbolic link or no regular file, which a store never has; look who put it there", path.display())]
    NotRegular {
        /// Which file.
        path: PathBuf,
    },
    /// The writer slept for so long that it was taken for gone.
    #[error("checkpoint {id} was revoked, because its writer had not been heard of for too long; save again")]
    Revoked {
        /// Which one it would have been.
        id: CheckpointId,
    },
    /// It is more than the format holds.
    #[error("{what} would have {bytes} bytes, and at most {most_bytes} are possible")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much it would be.
        bytes: u64,
        /// How much is possible.
        most_bytes: u64,
    },
    /// What it was given cannot be stored.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which part of it.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Where the store is said to be.
    #[error("{location:?} is no place for a store: {problem}")]
    Location {
        /// As it was given.
        location: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The folder of a local store.
    #[error("cannot {what} {}", path.display())]
    Folder {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A thread that worked for the store died.
    #[error("work for the store died, which is a defect to report")]
    Died,
}

impl StoreError {
    /// Whether trying again may help without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { source, .. } => matches!(source, object_store::Error::Generic { .. }),
            Self::NoSpace { .. }
            | Self::DiskFull { .. }
            | Self::NotFound { .. }
            | Self::Damaged { .. }
            | Self::Foreign { .. }
            | Self::Missing { .. }
            | Self::NotRegular { .. }
            | Self::Revoked { .. }
            | Self::TooLarge { .. }
            | Self::Invalid { .. }
            | Self::Location { .. }
            | Self::Folder { .. }
            | Self::Died => false,
        }
    }

    /// Whether it may be over in a while: the store is one, and was not reached, or is full. The others are over once
    /// somebody mends them.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::DiskFull { .. } | Self::NoSpace { .. })
    }

    /// What the store answered. Recognises a full disk, and a link that the local store refused to follow.
    pub(crate) fn answered(what: &'static str, key: &impl ToString, source: object_store::Error) -> Self {
        let mut below: Option<&(dyn std::error::Error + 'static)> = Some(&source);
        while let Some(error) = below {
            let io = error.downcast_ref::<io::Error>();
            let inner = io.and_then(io::Error::get_ref);
            if let Some(refused) = inner.and_then(|inner| inner.downcast_ref::<crate::local::NotRegular>()) {
                return Self::NotRegular { path: refused.0.clone() };
            }
            let kind = io.map(io::Error::kind);
            if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
                return Self::DiskFull { key: key.to_string(), source };
            }
            below = error.source();
        }
        Self::Unavailable { what, key: key.to_string(), source }
    }

    /// Whether there is no such checkpoint.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether it is this very object that is damaged.
    pub(crate) fn is_about(&self, at: &impl ToString) -> bool {
        matches!(self, Self::Damaged { key, .. } if *key == at.to_string())
    }

    pub(crate) fn damaged(key: &impl ToString, problem: impl Into<String>) -> Self {
        Self::Damaged { key: key.to_string(), problem: problem.into() }
    }
}
