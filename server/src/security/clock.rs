//! The wall clock that certificates are held against.
//!
//! ```text
//!   Clock::now         -> handshake verification, re-verification
//!   Clock::wait_until  -> the end of a certificate's life
//! ```
//!
//! One clock serves both, so a test moves time in one place and waits for an event and never for the time
//! itself. The wall clock can be stepped: a wait looks at it again at least every `RECHECK`, however far
//! away its end is.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

use crate::environment::Environment;

/// How long a wait trusts the monotonic clock before it looks at the wall clock again.
const RECHECK: Duration = Duration::from_secs(20);

/// Wall time, and waiting for it.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Now.
    fn now(&self) -> UnixTime;

    /// Ends once `now() >= at`.
    fn wait_until(&self, at: UnixTime) -> BoxFuture<'_, ()>;
}

/// The agent's own clock.
#[derive(Debug, Clone)]
pub struct EnvironmentClock(pub Environment);

impl Clock for EnvironmentClock {
    fn now(&self) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_millis(self.0.unix_now().0))
    }

    fn wait_until(&self, at: UnixTime) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            loop {
                let left_secs = at.as_secs().saturating_sub(self.now().as_secs());
                if left_secs == 0 {
                    return;
                }
                self.0.sleep(Duration::from_secs(left_secs).min(RECHECK)).await;
            }
        })
    }
}

/// A [`Clock`] in the shape that rustls takes.
#[derive(Debug, Clone)]
pub(super) struct TlsClock(pub(super) Arc<dyn Clock>);

impl TimeProvider for TlsClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.0.now())
    }
}
