//! Points at which a test stops the agent, to kill it there with SIGKILL, and points at which it has the journal fail.
//!
//! ```text
//!   FAILPOINTS=NAME=3, or arm("NAME", 3)
//!   reached(NAME), reached(NAME), reached(NAME): "stopped at NAME" on standard error, and no step further
//!
//!   let failing = fail(FOLDER, "commit of HELD", 1)
//!   failing(FOLDER/.., "commit of HELD")  Ok, then EIO, EIO, ... until it is dropped; "failed at ..." on standard error
//! ```
//! The second kind is of one folder, and so of one agent, because many agents run in one process of tests. Whoever
//! watches a folder is told of each of them, whether it fails or not. `fail(FOLDER, "planted: DEFECT", 0)` has the agent
//! do what it must not: a proof that finds no such defect proves nothing.
//!
//! They are there with the feature `failpoints` alone, which only the workspace's tests turn on. Without it `reached` is
//! an empty function, and nothing reads the environment. The crate `fail` is not used: it prints nothing before it
//! pauses, and brings a second version of several crates, which the dependency rules refuse.
//!
//! # Invariants
//! - Where `FAILPOINTS` is not set nothing is said and nothing is stopped, with the feature too; where nobody calls
//!   `fail`, nothing fails.
//! - What is stopped blocks its thread: the step does not go on, whatever else the process does.

use std::fmt;
use std::io;
use std::path::Path;

/// Whether a test has what comes to `point`, with its file at `path`, fail.
#[cfg(not(feature = "failpoints"))]
#[inline]
#[allow(clippy::unnecessary_wraps, reason = "with the feature it fails")]
pub(crate) fn failing(path: &Path, point: fmt::Arguments<'_>) -> io::Result<()> {
    let _ = (path, point);
    Ok(())
}

/// Whether a test has planted this defect in the agent whose folder this is, for others to find.
pub(crate) fn is_planted(folder: &Path, defect: &str) -> bool {
    failing(folder, format_args!("planted: {defect}")).is_err()
}

/// The agent has come to `point`.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub(crate) fn reached(point: fmt::Arguments<'_>) {
    let _ = point;
}

#[cfg(feature = "failpoints")]
pub use on::{Failing, Watching, arm, fail, release, watch};

#[cfg(feature = "failpoints")]
pub(crate) fn failing(path: &Path, point: fmt::Arguments<'_>) -> io::Result<()> {
    on::failing(path, point)
}

#[cfg(feature = "failpoints")]
pub(crate) fn reached(point: fmt::Arguments<'_>) {
    on::reached(point);
}

#[cfg(feature = "failpoints")]
mod on {
    use std::collections::BTreeMap;
    use std::fmt;
    use std::io::{self, Write as _};
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

    use tokio::sync::watch;

    struct Points {
        /// Say each point, so that a test knows which there are.
        tell: bool,
        /// Where to stop, and how many times it is to be reached before.
        armed: Option<(String, u32)>,
        /// Rises with each release.
        released: u64,
    }

    static POINTS: LazyLock<Mutex<Points>> = LazyLock::new(|| {
        let set = std::env::var("FAILPOINTS");
        let armed = set.as_deref().ok().and_then(|text| {
            let (name, times) = text.rsplit_once('=')?;
            Some((name.to_owned(), times.parse().ok()?))
        });
        Mutex::new(Points { tell: set.is_ok(), armed, released: 0 })
    });
    static RELEASED: Condvar = Condvar::new();

    /// What a test has fail.
    struct Fails {
        folder: PathBuf,
        point: String,
        /// How many pass before the first that fails.
        pass: u32,
        failed: watch::Sender<u32>,
    }

    static FAILS: Mutex<Vec<Fails>> = Mutex::new(Vec::new());

    fn fails() -> MutexGuard<'static, Vec<Fails>> {
        FAILS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something fails until this is dropped.
    #[derive(Debug)]
    pub struct Failing(watch::Receiver<u32>);

    impl Failing {
        /// Ready once it has failed so many times.
        pub async fn times(&mut self, times: u32) {
            // The sender goes with this value.
            let _ = self.0.wait_for(|failed| *failed >= times).await;
        }
    }

    impl Drop for Failing {
        fn drop(&mut self) {
            fails().retain(|fails| !fails.failed.subscribe().same_channel(&self.0));
        }
    }

    /// Has what comes to `point` fail where its file is in `folder`, from the one after `pass` on.
    pub fn fail(folder: &Path, point: &str, pass: u32) -> Failing {
        let (failed, failing) = watch::channel(0);
        fails().push(Fails { folder: folder.to_owned(), point: point.to_owned(), pass, failed });
        Failing(failing)
    }

    type Told = Arc<dyn Fn(&str) + Send + Sync>;

    static WATCHES: Mutex<BTreeMap<PathBuf, Told>> = Mutex::new(BTreeMap::new());

    fn watches() -> MutexGuard<'static, BTreeMap<PathBuf, Told>> {
        WATCHES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A folder is watched until this is dropped.
    #[derive(Debug)]
    pub struct Watching(PathBuf);

    impl Drop for Watching {
        fn drop(&mut self) {
            watches().remove(&self.0);
        }
    }

    /// Has `tell` told of each point that is come to with a file in `folder`. One watches a folder at a time.
    #[must_use = "it is watched until the value is dropped"]
    pub fn watch(folder: &Path, tell: impl Fn(&str) + Send + Sync + 'static) -> Watching {
        watches().insert(folder.to_owned(), Arc::new(tell));
        Watching(folder.to_owned())
    }

    pub(super) fn failing(path: &Path, point: fmt::Arguments<'_>) -> io::Result<()> {
        // Told without the lock: whoever is told may come to a point of its own.
        let told = path.parent().and_then(|folder| watches().get(folder).cloned());
        if let Some(told) = told {
            told(&point.to_string());
        }
        let mut all = fails();
        let mut strikes = all.iter_mut().filter(|fails| path.starts_with(&fails.folder));
        let Some(struck) = strikes.find(|fails| point.to_string() == fails.point) else { return Ok(()) };
        if let Some(left) = struck.pass.checked_sub(1) {
            struck.pass = left;
            return Ok(());
        }
        struck.failed.send_modify(|failed| *failed += 1);
        if points().tell {
            say(format_args!("failed at {point}"));
        }
        Err(io::Error::other(format!("a test has {point} fail")))
    }

    fn points() -> MutexGuard<'static, Points> {
        POINTS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the agent where it comes to `point` for the `times`th time from now on.
    pub fn arm(point: &str, times: u32) {
        points().armed = Some((point.to_owned(), times));
    }

    /// Lets what is stopped go on.
    pub fn release() {
        points().released += 1;
        RELEASED.notify_all();
    }

    pub(super) fn reached(point: fmt::Arguments<'_>) {
        let mut points = points();
        if !points.tell {
            return;
        }
        let name = point.to_string();
        say(format_args!("at {name}"));
        if let Some((armed, left)) = &mut points.armed
            && *armed == name
        {
            *left = left.saturating_sub(1);
            if *left == 0 {
                points.armed = None;
                say(format_args!("stopped at {name}"));
                let before = points.released;
                let going_on = RELEASED.wait_while(points, |points| points.released == before);
                drop(going_on.unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    fn say(line: fmt::Arguments<'_>) {
        // Whoever reads it waits for the line: one write, and nobody else is there to tell where it fails.
        let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
    }
}
