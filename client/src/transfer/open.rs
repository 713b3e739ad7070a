//! Opens the stream of an operation over a [`Client`], and hands out the half that the caller is.
//!
//! ```text
//!   StreamState -> Open{operation, role, versions} -> Opened{version, stream_id, manifest, limits} -> Taker | Giver
//! ```
//!
//! Invariants: what the agent answers is validated before anything of it is used. Failure paths: [`OpenStreamError`];
//! nothing of the operation has been touched then, and it waits for its stream until its deadline.

use std::time::Duration;

use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use vfio_checkpoint_proto::domain::{Invalid, Manifest, StreamLimits, StreamOpen, StreamOpened, StreamRole};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::v1::{StreamMessage, StreamStateRequest, StreamStateResponse};
use vfio_checkpoint_proto::version::{Version, VersionRange};
use vfio_checkpoint_proto::{MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, MAX_MESSAGE_BYTES};

use super::give::Giver;
use super::link::{Link, LinkError, Terms};
use super::take::Taker;
use crate::call::{CallError, Client, printable};

const RPC: &str = "StreamState";

/// The state of a save, about to be taken.
#[derive(Debug)]
pub struct TakeState {
    /// What is taken.
    pub manifest: Manifest,
    /// What may be sent.
    pub limits: StreamLimits,
    /// The half that takes it.
    pub taker: Taker,
}

impl TakeState {
    /// Opens the stream of a save.
    pub async fn open(client: &Client, operation: &OperationName) -> Result<Self, OpenStreamError> {
        let (opened, link) = open(client, operation, StreamRole::Taker).await?;
        let (manifest, limits) = (opened.manifest, opened.limits);
        let terms = Terms { stream: opened.stream_id, devices: manifest.devices.len(), limits };
        Ok(Self { manifest, limits, taker: Taker::new(link, terms) })
    }
}

/// The state of a restore, about to be given.
#[derive(Debug)]
pub struct GiveState {
    /// What the agent expects.
    pub manifest: Manifest,
    /// What may be sent.
    pub limits: StreamLimits,
    /// The half that gives it.
    pub giver: Giver,
}

impl GiveState {
    /// Opens the stream of a restore.
    pub async fn open(client: &Client, operation: &OperationName) -> Result<Self, OpenStreamError> {
        let (opened, link) = open(client, operation, StreamRole::Giver).await?;
        let (manifest, limits) = (opened.manifest, opened.limits);
        let terms = Terms { stream: opened.stream_id, devices: manifest.devices.len(), limits };
        Ok(Self { manifest, limits, giver: Giver::new(link, terms) })
    }
}

async fn open(
    client: &Client,
    operation: &OperationName,
    role: StreamRole,
) -> Result<(StreamOpened, Link), OpenStreamError> {
    let limit = client.options().deadline;
    timeout(limit, exchange(client, operation, role)).await.unwrap_or(Err(OpenStreamError::Timeout(limit)))
}

async fn exchange(
    client: &Client,
    operation: &OperationName,
    role: StreamRole,
) -> Result<(StreamOpened, Link), OpenStreamError> {
    let versions = VersionRange::OURS;
    let open =
        StreamOpen { operation: operation.clone(), role, versions, max_chunk_bytes: Some(MAX_CHUNK_BYTES) };
    let (outgoing, queue) = Link::outgoing_channel();
    if outgoing.send(StreamMessage { kind: Some(Kind::Open(open.into())) }).await.is_err() {
        return Err(OpenStreamError::Ended);
    }
    let requests = ReceiverStream::new(queue).map(|message| StreamStateRequest { message: Some(message) });
    let mut service = CheckpointServiceClient::new(client.channel())
        // Opened carries a manifest and is longer than a chunk only in theory.
        .max_decoding_message_size(MAX_MESSAGE_BYTES.max(MAX_MANIFEST_BYTES))
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let failed = |status: &tonic::Status| OpenStreamError::Call(client.failed(RPC, status));
    let response = service.stream_state(client.request(requests)).await.map_err(|status| failed(&status))?;
    let mut responses = response.into_inner();
    let first = responses.message().await.map_err(|status| failed(&status))?.ok_or(OpenStreamError::Ended)?;
    let opened = match first.message.and_then(|message| message.kind) {
        Some(Kind::Opened(opened)) => StreamOpened::try_from(opened)?,
        Some(Kind::Abort(abort)) => return Err(OpenStreamError::GivenUp(printable(&abort.reason))),
        Some(Kind::Open(_) | Kind::Frame(_) | Kind::Ack(_) | Kind::Cutover(_)) | None => {
            return Err(OpenStreamError::NotOpened);
        }
    };
    if !versions.contains(opened.version) {
        return Err(OpenStreamError::Version { theirs: opened.version, ours: versions });
    }
    let client = client.clone();
    let incoming = responses.map(move |response| match response {
        Ok(StreamStateResponse { message: Some(message) }) => Ok(message),
        Ok(StreamStateResponse { message: None }) => Err(LinkError::ended("the agent sent an empty message")),
        Err(status) => {
            let error = client.failed(RPC, &status);
            Err(LinkError::failed(error.to_string(), error))
        }
    });
    Ok((opened, Link::new(incoming, outgoing)))
}

/// Why a stream is not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenStreamError {
    /// The agent refused it, or is not there.
    #[error("{0}")]
    Call(#[source] CallError),
    /// The agent gave it up at once.
    #[error("the agent gave the stream up: {0}")]
    GivenUp(String),
    /// The agent ended it without a word.
    #[error("the agent ended the stream before it was open; see its log")]
    Ended,
    /// The agent's first message is not Opened.
    #[error(
        "the agent did not answer Open with Opened; see that agent and client are of versions that go together"
    )]
    NotOpened,
    /// What the agent said cannot be.
    #[error("the agent's answer to Open cannot be used: {0}")]
    Invalid(#[from] Invalid),
    /// The agent chose a version that was not offered.
    #[error("the agent chose version {} of the stream, but this client speaks {} to {}; use versions that go together",
        theirs.0, ours.min().0, ours.max().0)]
    Version {
        /// What it chose.
        theirs: Version,
        /// What was offered.
        ours: VersionRange,
    },
    /// The agent did not answer in time.
    #[error("the stream was not open after {} ms; see that the agent is well, or allow more time", .0.as_millis())]
    Timeout(Duration),
}
