//! What can go wrong on a connection, and what it means for the device.
//!
//! ```text
//!   Refused                     the server said no: the connection is fine           -> DeviceError::Os
//!   TooLong, TooManyFds, Fd     nothing was sent                                     -> DeviceError::Argument, Os
//!   Peer                        the server does not keep to the protocol             -> DeviceError::Peer
//!   Lost, Broken                nobody can tell what the device did                  -> DeviceError::Disconnected
//! ```

use std::io;

use crate::vfio_user::codec::{Code, DecodeError, TooLong, VersionError};
use crate::{Call, DeviceError};

/// How a peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// It sent what is no message.
    #[error(transparent)]
    Message(#[from] DecodeError),
    /// It speaks another version.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// It answered what nobody asked.
    #[error("a reply came to message {id}, which was not sent or was answered before")]
    UnknownReply {
        /// The id of the reply.
        id: u16,
    },
    /// It answered another command than was asked.
    #[error("message {id} asked {asked:?} and was answered as {answered:?}")]
    WrongCommand {
        /// The id of both.
        id: u16,
        /// What was asked.
        asked: Code,
        /// What was answered.
        answered: Code,
    },
    /// It sent more file descriptors with a message than it may.
    #[error("more than {limit} file descriptors came with one message")]
    TooManyFds {
        /// The most that it was told it may send.
        limit: usize,
    },
    /// More answers to earlier owners of the connection came than those can have waited for.
    #[error("more replies to earlier owners of the connection came than those can have waited for")]
    TooManyLeftOver,
    /// A successful reply does not say what was asked, or says something else.
    #[error("the reply to {asked:?} does not answer it: {reason}")]
    NoAnswer {
        /// What was asked.
        asked: Code,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Why a message was not sent or not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The peer answered with an error. The connection is fine.
    #[error("the peer refused")]
    Refused {
        /// The errno of its answer.
        #[source]
        source: io::Error,
    },
    /// The message is longer than the peer accepts. Nothing was sent.
    #[error("the message was not sent")]
    TooLong(#[from] TooLong),
    /// More file descriptors than the peer accepts. Nothing was sent.
    #[error("{given} file descriptors are more than the {limit} that the peer accepts with one message")]
    TooManyFds {
        /// How many were given.
        given: usize,
        /// How many the peer accepts.
        limit: u64,
    },
    /// A file descriptor could not be duplicated. Nothing was sent.
    #[error("a file descriptor could not be duplicated")]
    Fd(#[source] io::Error),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol")]
    Peer(#[from] PeerError),
    /// The connection is lost: the peer is gone, or did not answer in time. Whether it did what was asked is not known.
    #[error("the connection is lost")]
    Lost(#[source] io::Error),
    /// The connection was lost or out of step before. Nothing was sent.
    #[error("the connection was lost before")]
    Broken,
}

impl ConnectionError {
    /// A connection lost with this errno.
    pub(super) fn lost(errno: i32) -> Self {
        Self::Lost(io::Error::from_raw_os_error(errno))
    }

    /// The errno of a refusal.
    pub fn refusal(&self) -> Option<i32> {
        match self {
            Self::Refused { source } => source.raw_os_error(),
            Self::TooLong(_)
            | Self::TooManyFds { .. }
            | Self::Fd(_)
            | Self::Peer(_)
            | Self::Lost(_)
            | Self::Broken => None,
        }
    }

    /// What this means for the call on the device that it failed.
    pub fn during(self, call: Call) -> DeviceError {
        match self {
            Self::Refused { source } | Self::Fd(source) => DeviceError::os(call, source),
            Self::TooLong(error) => DeviceError::Argument { call, reason: error.to_string() },
            error @ Self::TooManyFds { .. } => DeviceError::Argument { call, reason: error.to_string() },
            Self::Peer(source) => DeviceError::Peer { call, source: Box::new(source) },
            Self::Lost(source) => DeviceError::Disconnected { call, source },
            Self::Broken => {
                let source = io::Error::from_raw_os_error(libc::ENOTCONN);
                DeviceError::Disconnected { call, source }
            }
        }
    }
}
