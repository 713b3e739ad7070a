//! What is not deterministic, in one value: device work, clocks, randomness, the network, the journal's disk, devices.
//!
//! ```text
//!   executor  lanes, now, sleep, random      network   listen, connect        hardware  open, adopt, holder
//!   wall      what time it is                disk      the journal's file
//! ```
//! Everything in the agent that asks for the time, waits, draws a number, blocks, or has to do with anything outside of it
//! does it through an [`Environment`], so that a simulation can stand in for all of it. The monotonic clock measures and waits; the wall clock is for what
//! outlives the process (deadlines in the journal) and for people.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use vfio_checkpoint_client::call::Jitter;
use vfio_checkpoint_client::network::{Network, Tcp};
use vfio_checkpoint_device::{Clock, Executor, Threads};

use crate::journal::{Disk, Files};
use crate::registry::hardware::{Hardware, Node};

/// Milliseconds since 1970, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This moment moved on.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long from `now` until this moment; zero where it has passed.
    pub fn remaining(self, now: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(now.0))
    }

    /// As the standard library has it.
    pub fn system_time(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.0)
    }

    /// As the wire says it.
    pub fn timestamp(self) -> prost_types::Timestamp {
        let seconds = i64::try_from(self.0 / 1000).unwrap_or(i64::MAX);
        let nanos = i32::try_from(self.0 % 1000 * 1_000_000).unwrap_or(0);
        prost_types::Timestamp { seconds, nanos }
    }
}

/// A source of wall-clock time.
pub trait WallClock: fmt::Debug + Send + Sync {
    /// What time it is.
    fn unix_now(&self) -> UnixMillis;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl WallClock for SystemClock {
    fn unix_now(&self) -> UnixMillis {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// What is not deterministic.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Device work, monotonic time, pauses, randomness.
    pub executor: Arc<dyn Executor>,
    /// What time it is.
    pub wall: Arc<dyn WallClock>,
    /// What listens, and what leads to other agents.
    pub network: Arc<dyn Network>,
    /// Where the journal lies.
    pub disk: Arc<dyn Disk>,
    /// Where devices and their holder are.
    pub hardware: Arc<dyn Hardware>,
}

/// An executor's clock alone.
#[derive(Debug)]
pub struct ExecutorClock(pub Arc<dyn Executor>);

impl Clock for ExecutorClock {
    fn now(&self) -> Duration {
        self.0.now()
    }
}

impl Environment {
    /// Threads, and the machine's own clocks, network, disk and devices.
    pub fn production() -> Self {
        Self {
            executor: Arc::new(Threads::new()),
            wall: Arc::new(SystemClock),
            network: Arc::new(Tcp),
            disk: Arc::new(Files),
            hardware: Arc::new(Node),
        }
    }

    /// What time it is.
    pub fn unix_now(&self) -> UnixMillis {
        self.wall.unix_now()
    }

    /// Runs what may block on a lane of its own, and waits for it.
    ///
    /// Where the future is dropped the work goes on.
    pub async fn blocking<T, F>(&self, name: &str, work: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let lane = self.executor.lane(name)?;
        let (answer, answered) = oneshot::channel();
        lane.submit(Box::new(move || {
            // Nobody waits where the future was dropped.
            let _ = answer.send(work());
        }));
        answered.await.map_err(|_| io::Error::other("the work died, which is a defect to report"))
    }

    /// What spreads this agent's calls to other agents, for the options of a client.
    pub fn jitter(&self) -> Jitter {
        let executor = Arc::clone(&self.executor);
        // The upper half is as random as the whole.
        Jitter::from_fn(move || u32::try_from(executor.random() >> 32).unwrap_or_default())
    }

    /// Waits.
    pub async fn sleep(&self, duration: Duration) {
        self.executor.sleep(duration).await;
    }
}
