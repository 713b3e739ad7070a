//! What a half of a stream stands on: messages in, messages out, and the terms of the handshake.
//!
//! ```text
//!   gRPC, or memory in a test
//!     stream of Result<StreamMessage, LinkError> --> Link --> mpsc::Sender<StreamMessage>, LINK_FRAMES long
//! ```
//!
//! Invariants: the queue of outgoing messages is short, so that flow control reaches whoever makes the state.
//! Failure paths: a connection that fails or ends is a [`LinkError`] with its cause; nothing is retried here.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::{Stream, StreamExt};
use vfio_checkpoint_proto::domain::{StreamLimits, StreamOpened};
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::stream::{Job, Session};
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_proto::version::Version;

use super::error::TransferError;

/// How many messages may wait to be sent. Two keep the sender busy while the next is made; more would only hide from
/// the giver that its taker is slow, at up to a chunk of memory each.
pub const LINK_FRAMES: usize = 2;

pub(super) type Incoming = Pin<Box<dyn Stream<Item = Result<StreamMessage, LinkError>> + Send>>;

/// The two directions of an open stream, after its handshake.
pub struct Link {
    pub(super) incoming: Incoming,
    pub(super) outgoing: mpsc::Sender<StreamMessage>,
}

impl Link {
    /// A link over an open stream. Make `outgoing` with [`Link::outgoing_channel`], so that it is bounded as it should.
    pub fn new(
        incoming: impl Stream<Item = Result<StreamMessage, LinkError>> + Send + 'static,
        outgoing: mpsc::Sender<StreamMessage>,
    ) -> Self {
        // A stream that has ended may be asked again while a half closes.
        Self { incoming: Box::pin(incoming.fuse()), outgoing }
    }

    /// A queue for outgoing messages, [`LINK_FRAMES`] long.
    pub fn outgoing_channel() -> (mpsc::Sender<StreamMessage>, mpsc::Receiver<StreamMessage>) {
        mpsc::channel(LINK_FRAMES)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("outgoing_room", &self.outgoing.capacity()).finish_non_exhaustive()
    }
}

/// A connection that failed or ended.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct LinkError {
    detail: String,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
    /// The other side ended it in good order: it has left, and does not come back.
    is_left: bool,
}

impl LinkError {
    /// A link that ended without a cause to show.
    pub fn ended(detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), source: None, is_left: false }
    }

    /// A link that failed because of `source`. The source can be got back with [`Error::source`] and a downcast.
    pub fn failed(detail: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self { detail: detail.into(), source: Some(Box::new(source)), is_left: false }
    }

    /// A link that the other side ended in good order, before it was done.
    pub(super) fn left(detail: impl Into<String>) -> Self {
        Self { is_left: true, ..Self::ended(detail) }
    }

    /// Whether the other side has left, and does not come back.
    pub(super) fn is_left(&self) -> bool {
        self.is_left
    }
}

/// What the handshake agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// What both sides speak.
    pub version: Version,
    /// Names the stream.
    pub stream: StreamId,
    /// How many devices the manifest has.
    pub devices: usize,
    /// What may be sent, and how long it may take.
    pub limits: StreamLimits,
}

impl Terms {
    /// Those of an answer to Open.
    pub fn of(opened: &StreamOpened) -> Self {
        Self {
            version: opened.version,
            stream: opened.stream_id,
            devices: opened.manifest.devices.len(),
            limits: opened.limits,
        }
    }

    pub(super) fn session(&self, job: Job) -> Session {
        Session { stream: self.stream, devices: self.devices, limits: self.limits, job }
    }
}

/// The times of a stream, by this side's clock.
#[derive(Debug)]
pub(super) struct Clock {
    end: Instant,
    lifetime: Duration,
    idle: Duration,
}

impl Clock {
    pub(super) fn start(limits: &StreamLimits) -> Self {
        let (lifetime, idle) = (limits.lifetime, limits.idle_timeout);
        Self { end: Instant::now() + lifetime, lifetime, idle }
    }

    /// Waits for the other side, but not for longer than `idle_timeout` nor beyond the stream's lifetime.
    pub(super) async fn wait<T>(&self, event: impl Future<Output = T>) -> Result<T, TransferError> {
        self.wait_until(self.idle_deadline(), event).await
    }

    /// When the other side has been silent for too long, from now on.
    pub(super) fn idle_deadline(&self) -> Instant {
        self.idle_after(Instant::now())
    }

    /// The same from another time on.
    pub(super) fn idle_after(&self, since: Instant) -> Instant {
        since + self.idle
    }

    /// The same, with a deadline that was taken before.
    pub(super) async fn wait_until<T>(
        &self,
        deadline: Instant,
        event: impl Future<Output = T>,
    ) -> Result<T, TransferError> {
        match timeout_at(self.end.min(deadline), event).await {
            Ok(value) => Ok(value),
            Err(_) if Instant::now() >= self.end => Err(TransferError::Lifetime(self.lifetime)),
            Err(_) => Err(TransferError::Idle(self.idle)),
        }
    }

    /// Waits for the other side where its silence is nothing unusual.
    pub(super) async fn wait_patiently<T>(&self, event: impl Future<Output = T>) -> Result<T, TransferError> {
        timeout_at(self.end, event).await.map_err(|_| TransferError::Lifetime(self.lifetime))
    }
}

/// How long the other side may take to hear that the stream is over.
const CLOSE_GRACE: Duration = Duration::from_secs(2);
/// Ends this direction and lets the other end by itself, as far as it does so soon. A gRPC stream that is dropped before
/// is reset, and what was sent last may be lost with it.
pub(super) async fn close(outgoing: Option<mpsc::Sender<StreamMessage>>, incoming: &mut Incoming) {
    drop(outgoing);
    let ended = async { while let Some(Ok(_)) = incoming.next().await {} };
    // Whoever does not end its direction in time is not waited for.
    let _late = timeout(CLOSE_GRACE, ended).await;
}

/// Tells the other side that the stream is given up, if it listens.
pub(super) async fn abort(
    outgoing: Option<mpsc::Sender<StreamMessage>>,
    incoming: &mut Incoming,
    abort: Option<StreamMessage>,
) {
    if let (Some(sender), Some(abort)) = (&outgoing, abort) {
        // A side that does not listen finds out when the stream ends.
        let _unheard = timeout(CLOSE_GRACE, sender.send(abort)).await;
    }
    close(outgoing, incoming).await;
}
