//! A driver on its device's own lane: what a call that never returns costs is that device and nothing else.
//!
//! ```text
//!   DeviceLane::start ---- job ----> lane: lock Driver, run, answer
//!        |                                          |
//!   Pending::finished <------------ result ---------/
//!        | limit passes
//!        v
//!   Hung: every later call is refused at once; the thread, the driver and its fds stay with the call
//!
//!   the last clone is dropped ---- last job ----> lane: drop Driver, which closes the device --> Closing
//! ```
//!
//! Work is started and waited for apart, so a caller overlaps the device's next read with its own use of the last:
//! start the next batch, send the one before, wait. Waiting is a future, for whatever polls it; [`Pending::wait`] is the
//! same for a thread of its own. Whoever stops waiting loses the result and nothing else: the lane does the work all
//! the same, and what is asked next comes after it.
//!
//! # Invariants
//! - All calls on a device run on its lane, one at a time; so does its close, which can be a reset, and take as long.
//! - Once a lane has hung nothing is ever called on its device again, also when the call returns after all: a gate
//!   between the driver and the device is closed, because nobody knows what the call did, and everybody was told that
//!   the device is out of service.
//! - Only a call that is itself over its limit condemns a device, never a queue of calls before it.

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_channel::oneshot;
use futures_util::FutureExt as _;
use futures_util::future::{self, Either, select};

use crate::driver::{Driver, SaveRead, SaveSession};
use crate::{Call, ChunkPool, DeviceError, Executor, Identity, Lane, PrecopyInfo};

/// Chunks in one batch. With one batch being read and one being used, at most twice as many are out.
pub const BATCH_CHUNKS: usize = 2;

/// How long a device call may take before the device is given up.
///
/// Generous: drivers answer in milliseconds, a firmware command of an mlx5 function times out after 60 s by itself,
/// and a device given up too early is quarantined for nothing.
pub const DEFAULT_CALL_LIMIT: Duration = Duration::from_mins(2);

/// One device, its driver and its lane. Cheap to clone; clones share the device.
#[derive(Debug, Clone)]
pub struct DeviceLane {
    identity: Identity,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    executor: Arc<dyn Executor>,
    lane: Box<dyn Lane>,
    /// None once it is let go of, which its lane does.
    open: Arc<Mutex<Option<Open>>>,
    limit: Duration,
    hung: Arc<OnceLock<Hung>>,
    running: Arc<Mutex<Option<Running>>>,
    closing: Closing,
}

/// A driver between those who are told of its end. The fields end in this order.
#[derive(Debug)]
struct Open {
    _begun: oneshot::Sender<Infallible>,
    driver: Driver,
    _closed: oneshot::Sender<Infallible>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let open = Arc::clone(&self.open);
        // Where the lane is dead the device is closed here after all: there is nobody else.
        self.lane.submit(Box::new(move || {
            let _closed = lock(&open).take();
        }));
    }
}

/// The end of a lane's device, for whoever waits for it. It does not keep the device open.
#[derive(Debug, Clone)]
pub struct Closing {
    begun: Told,
    closed: Told,
}

/// Nothing is ever sent: the sender's end is what is told.
type Told = future::Shared<oneshot::Receiver<Infallible>>;

impl Closing {
    /// Ready once the lane has come to it: nobody has the device any more, and no call on it is under way.
    pub async fn begun(&self) {
        let _ = self.begun.clone().await;
    }

    /// Whether the lane has come to it.
    pub fn has_begun(&self) -> bool {
        self.begun.clone().now_or_never().is_some()
    }

    /// Ready once the device is closed. Never, where a call on it does not return.
    pub async fn closed(&self) {
        let _ = self.closed.clone().await;
    }
}

/// The work that the lane is at.
#[derive(Debug, Clone, Copy)]
struct Running {
    call: Call,
    since: Duration,
}

