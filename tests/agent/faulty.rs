//! An executor that does not always do what it is for: work that is lost, as with a thread that died, and waits that are
//! over when the test says so.
//!
//! ```text
//!   agent --lane(name), sleep--> Faulty --what is not to fail--> Threads
//!                                  ^ break_lane, mend, gate, pass
//! ```
//! Faults are by number, not by time: so many pieces of work of a lane are done, and the next ones are lost.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use vfio_checkpoint_device::executor::Job;
use vfio_checkpoint_device::{Clock, Executor, Lane, Threads};
use vfio_checkpoint_server::environment::Environment;

use crate::lab::PATIENCE;

#[derive(Debug, Clone)]
pub(crate) struct Faulty {
    threads: Threads,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The lane whose work is lost, and how much of it is done before.
    broken: Mutex<Option<(String, u32)>>,
    /// How much was lost.
    lost: watch::Sender<u32>,
    /// Waits that end when the test says so, by how long they would take.
    gates: Mutex<BTreeMap<Duration, Arc<Gate>>>,
}

#[derive(Debug)]
struct Gate {
    passes: Semaphore,
    /// How many waits have come to it.
    waits: watch::Sender<u32>,
}

impl Faulty {
    pub(crate) fn new() -> Self {
        let shared =
            Shared { broken: Mutex::default(), lost: watch::Sender::new(0), gates: Mutex::default() };
        Self { threads: Threads::new(), shared: Arc::new(shared) }
    }

    pub(crate) fn environment(&self) -> Environment {
        Environment { executor: Arc::new(self.clone()), ..Environment::production() }
    }

    /// From now on lanes of this name do so many pieces of work, and lose what comes after.
    pub(crate) fn break_lane(&self, name: &str, after: u32) {
        *self.broken() = Some((name.to_owned(), after));
    }

    /// From now on nothing is lost.
    pub(crate) fn mend(&self) {
        *self.broken() = None;
    }

    /// Waits until so much was lost.
    pub(crate) async fn lost(&self, count: u32) {
        let mut lost = self.shared.lost.subscribe();
        let losing = lost.wait_for(|lost| *lost >= count);
        tokio::time::timeout(PATIENCE, losing).await.expect("nothing was lost").unwrap();
    }

    /// Waits of this length are over only where [`pass`](Self::pass) says so.
    pub(crate) fn gate(&self, length: Duration) {
        let gate = Gate { passes: Semaphore::new(0), waits: watch::Sender::new(0) };
        self.shared.gates.lock().unwrap().insert(length, Arc::new(gate));
    }

    /// Waits until so many waits of this length have begun, so that whoever waited before has done its work.
    pub(crate) async fn waits(&self, length: Duration, count: u32) {
        let mut waits = self.shared.gates.lock().unwrap()[&length].waits.subscribe();
        let waiting = waits.wait_for(|waits| *waits >= count);
        tokio::time::timeout(PATIENCE, waiting).await.expect("nobody waits").unwrap();
    }

    /// One wait of this length is over.
    pub(crate) fn pass(&self, length: Duration) {
        self.shared.gates.lock().unwrap()[&length].passes.add_permits(1);
    }

    fn broken(&self) -> MutexGuard<'_, Option<(String, u32)>> {
        self.shared.broken.lock().unwrap()
    }

    fn loses(&self, lane: &str) -> bool {
        match &mut *self.broken() {
            Some((name, 0)) => name == lane,
            Some((name, left)) => {
                *left -= u32::from(name == lane);
                false
            }
            None => false,
        }
    }
}

impl Clock for Faulty {
    fn now(&self) -> Duration {
        self.threads.now()
    }
}

impl Executor for Faulty {
    fn lane(&self, name: &str) -> io::Result<Box<dyn Lane>> {
        let inner = self.threads.lane(name)?;
        Ok(Box::new(FaultyLane { name: name.to_owned(), inner, faulty: self.clone() }))
    }

    fn pause(&self, duration: Duration) {
        self.threads.pause(duration);
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let Some(gate) = self.shared.gates.lock().unwrap().get(&duration).cloned() else {
            return self.threads.sleep(duration);
        };
        Box::pin(async move {
            gate.waits.send_modify(|waits| *waits += 1);
            gate.passes.acquire().await.unwrap().forget();
        })
    }

    fn random(&self) -> u64 {
        self.threads.random()
    }
}

#[derive(Debug)]
struct FaultyLane {
    name: String,
    inner: Box<dyn Lane>,
    faulty: Faulty,
}

impl Lane for FaultyLane {
    fn submit(&self, job: Job) {
        if self.faulty.loses(&self.name) {
            // Whoever waits for it finds that no answer can come.
            drop(job);
            self.faulty.shared.lost.send_modify(|lost| *lost += 1);
        } else {
            self.inner.submit(job);
        }
    }
}
