//! Opens the stream of an operation over a [`Client`], and hands out the half that the caller is.
//!
//! ```text
//!   StreamState -> Open{operation, role, versions} -> Opened{version, stream_id, manifest, limits} -> Taker | Giver
//! ```
//!
//! Invariants: what the agent answers is validated before anything of it is used. Failure paths: [`OpenStreamError`];
//! nothing of the operation has been touched then, and it waits for its stream until its deadline.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::{Code, Status};
use tower::ServiceExt as _;
use vfio_checkpoint_proto::MAX_CHUNK_BYTES;
use vfio_checkpoint_proto::domain::{Invalid, Manifest, StreamLimits, StreamOpen, StreamOpened, StreamRole};
use vfio_checkpoint_proto::ids::{OperationName, StreamId};
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::version::{Version, VersionRange};

use super::body::{Incoming, Outgoing};
use super::give::Giver;
use super::link::{Link, LinkError, Terms};
use super::take::Taker;
use crate::call::{CallError, Client, printable};

const RPC: &str = "StreamState";
const PATH: &str = "/vfio.checkpoint.v1.CheckpointService/StreamState";

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
        let Dialed { opened, link } = dial(client, operation, StreamRole::Taker).await?;
        let terms = Terms::of(&opened);
        Ok(Self { manifest: opened.manifest, limits: opened.limits, taker: Taker::new(link, terms) })
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
        Ok(Self::of(dial(client, operation, StreamRole::Giver).await?))
    }

    /// The giver of a stream that is open.
    pub fn of(dialed: Dialed) -> Self {
        let Dialed { opened, link } = dialed;
        let terms = Terms::of(&opened);
        Self { manifest: opened.manifest, limits: opened.limits, giver: Giver::new(link, terms) }
    }
}

/// An open stream, before anybody is a half of it.
#[derive(Debug)]
pub struct Dialed {
    /// What the agent answered.
    pub opened: StreamOpened,
    /// Its two directions.
    pub link: Link,
}

/// How a stream is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DialOptions {
    /// What the caller speaks.
    pub versions: VersionRange,
    /// The stream that a giver resumes. None for a new one.
    pub resume: Option<StreamId>,
}

impl Default for DialOptions {
    /// A new stream, of any version that this library speaks.
    fn default() -> Self {
        Self { versions: VersionRange::OURS, resume: None }
    }
}

/// Opens the stream of an operation, for whoever has a half of its own for it, as an agent has.
pub async fn dial(
    client: &Client,
    operation: &OperationName,
    role: StreamRole,
) -> Result<Dialed, OpenStreamError> {
    dial_with(client, operation, role, DialOptions::default()).await
}

/// The same, with more to say.
pub async fn dial_with(
    client: &Client,
    operation: &OperationName,
    role: StreamRole,
    options: DialOptions,
) -> Result<Dialed, OpenStreamError> {
    let DialOptions { versions, resume } = options;
    let open = StreamOpen {
        operation: operation.clone(),
        role,
        versions,
        max_chunk_bytes: Some(MAX_CHUNK_BYTES),
        resume,
    };
    let limit = client.options().deadline;
    timeout(limit, exchange(client, open)).await.unwrap_or(Err(OpenStreamError::Timeout(limit)))
}

async fn exchange(client: &Client, open: StreamOpen) -> Result<Dialed, OpenStreamError> {
    let versions = open.versions;
    let (outgoing, queue) = Link::outgoing_channel();
    if outgoing.send(StreamMessage { kind: Some(Kind::Open(open.clone().into())) }).await.is_err() {
        return Err(OpenStreamError::Ended);
    }
    let failed = |status: &Status| OpenStreamError::Call(client.failed(RPC, status));
    let mut messages = call(client, queue).await.map_err(|status| failed(&status))?;
    let first = messages.next().await.ok_or(OpenStreamError::Ended)?.map_err(|status| failed(&status))?;
    let opened = match first.kind {
        Some(Kind::Opened(opened)) => StreamOpened::try_from(opened)?,
        Some(Kind::Abort(abort)) => return Err(OpenStreamError::GivenUp(printable(&abort.reason))),
        Some(Kind::Open(_) | Kind::Frame(_) | Kind::Ack(_) | Kind::Cutover(_)) | None => {
            return Err(OpenStreamError::NotOpened);
        }
    };
    if !versions.contains(opened.version) {
        return Err(OpenStreamError::Version { theirs: opened.version, ours: versions });
    }
    opened.answers(&open)?;
    let client = client.clone();
    let incoming = messages.map(move |message| {
        message.map_err(|status| {
            let error = client.failed(RPC, &status);
            LinkError::failed(error.to_string(), error)
        })
    });
    Ok(Dialed { opened, link: Link::new(incoming, outgoing) })
}

/// Makes the call, with the messages of `queue` as its request, and returns once the agent has begun to answer.
async fn call(client: &Client, queue: mpsc::Receiver<StreamMessage>) -> Result<Incoming, Status> {
    let request = client.request(()).into_parts();
    let (metadata, extensions, ()) = request;
    let mut request = http::Request::new(Outgoing::request(queue));
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = http::Uri::from_static(PATH);
    *request.headers_mut() = metadata.into_headers();
    *request.extensions_mut() = extensions;
    request.headers_mut().insert(http::header::TE, http::HeaderValue::from_static("trailers"));
    request
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    let response = client.channel().oneshot(request).await;
    Incoming::response(response.map_err(|error| Status::from_error(error.into()))?)
}

impl OpenStreamError {
    /// Whether it is a trouble of the connection, which may pass. What the agent decided, and said, stands.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Call(CallError::NotConnected { .. } | CallError::Deadline { .. })
            | Self::Ended
            | Self::Timeout(_) => true,
            Self::Call(CallError::Refused(refusal)) => match refusal.code {
                Code::Unavailable => true,
                // Without a reason it was not the agent that said so: a connection that broke has many codes.
                Code::Unknown
                | Code::Internal
                | Code::Cancelled
                | Code::DeadlineExceeded
                | Code::ResourceExhausted
                | Code::Aborted => refusal.reason.is_none(),
                Code::Ok
                | Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::OutOfRange
                | Code::Unimplemented
                | Code::DataLoss
                | Code::Unauthenticated => false,
            },
            Self::Call(CallError::BadAnswer { .. })
            | Self::GivenUp(_)
            | Self::NotOpened
            | Self::Invalid(_)
            | Self::Version { .. } => false,
        }
    }
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
