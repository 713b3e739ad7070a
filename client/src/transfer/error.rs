//! Why a stream of state ended before it was complete.

use std::time::Duration;

use vfio_checkpoint_proto::stream::ProtocolError;
use vfio_checkpoint_seal::SealMismatch;

use super::link::LinkError;

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
