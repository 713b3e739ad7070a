//! An executor that notes when each piece of work of a lane began and ended.
//!
//! ```text
//!   agent --lane(name)--> Timed --job, timed--> Threads
//!                           `-> Span { lane, begin, end, state of the device after it }
//! ```
//! Two agents are two processes on one machine: what they note is by the machine's wall clock, so that it can be laid side
//! by side. A clock that is set meanwhile spoils a round.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vfio_checkpoint_device::executor::Job;
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_device::{Clock, Executor, Lane, Threads};
use vfio_checkpoint_server::environment::Environment;

/// No more than so many are kept: the oldest go.
const MOST: usize = 1 << 16;

/// A piece of work.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    /// It was the journal's, and not the device's.
    pub(crate) journal: bool,
    pub(crate) begin_us: u64,
    pub(crate) end_us: u64,
    /// The state of the device after it, of the device's.
    pub(crate) state: String,
}

#[derive(Debug, Clone)]
pub(crate) struct Timed {
    threads: Threads,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    device: OnceLock<SimDevice>,
    spans: Mutex<VecDeque<Span>>,
}

fn now_us() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

impl Timed {
    pub(crate) fn new() -> Self {
        Self { threads: Threads::new(), shared: Arc::default() }
    }

    pub(crate) fn environment(&self) -> Environment {
        Environment { executor: Arc::new(self.clone()), ..Environment::production() }
    }

    /// The device whose work is of interest, beside the journal's.
    pub(crate) fn watch(&self, device: SimDevice) {
        self.shared.device.set(device).expect("one device");
    }

    /// Everything so far, in one line, and forgets it.
    pub(crate) fn line(&self) -> String {
        let spans = std::mem::take(&mut *self.shared.spans.lock().unwrap());
        let spans =
            spans.into_iter().map(|span| json!([span.journal, span.begin_us, span.end_us, span.state]));
        Value::Array(spans.collect()).to_string()
    }
}

impl Span {
    /// Reads what [`Timed::line`] wrote.
    pub(crate) fn read(line: &str) -> Vec<Self> {
        let spans: Vec<(bool, u64, u64, String)> = serde_json::from_str(line).unwrap();
        let span = |(journal, begin_us, end_us, state)| Self { journal, begin_us, end_us, state };
        spans.into_iter().map(span).collect()
    }
}

impl Shared {
    fn note(&self, lane: &str, begin_us: u64) {
        let end_us = now_us();
        let state = match self.device.get() {
            _ if lane == "journal" => String::new(),
            Some(device) if device.identity().name == lane => device.state().to_string(),
            Some(_) | None => return,
        };
        let mut spans = self.spans.lock().unwrap();
        if spans.len() == MOST {
            spans.pop_front();
        }
        spans.push_back(Span { journal: lane == "journal", begin_us, end_us, state });
    }
}

impl Clock for Timed {
    fn now(&self) -> Duration {
        self.threads.now()
    }
}

impl Executor for Timed {
    fn lane(&self, name: &str) -> io::Result<Box<dyn Lane>> {
        let inner = self.threads.lane(name)?;
        Ok(Box::new(TimedLane { name: name.to_owned(), inner, shared: Arc::clone(&self.shared) }))
    }

    fn pause(&self, duration: Duration) {
        self.threads.pause(duration);
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.threads.sleep(duration)
    }

    fn random(&self) -> u64 {
        self.threads.random()
    }
}

#[derive(Debug)]
struct TimedLane {
    name: String,
    inner: Box<dyn Lane>,
    shared: Arc<Shared>,
}

impl Lane for TimedLane {
    fn submit(&self, job: Job) {
        let (name, shared) = (self.name.clone(), Arc::clone(&self.shared));
        self.inner.submit(Box::new(move || {
            let begin_us = now_us();
            job();
            shared.note(&name, begin_us);
        }));
    }
}
