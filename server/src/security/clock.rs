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

/// How long a wait trusts the monotonic clock before it looks at the wall clock again.
const RECHECK: Duration = Duration::from_secs(30);

/// Wall time, and waiting for it.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Now.
    fn now(&self) -> UnixTime;

    /// Ends once `now() >= at`.
    fn wait_until(&self, at: UnixTime) -> BoxFuture<'_, ()>;
}

/// The clock of the system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixTime {
        UnixTime::now()
    }

    fn wait_until(&self, at: UnixTime) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            loop {
                let left_secs = at.as_secs().saturating_sub(UnixTime::now().as_secs());
                if left_secs == 0 {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(left_secs).min(RECHECK)).await;
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
