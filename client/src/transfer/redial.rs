//! How a giver whose connection broke gets another one.
//!
//! ```text
//!   broken --> redial at once --> Opened: the stream goes on
//!                |    ^
//!                v    '-- a pause, twice as long each time: connection trouble, within the window
//!              refused, or the window is over: the stream is lost
//! ```
//! Invariants: only what [`OpenStreamError::may_pass`] says may pass is tried again. One try takes no more than a part of
//! the window, so that a connection that is stuck is not all that is tried. A stream that is open again and breaks before its
//! taker has acknowledged anything new is in the same window still, and the pauses go on: a taker could otherwise keep devices
//! standing still for as long as it likes, and this side dialing without a pause. What lasts for a window with no ack due is
//! well: see `line`.
//!
//! Failure paths: [`Unresumed`].

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use vfio_checkpoint_proto::domain::StreamRole;
use vfio_checkpoint_proto::ids::{OperationName, StreamId};
use vfio_checkpoint_proto::version::VersionRange;

use super::error::Unresumed;
use super::open::{DialOptions, Dialed, OpenStreamError, dial_with};
use crate::call::Client;

/// What [`Redial::redial`] returns.
pub type Redialing<'a> = Pin<Box<dyn Future<Output = Result<Dialed, OpenStreamError>> + Send + 'a>>;

/// Opens a stream again whose connection broke.
pub trait Redial: Send {
    /// Opens `stream` once more, as its giver. It is called again where it fails for what may pass.
    fn redial(&mut self, stream: StreamId) -> Redialing<'_>;
}

/// Opens the stream of an operation again over the same [`Client`], which connects anew where it has to.
#[derive(Debug)]
pub struct RedialOperation {
    client: Client,
    operation: OperationName,
    versions: VersionRange,
}

impl RedialOperation {
    /// The stream of `operation`, for a caller that speaks these versions.
    pub fn new(client: Client, operation: OperationName, versions: VersionRange) -> Self {
        Self { client, operation, versions }
    }
}

impl Redial for RedialOperation {
    fn redial(&mut self, stream: StreamId) -> Redialing<'_> {
        let options = DialOptions { versions: self.versions, resume: Some(stream) };
        Box::pin(dial_with(&self.client, &self.operation, StreamRole::Giver, options))
    }
}

/// The first pause between two tries, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// A try takes at most this part of the window, and may take this long in any case.
const TRIES: u32 = 4;
const SHORTEST_TRY: Duration = Duration::from_secs(1);

/// Whoever dials, and for how long it does.
pub(super) struct Redialer {
    redial: Box<dyn Redial>,
    window: Duration,
    stall: Option<Stall>,
}

/// It broke, and nothing new was acknowledged since.
struct Stall {
    end: Instant,
    /// Before the next try.
    pause: Duration,
}

/// Tries that are under way. They end where this is dropped.
pub(super) struct Tries(JoinSet<(Redialer, Result<Dialed, Unresumed>)>);

impl Redialer {
    pub(super) fn new(redial: Box<dyn Redial>, window: Duration) -> Self {
        Self { redial, window, stall: None }
    }

    /// How long it is tried.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// The stream gets on. Where it breaks after this there is a whole window again.
    pub(super) fn gets_on(&mut self) {
        self.stall = None;
    }

    /// Begins to dial, in a task of its own: whoever gives may have other things to do.
    pub(super) fn begin(mut self, stream: StreamId) -> Tries {
        let mut tries = JoinSet::new();
        tries.spawn(async move {
            let dialed = self.dial(stream).await;
            (self, dialed)
        });
        Tries(tries)
    }

    async fn dial(&mut self, stream: StreamId) -> Result<Dialed, Unresumed> {
        let (window, is_first) = (self.window, self.stall.is_none());
        let begun = Instant::now();
        let Stall { end, pause } = self.stall.get_or_insert(Stall { end: begun + window, pause: PAUSES.0 });
        let limit = (window / TRIES).max(SHORTEST_TRY);
        if !is_first {
            // It was open, and that was no use: not at once again.
            rest(pause, *end, stream).await.map_err(|_late| Unresumed::NoProgress(window))?;
        }
        loop {
            let error = match timeout_at((Instant::now() + limit).min(*end), self.redial.redial(stream)).await
            {
                Ok(Ok(dialed)) => return Ok(dialed),
                Ok(Err(error)) if !error.may_pass() => return Err(Unresumed::Refused(error)),
                Ok(Err(error)) => error,
                Err(_) => OpenStreamError::Timeout(limit),
            };
            tracing::debug!(%stream, error = %error, "the stream is not resumed yet");
            rest(pause, *end, stream).await.map_err(|_late| Unresumed::Window { window, last: error })?;
        }
    }
}

/// The window is over before the next try would begin.
struct Late;

/// Waits before the next try, and longer before the one after it.
async fn rest(pause: &mut Duration, end: Instant, stream: StreamId) -> Result<(), Late> {
    let next = Instant::now() + spread(*pause, stream);
    *pause = (*pause * 2).min(PAUSES.1);
    if next >= end {
        return Err(Late);
    }
    sleep(next - Instant::now()).await;
    Ok(())
}

/// Half of it to all of it, by the stream: streams that broke together do not come back together, and the same stream
/// does the same each time.
fn spread(pause: Duration, stream: StreamId) -> Duration {
    let part = u32::from(stream.0.to_le_bytes()[0]);
    pause / 2 + pause / 2 * part / u32::from(u8::MAX)
}

impl Tries {
    /// Waits until the stream is open again, or lost. Cancel-safe.
    pub(super) async fn over(&mut self) -> Result<(Redialer, Dialed), Unresumed> {
        match self.0.join_next().await {
            Some(Ok((redialer, dialed))) => Ok((redialer, dialed?)),
            Some(Err(_)) | None => Err(Unresumed::Died),
        }
    }
}