/// Why a device was given up. What the call that did it does, or did, to the device is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Hung {
    /// A call did not return in time.
    #[error(
        "{call} did not return within {after:?}; the device is out of service until this process is restarted"
    )]
    Overdue {
        /// What was being done.
        call: Call,
        /// How long it was waited for.
        after: Duration,
    },
    /// The work ended without a result: a defect in this program.
    #[error(
        "{call} died, which is a defect to report; the device is out of service until this process is restarted"
    )]
    Died {
        /// What was being done.
        call: Call,
    },
}

impl DeviceLane {
    /// Puts a driver on a lane of its own. `limit` bounds each call; see [`DEFAULT_CALL_LIMIT`].
    pub fn new(driver: Driver, executor: Arc<dyn Executor>, limit: Duration) -> io::Result<Self> {
        let identity = driver.identity().clone();
        let lane = executor.lane(&identity.name)?;
        let hung = Arc::default();
        let ((begun, is_begun), (closed, is_closed)) = (oneshot::channel(), oneshot::channel());
        let closing = Closing { begun: is_begun.shared(), closed: is_closed.shared() };
        let open = Open { _begun: begun, driver: driver.gate(&hung), _closed: closed };
        let (open, running) = (Arc::new(Mutex::new(Some(open))), Arc::default());
        Ok(Self {
            identity,
            shared: Arc::new(Shared { executor, lane, open, limit, hung, running, closing }),
        })
    }

    /// Which device this is. Never waits.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Where time and pauses come from.
    pub fn executor(&self) -> &Arc<dyn Executor> {
        &self.shared.executor
    }

    /// Whether the device was given up, and over which call.
    pub fn hung(&self) -> Option<Hung> {
        self.shared.hung.get().copied()
    }

    /// When its device is closed, which it is once nobody has it.
    pub fn closing(&self) -> Closing {
        self.shared.closing.clone()
    }

