//! What happened in a run, in order, and when by the simulation's clock.
//!
//! # Invariants
//! - Nothing that differs between two runs of one seed is in it: no real time, no path, no key, no address of memory.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vfio_checkpoint_device::Clock;

/// The clock of a simulated world. It can be asked from anywhere, also where no host is running.
#[derive(Debug, Clone, Default)]
pub(crate) struct SimClock(Arc<Hands>);

#[derive(Debug, Default)]
struct Hands {
    last_nanos: AtomicU64,
    /// No host runs, although one may seem to: what ends a host asks the machine's clock.
    stands: AtomicBool,
}

impl SimClock {
    /// The world is this old.
    pub(crate) fn set(&self, now: Duration) {
        self.0.last_nanos.store(u64::try_from(now.as_nanos()).unwrap(), Ordering::Relaxed);
    }

    /// Time stands still while `work` is done.
    pub(crate) fn standing<T>(&self, work: impl FnOnce() -> T) -> T {
        self.0.stands.store(true, Ordering::Relaxed);
        let done = work();
        self.0.stands.store(false, Ordering::Relaxed);
        done
    }
}

impl Clock for SimClock {
    fn now(&self) -> Duration {
        if !self.0.stands.load(Ordering::Relaxed)
            && let Some(now) = turmoil::sim_elapsed()
        {
            return now;
        }
        Duration::from_nanos(self.0.last_nanos.load(Ordering::Relaxed))
    }
}

/// The log. Clones are the same log.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    clock: SimClock,
    /// The folder of this run, which no other run has.
    folder: Arc<str>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Log {
    pub(crate) fn new(clock: SimClock, folder: &str) -> Self {
        Self { clock, folder: folder.into(), lines: Arc::default() }
    }

    /// The first words of an error, as they are in every run.
    pub(crate) fn short(&self, error: &impl fmt::Display) -> String {
        let text = error.to_string().replace(&*self.folder, "");
        text.chars().take(160).map(|c| if c.is_control() { ' ' } else { c }).collect()
    }

    /// `who` did, or saw, `what`.
    pub(crate) fn say(&self, who: &str, what: fmt::Arguments<'_>) {
        let now = self.clock.now();
        let line = format!("{:>6}.{:03} {who:<8} {what}", now.as_millis(), now.subsec_micros() % 1000);
        self.lines().push(line);
    }

    pub(crate) fn len(&self) -> usize {
        self.lines().len()
    }

    /// Whether anything after the first `seen` lines has `what` in it.
    pub(crate) fn has_said(&self, seen: usize, what: &str) -> bool {
        self.lines()[seen..].iter().any(|line| line.contains(what))
    }

    /// All of it, a line each.
    pub(crate) fn text(&self) -> String {
        self.lines().join("\n")
    }

    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap()
    }
}

/// In a word: `log!(log, "a", "connects to {}", b)`.
macro_rules! say {
    ($log:expr, $who:expr, $($what:tt)*) => { $log.say($who, format_args!($($what)*)) };
}
pub(crate) use say;
