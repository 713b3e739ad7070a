//! Points at which a test stops the agent, to kill it there with SIGKILL.
//!
//! ```text
//!   FAILPOINTS=NAME=3, or arm("NAME", 3)
//!   reached(NAME), reached(NAME), reached(NAME): "stopped at NAME" on standard error, and no step further
//! ```
//! They are there with the feature `failpoints` alone, which only the workspace's tests turn on. Without it `reached` is
//! an empty function, and nothing reads the environment. The crate `fail` is not used: it prints nothing before it
//! pauses, and brings a second version of several crates, which the dependency rules refuse.
//!
//! # Invariants
//! - Where `FAILPOINTS` is not set nothing is said and nothing is stopped, with the feature too.
//! - What is stopped blocks its thread: the step does not go on, whatever else the process does.

use std::fmt;

/// The agent has come to `point`.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub(crate) fn reached(point: fmt::Arguments<'_>) {
    let _ = point;
}

#[cfg(feature = "failpoints")]
pub use on::{arm, release};

#[cfg(feature = "failpoints")]
pub(crate) fn reached(point: fmt::Arguments<'_>) {
    on::reached(point);
}

#[cfg(feature = "failpoints")]
mod on {
    use std::fmt;
    use std::io::Write as _;
    use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

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
        let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
    }
}