    /// Starts `work` on the device's lane. `call` names what it does, should it hang.
    pub fn start<T, F>(&self, call: Call, work: F) -> Pending<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Driver) -> T + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        if self.hung().is_none() {
            let open = Arc::clone(&self.shared.open);
            let executor = Arc::clone(&self.shared.executor);
            let hung = Arc::clone(&self.shared.hung);
            let running = Arc::clone(&self.shared.running);
            // What happens on the lane belongs to whoever asked for it.
            let span = tracing::Span::current();
            self.shared.lane.submit(Box::new(move || {
                if hung.get().is_some() {
                    // It waited behind a call that was given up and came back after all.
                    return;
                }
                let _entered = span.enter();
                let since = executor.now();
                *lock(&running) = Some(Running { call, since });
                let value = match &mut *lock(&open) {
                    Some(open) => work(&mut open.driver),
                    // It is let go of only after the last of those who ask.
                    None => return,
                };
                let took = executor.now().saturating_sub(since);
                *lock(&running) = None;
                // Nobody waits any more where the caller gave up.
                let _ = answer.send((value, took));
            }));
        }
        Pending { lane: self.clone(), call, answered }
    }

    /// Runs `work` on the device's lane and waits for its result.
    pub fn call<T, F>(&self, call: Call, work: F) -> Result<T, Hung>
    where
        T: Send + 'static,
        F: FnOnce(&mut Driver) -> T + Send + 'static,
    {
        self.start(call, work).wait()
    }

    /// Starts to read the next [`Batch`] of a session. The session comes back with it.
    pub fn start_batch(&self, session: SaveSession, pool: &ChunkPool) -> Pending<(SaveSession, Batch)> {
        let pool = pool.clone();
        self.start(Call::Read, move |_| {
            let mut session = session;
            let batch = Batch::read(&mut session, &pool);
            (session, batch)
        })
    }

    fn give_up(&self, hung: Hung) -> Hung {
        let hung = *self.shared.hung.get_or_init(|| hung);
        tracing::error!(device = %self.identity, %hung, "device given up");
        hung
    }

    /// How much longer the work that the lane is at may take; an error where its time is up. The limit counts from when
    /// the lane took the work up: what waits behind other work is not late.
    fn time_left(&self) -> Result<Duration, Hung> {
        let limit = self.shared.limit;
        let Some(Running { call, since }) = *lock(&self.shared.running) else {
            return Ok(limit);
        };
        let taken = self.shared.executor.now().saturating_sub(since);
        limit.checked_sub(taken).filter(|left| !left.is_zero()).ok_or(Hung::Overdue { call, after: limit })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Work under way on a lane.
#[must_use = "the result, and whether the device hangs, shows only when it is waited for"]
pub struct Pending<T> {
    lane: DeviceLane,
    call: Call,
    answered: oneshot::Receiver<(T, Duration)>,
}

impl<T> Pending<T> {
    /// The result. Where the lane is at one piece of work for longer than its limit, whichever that is, the device is
    /// given up for good.
    pub async fn finished(mut self) -> Result<T, Hung> {
        let call = self.call;
        let limit = self.lane.shared.limit;
        loop {
            if let Some(hung) = self.lane.hung() {
                return Err(hung);
            }
            let left = self.lane.time_left().map_err(|hung| self.lane.give_up(hung))?;
            let late = self.lane.executor().sleep(left);
            match select(&mut self.answered, late).await {
                Either::Left((Ok((value, took)), _)) if took <= limit => return Ok(value),
                // It came back, but later than a caller that had waited all the time would have allowed: when somebody
                // begins to wait must not decide.
                Either::Left((Ok(_), _)) => {
                    return Err(self.lane.give_up(Hung::Overdue { call, after: limit }));
                }
                // The work ended without a result, which only a panic in it can do.
                Either::Left((Err(oneshot::Canceled), _)) => {
                    return Err(self.lane.give_up(Hung::Died { call }));
                }
                Either::Right(((), _)) => {}
            }
        }
    }

    /// The same for a caller that has nothing else to do. Holds up its thread, so never in an async task.
    pub fn wait(self) -> Result<T, Hung> {
        pollster::block_on(self.finished())
    }
}

impl<T> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("device", &self.lane.identity)
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

/// Some chunks of a save, and what comes after them.
#[derive(Debug)]
pub struct Batch {
    /// The chunks in order; none where the device had nothing.
    pub chunks: Vec<Bytes>,
    /// What follows.
    pub then: Then,
}

/// What follows a batch.
#[derive(Debug)]
pub enum Then {
    /// More, as far as is known. With what is left to pre-copy, while pre-copying and where the device says.
    More(Option<PrecopyInfo>),
    /// Nothing for now; only while pre-copying.
    NothingNow(Option<PrecopyInfo>),
    /// The stream is at its end.
    End,
    /// Reading failed; the session is over.
    Failed(DeviceError),
}

impl Batch {
    fn read(session: &mut SaveSession, pool: &ChunkPool) -> Self {
        let mut chunks = Vec::with_capacity(BATCH_CHUNKS);
        while chunks.len() < BATCH_CHUNKS {
            match session.read(pool) {
                Ok(SaveRead::Chunk(chunk)) => chunks.push(chunk),
                Ok(SaveRead::End) => return Self { chunks, then: Then::End },
                Ok(SaveRead::NothingNow) => {
                    return Self {
                        chunks,
                        then: Self::left(session).map_or_else(Then::Failed, Then::NothingNow),
                    };
                }
                Err(error) => return Self { chunks, then: Then::Failed(error) },
            }
        }
        Self { chunks, then: Self::left(session).map_or_else(Then::Failed, Then::More) }
    }

    fn left(session: &mut SaveSession) -> Result<Option<PrecopyInfo>, DeviceError> {
        if session.is_precopying() { session.precopy_info() } else { Ok(None) }
    }
}
