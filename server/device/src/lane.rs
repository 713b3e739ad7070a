//! A driver on its device's own lane: what a call that never returns costs is that device and nothing else.
//!
//! ```text
//!   DeviceLane::start ---- job ----> lane: lock Driver, run, answer
//!        |                                          |
//!   Pending::wait <---------------- result ---------/
//!        | limit passes
//!        v
//!   Hung: every later call is refused at once; the thread, the driver and its fds stay with the call
//! ```
//!
//! Work is started and waited for apart, so a caller overlaps the device's next read with its own use of the last:
//! start the next batch, send the one before, wait.
//!
//! # Invariants
//! - All calls on a device run on its lane, one at a time.
//! - Once a lane has hung nothing is ever called on it again, also when the call returns after all: the driver that
//!   is in it is not looked at, because nobody knows what the call did.

use std::fmt;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;

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
    driver: Arc<Mutex<Driver>>,
    limit: Duration,
    hung: Arc<OnceLock<Hung>>,
}

/// The device's lane is inside a call that did not return in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{call} did not return within {after:?}; the device is out of service until this process is restarted"
)]
pub struct Hung {
    /// What was being done.
    pub call: Call,
    /// How long it was waited for.
    pub after: Duration,
}

impl From<Hung> for DeviceError {
    fn from(hung: Hung) -> Self {
        Self::Hung { call: hung.call, after: hung.after }
    }
}

impl DeviceLane {
    /// Puts a driver on a lane of its own. `limit` bounds each call; see [`DEFAULT_CALL_LIMIT`].
    pub fn new(driver: Driver, executor: Arc<dyn Executor>, limit: Duration) -> io::Result<Self> {
        let identity = driver.identity().clone();
        let lane = executor.lane(&identity.name)?;
        let driver = Arc::new(Mutex::new(driver));
        Ok(Self {
            identity,
            shared: Arc::new(Shared { executor, lane, driver, limit, hung: Arc::default() }),
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

    /// Starts `work` on the device's lane. `call` names what it does, should it hang.
    pub fn start<T, F>(&self, call: Call, work: F) -> Pending<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Driver) -> T + Send + 'static,
    {
        let (answer, answered) = mpsc::sync_channel(1);
        if self.hung().is_none() {
            let driver = Arc::clone(&self.shared.driver);
            let executor = Arc::clone(&self.shared.executor);
            let hung = Arc::clone(&self.shared.hung);
            self.shared.lane.submit(Box::new(move || {
                if hung.get().is_some() {
                    // It waited behind a call that was given up and came back after all.
                    return;
                }
                let begun = executor.now();
                let value = work(&mut driver.lock().unwrap_or_else(PoisonError::into_inner));
                let took = executor.now().saturating_sub(begun);
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

    fn give_up(&self, call: Call) -> Hung {
        let hung = *self.shared.hung.get_or_init(|| Hung { call, after: self.shared.limit });
        tracing::error!(device = %self.identity, %hung, "device given up");
        hung
    }
}

/// Work under way on a lane.
#[must_use = "the result, and whether the device hangs, shows only when it is waited for"]
pub struct Pending<T> {
    lane: DeviceLane,
    call: Call,
    answered: Receiver<(T, Duration)>,
}

impl<T> Pending<T> {
    /// Waits for the result, at most the lane's limit. Then the device is given up for good.
    pub fn wait(self) -> Result<T, Hung> {
        if let Some(hung) = self.lane.hung() {
            return Err(hung);
        }
        let limit = self.lane.shared.limit;
        match self.answered.recv_timeout(limit) {
            Ok((value, took)) if took <= limit => Ok(value),
            // It came back, but later than a caller that had waited all the time would have allowed: when somebody
            // begins to wait must not decide. Or it did not come back; or, disconnected, it ended without a result,
            // which only a panic can do, and what that left behind is as unknown as what a hung call does.
            Ok(_) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(self.lane.give_up(self.call))
            }
        }
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
