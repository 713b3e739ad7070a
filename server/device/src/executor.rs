//! The seam behind which everything lives that is not deterministic: device work, clock, pauses, randomness.
//!
//! ```text
//!   caller ----job----> Lane (one a device) ----call----> device
//! ```
//!
//! In production ([`Threads`]) a lane is a dedicated thread, so that a device call that blocks never holds up
//! anything else, and time is the machine's. Under test ([`Inline`]) a job runs where it is submitted, a pause
//! moves a virtual clock, and randomness comes from a seed: the same seed gives the same run.
//!
//! Who waits does so in one of two ways: a lane [pauses](Executor::pause), a future [sleeps](Executor::sleep). A sleep
//! needs no async runtime; any runtime may poll it.
//!
//! # Failure paths
//! A lane's thread may be inside a kernel call that never returns; nothing can end it. Whoever waits for a job
//! bounds the wait and takes the device out of service ([`DeviceLane`](crate::DeviceLane)); the thread, and the fds
//! that its call uses, go when the call returns or the process ends.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

/// A source of monotonic time, as the time since some fixed moment.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Time since the clock's own zero. Never goes back.
    fn now(&self) -> Duration;
}

/// Work for a lane.
pub type Job = Box<dyn FnOnce() + Send>;

/// Where device work runs, what time it is, and how long to wait.
pub trait Executor: Clock {
    /// A new lane. `name` shows up as the thread's name.
    fn lane(&self, name: &str) -> io::Result<Box<dyn Lane>>;

    /// Waits. Called from lanes and from synchronous callers only, never from an async task.
    fn pause(&self, duration: Duration);

    /// Waits without holding up the thread. Counts from the first poll.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Random bits.
    fn random(&self) -> u64;
}

/// Runs jobs one after another, in the order they came, never two at once.
pub trait Lane: fmt::Debug + Send + Sync {
    /// Hands over a job and returns. Jobs given after one that never returns never run.
    fn submit(&self, job: Job);
}

/// The production executor: a thread a lane, the machine's clock, randomness from the system.
#[derive(Debug, Clone)]
pub struct Threads {
    zero: Instant,
}

impl Threads {
    /// An executor whose clock starts now.
    pub fn new() -> Self {
        Self { zero: Instant::now() }
    }
}

impl Default for Threads {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for Threads {
    fn now(&self) -> Duration {
        self.zero.elapsed()
    }
}

impl Executor for Threads {
    fn lane(&self, name: &str) -> io::Result<Box<dyn Lane>> {
        let (jobs, queue) = mpsc::channel::<Job>();
        // Not joined: a thread inside a call that never returns could not be. It ends when the lane is dropped and
        // the queue is empty.
        let _detached = thread::Builder::new().name(thread_name(name)).spawn(move || {
            for job in queue {
                job();
            }
        })?;
        Ok(Box::new(ThreadLane { jobs }))
    }

    fn pause(&self, duration: Duration) {
        thread::sleep(duration);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(async move { futures_timer::Delay::new(duration).await })
    }

    fn random(&self) -> u64 {
        use std::hash::{BuildHasher, Hasher, RandomState};
        // A fresh RandomState is keyed by the system's randomness; hashing nothing brings out the key.
        RandomState::new().build_hasher().finish()
    }
}

/// Linux keeps 15 bytes of a thread's name; the end of a device's name tells more than its start.
fn thread_name(name: &str) -> String {
    let skip = name.chars().count().saturating_sub(15);
    name.chars().skip(skip).filter(|c| *c != '\0').collect()
}

#[derive(Debug)]
struct ThreadLane {
    jobs: mpsc::Sender<Job>,
}

impl Lane for ThreadLane {
    fn submit(&self, job: Job) {
        // The queue closes only when the thread has ended, which a job's panic can do. The job is dropped then, and
        // whoever waits for its result sees that no result can come.
        let _ = self.jobs.send(job);
    }
}

/// The deterministic executor: jobs run where they are submitted, pauses move a virtual clock.
///
/// A device call that hangs is simulated by moving the clock past the limit while the job runs.
#[derive(Debug, Clone)]
pub struct Inline {
    time: Arc<VirtualTime>,
    random: Arc<AtomicU64>,
}

/// The virtual clock of [`Inline`].
#[derive(Debug, Default)]
pub struct VirtualTime {
    now: Mutex<Duration>,
}

impl VirtualTime {
    /// Moves the clock on.
    pub fn advance(&self, by: Duration) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        *now = now.saturating_add(by);
    }
}

impl Clock for VirtualTime {
    fn now(&self) -> Duration {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inline {
    /// An executor whose clock stands at zero and whose randomness follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { time: Arc::default(), random: Arc::new(AtomicU64::new(seed)) }
    }

    /// The clock, for a simulated device to tell time by or a test to move.
    pub fn time(&self) -> Arc<VirtualTime> {
        Arc::clone(&self.time)
    }
}

impl Clock for Inline {
    fn now(&self) -> Duration {
        self.time.now()
    }
}

impl Executor for Inline {
    fn lane(&self, _name: &str) -> io::Result<Box<dyn Lane>> {
        Ok(Box::new(InlineLane))
    }

    fn pause(&self, duration: Duration) {
        self.time.advance(duration);
    }

    /// Moves the clock when it is first polled, and is over then: whoever waits for something else too must ask for
    /// that first.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let time = self.time();
        Box::pin(async move { time.advance(duration) })
    }

    fn random(&self) -> u64 {
        // SplitMix64: a counter and a finaliser, so one atomic is all the state.
        const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
        let counter = self.random.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        let mixed = (counter ^ (counter >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

#[derive(Debug)]
struct InlineLane;

impl Lane for InlineLane {
    fn submit(&self, job: Job) {
        job();
    }
}
