//! Why a stream of state ended before it was complete.

use std::time::Duration;

use vfio_checkpoint_proto::stream::ProtocolError;
use vfio_checkpoint_seal::SealMismatch;

use super::link::LinkError;
use super::open::OpenStreamError;
use super::spool::SpoolError;

/// Why a stream of state ended before it was complete.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The connection failed or ended.
    #[error("the stream broke: {0}")]
    Broken(#[source] LinkError),
    /// The other side gave up and said why.
    #[error("the other side gave the stream up: {0}")]
    AbortedByPeer(String),
    /// The other side broke the protocol, or was about to be sent what breaks it.
    #[error("the stream broke its protocol: {}", with_sources(.0))]
    Protocol(#[source] ProtocolError),
    /// The other side neither sent nor read anything for too long.
    #[error("nothing moved on the stream for {} ms", .0.as_millis())]
    Idle(Duration),
    /// The taker has all state, and did not say in time that it is durable.
    #[error("the taker did not say within {} ms that the checkpoint is durable", .0.as_millis())]
    NotSealed(Duration),
    /// What was given is not what was said to be given. Its seal was not sent.
    #[error("device {device}: {source}")]
    Changed {
        /// The device.
        device: usize,
        /// Both digests.
        source: SealMismatch,
    },
    /// The stream took longer than it may.
    #[error("the stream was not complete after {} s", .0.as_secs())]
    Lifetime(Duration),
    /// What has to be kept so that it can be sent again cannot be kept, or not be read.
    #[error("{0}")]
    Spool(#[from] SpoolError),
    /// The connection broke, and the stream could not go on over another one.
    #[error("{broke}; the stream could not be resumed: {why}")]
    NotResumed {
        /// What was first.
        broke: Box<Self>,
        /// What was then.
        #[source]
        why: Unresumed,
    },
}

impl TransferError {
    /// Whether it is the connection alone that failed, so that the stream may go on over another one.
    pub fn is_break(&self) -> bool {
        match self {
            Self::Broken(link) => !link.is_left(),
            Self::Idle(_) => true,
            Self::AbortedByPeer(_)
            | Self::Protocol(_)
            | Self::NotSealed(_)
            | Self::Changed { .. }
            | Self::Lifetime(_)
            | Self::Spool(_)
            | Self::NotResumed { .. } => false,
        }
    }
}

/// Why a stream was not resumed.
#[derive(Debug, thiserror::Error)]
pub enum Unresumed {
    /// The other side has no such stream any more, or does not resume it.
    #[error("{0}")]
    Refused(#[source] OpenStreamError),
    /// There was no connection in time.
    #[error("there was no connection within {} ms; the last one failed: {last}", .window.as_millis())]
    Window {
        /// How long it was tried.
        window: Duration,
        /// The last of the troubles.
        #[source]
        last: OpenStreamError,
    },
    /// It was resumed, and broke again without the taker having acknowledged anything new, until the window was over.
    #[error("it broke again and again, and nothing new was acknowledged within {} ms", .0.as_millis())]
    NoProgress(Duration),
    /// Whoever tried has died.
    #[error("whoever was to connect again is gone, which is a defect to report")]
    Died,
}

/// An error's own words often say where, and those of its sources what.
fn with_sources(error: &ProtocolError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = text + ": " + &cause.to_string();
        source = cause.source();
    }
    text
}
