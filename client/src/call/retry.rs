//! When a call is made again: only after UNAVAILABLE, only where it may, and only while there is time.
//!
//! ```text
//!   call -> UNAVAILABLE -> repeatable? attempts left? -> pause: what RetryInfo asks + full jitter -> call
//!                                                        longer than the deadline -> the first error stands
//! ```
//!
//! Invariants: a call that changes something is repeated only if it carries a `request_id`. A pause never ends after
//! the deadline. Full jitter: a pause is anything from nothing to its ceiling, so that callers that failed together do
//! not come back together. A program that waits for nobody can have what is in the way told at once, also where it may
//! pass: see [`RetryPolicy::repeat_blocked`].

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::tls;

/// How often and how fast a call is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The ceiling of the first pause. It doubles with each.
    pub first_pause: Duration,
    /// No ceiling is higher.
    pub longest_pause: Duration,
    /// Calls in all.
    pub attempts: u32,
    /// Whether a call is made again where the agent has said what is in the way, and that it may pass: another operation
    /// that has the device, mostly, and that may take minutes.
    pub repeat_blocked: bool,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            attempts: 8,
            repeat_blocked: true,
        }
    }
}

impl RetryPolicy {
    /// The ceiling of the pause after `failed` attempts, from 1.
    fn ceiling(&self, failed: u32) -> Duration {
        let doublings = failed.saturating_sub(1).min(31);
        self.first_pause.saturating_mul(1 << doublings).min(self.longest_pause)
    }

    /// The pause after `failed` attempts. `random` is uniform over all its values.
    fn pause(&self, failed: u32, asked: Option<Duration>, random: u32) -> Duration {
        let jitter = self.ceiling(failed).mul_f64(f64::from(random) / f64::from(u32::MAX));
        asked.unwrap_or_default().saturating_add(jitter)
    }
}

/// Where the jitter of pauses comes from: uniform over all of its values. The machine's randomness, unless told otherwise.
#[derive(Clone)]
pub struct Jitter(Arc<dyn Fn() -> u32 + Send + Sync>);

impl Jitter {
    /// Jitter from `draw`, for a run that is to be repeated exactly.
    pub fn from_fn(draw: impl Fn() -> u32 + Send + Sync + 'static) -> Self {
        Self(Arc::new(draw))
    }
}

impl Default for Jitter {
    fn default() -> Self {
        Self::from_fn(random_u32)
    }
}

impl fmt::Debug for Jitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Jitter")
    }
}

/// Calls `once` until it works, fails for good, or time is up. `is_refused` tells whether the last connection was refused for
/// what the caller is, which no repetition changes.
pub(super) async fn retry<T, F>(
    policy: &RetryPolicy,
    jitter: &Jitter,
    deadline: Instant,
    is_repeatable: bool,
    is_refused: impl Fn() -> bool,
    mut once: impl FnMut() -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut failed = 0;
    loop {
        let status = match once().await {
            Ok(value) => return Ok(value),
            Err(status) => status,
        };
        failed += 1;
        if !is_repeatable || failed >= policy.attempts || !is_unavailable(&status) {
            return Err(status);
        }
        if is_local(&status) && is_refused() || !policy.repeat_blocked && is_blocked(&status) {
            return Err(status);
        }
        let asked = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let pause = policy.pause(failed, asked, (jitter.0)());
        if Instant::now() + pause >= deadline {
            return Err(status);
        }
        tracing::debug!(
            pause_ms = pause.as_millis(),
            failed,
            "the agent is unavailable; the call is made again"
        );
        sleep(pause).await;
    }
}

/// Whether the agent said UNAVAILABLE, or could not be reached.
pub(super) fn is_unavailable(status: &Status) -> bool {
    status.code() == Code::Unavailable || is_local(status)
}

/// Whether the agent said what is in the way.
fn is_blocked(status: &Status) -> bool {
    status.get_details_precondition_failure().is_some_and(|failure| !failure.violations.is_empty())
}

/// Whether a status was made on this side, out of a broken connection. What the agent says has no source.
pub(super) fn is_local(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Uniform. Without a source of randomness there is no jitter either, which is safe.
fn random_u32() -> u32 {
    let mut bytes = [0; 4];
    match tls::provider().secure_random.fill(&mut bytes) {
        Ok(()) => u32::from_le_bytes(bytes),
        Err(_) => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_double_up_to_the_longest() {
        let policy = RetryPolicy::default();
        let ceilings: Vec<_> = (1..=9).map(|failed| policy.ceiling(failed).as_millis()).collect();
        assert_eq!(ceilings, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(policy.ceiling(u32::MAX), policy.longest_pause);
    }

    #[test]
    fn a_pause_is_anything_up_to_its_ceiling_and_never_less_than_asked() {
        let policy = RetryPolicy::default();
        let asked = Duration::from_secs(1);
        assert_eq!(policy.pause(1, None, 0), Duration::ZERO);
        assert_eq!(policy.pause(2, None, u32::MAX), Duration::from_millis(200));
        assert_eq!(policy.pause(1, Some(asked), 0), asked);
        assert_eq!(policy.pause(1, Some(asked), u32::MAX), Duration::from_millis(1100));
        assert!(policy.pause(u32::MAX, Some(Duration::MAX), u32::MAX) == Duration::MAX);
    }
}
