//! The executor of a simulated host: lanes are tasks of its own, time is the simulation's, randomness comes from the seed.
//!
//! ```text
//!   agent --job--> lane (a task): wait a little, by the seed --> gate: may it still be done? --> done
//!                                                                  '- no: the host is as good as dead, never
//! ```
//! A host dies between two pieces of work, never inside of one: from the piece after which it dies none is done any more,
//! and the world ends the host before time goes on.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use vfio_checkpoint_device::executor::Job;
use vfio_checkpoint_device::{Clock, Executor, Lane};
use vfio_checkpoint_server::environment::{UnixMillis, WallClock};

use crate::dice::Dice;
use crate::log::SimClock;

/// 2026-01-01, when every simulation begins.
pub(crate) const EPOCH_SECONDS: u64 = 1_767_225_600;

/// Which piece of work is a host's last.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    done: AtomicU64,
    last: Mutex<Option<u64>>,
    shut: AtomicBool,
}

impl Gate {
    /// So many more pieces of work are done, and then none.
    pub(crate) fn shut_after(&self, pieces: u64) {
        *self.last.lock().unwrap() = Some(self.done.load(Ordering::Relaxed) + pieces);
        if pieces == 0 {
            self.shut.store(true, Ordering::Relaxed);
        }
    }

    /// Nothing is done any more.
    pub(crate) fn shut(&self) {
        self.shut.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Relaxed)
    }

    /// A new life begins.
    pub(crate) fn open(&self) {
        *self.last.lock().unwrap() = None;
        self.shut.store(false, Ordering::Relaxed);
    }

    /// Does the work, or gives it back.
    fn pass(&self, work: Job) -> Option<Job> {
        if self.is_shut() {
            return Some(work);
        }
        work();
        let done = 1 + self.done.fetch_add(1, Ordering::Relaxed);
        if self.last.lock().unwrap().is_some_and(|last| done >= last) {
            self.shut();
        }
        None
    }
}

/// One life of a host.
#[derive(Clone)]
pub(crate) struct SimExecutor {
    pub(crate) clock: SimClock,
    pub(crate) gate: Arc<Gate>,
    /// What the agent draws.
    pub(crate) dice: Arc<Dice>,
    /// How long work takes.
    pub(crate) delays: Arc<Dice>,
    /// The longest that a piece of work waits before it is done, in ms.
    pub(crate) slowest_ms: u64,
}

impl fmt::Debug for SimExecutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimExecutor")
    }
}

impl Clock for SimExecutor {
    fn now(&self) -> Duration {
        self.clock.now()
    }
}

impl WallClock for SimExecutor {
    fn unix_now(&self) -> UnixMillis {
        UnixMillis(EPOCH_SECONDS * 1000).after(self.clock.now())
    }
}

impl Executor for SimExecutor {
    fn lane(&self, name: &str) -> io::Result<Box<dyn Lane>> {
        let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(job) = queue.recv().await {
                // Most work is done at once: what is slow is slow for somebody to come in between.
                if this.slowest_ms > 0 && this.delays.once_in(4) {
                    tokio::time::sleep(this.delays.between(1, this.slowest_ms + 1)).await;
                }
                if let Some(_undone) = this.gate.pass(job) {
                    // It is kept: whoever waits for it must not find that it was dropped, and go on.
                    std::future::pending::<()>().await;
                }
            }
        });
        Ok(Box::new(TaskLane { name: name.to_owned(), jobs }))
    }

    fn pause(&self, _duration: Duration) {
        panic!("a pause would stop the whole simulation: an agent waits by sleeping");
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move { tokio::time::sleep(duration).await })
    }

    fn random(&self) -> u64 {
        self.dice.draw()
    }
}

struct TaskLane {
    name: String,
    jobs: mpsc::UnboundedSender<Job>,
}

impl fmt::Debug for TaskLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskLane").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Lane for TaskLane {
    fn submit(&self, job: Job) {
        // Where the host has died there is nobody left to do it.
        let _ = self.jobs.send(job);
    }
}
