//! One line for each decision of authority: who, what, on what, with which result.
//!
//! ```text
//!   authorize (allowed changes, all denials) --+
//!   handlers (what became of it: `record`)   --+--> AuditLine --> tracing event, target "audit"
//! ```
//!
//! The target is a stream of its own: a subscriber routes it to where audit lines are kept, whatever the log
//! level. Text that a caller chooses (a method path, a resource) is escaped and shortened, so that no caller
//! can forge a line. What an admin answers for has a field of its own, whole and in its letters. Nothing secret is
//! in a line: no key, no token, no byte of a device's state.
//!
//! A field that a line has nothing for is not in it: who, where no certificate was shown; the resource and the id of the
//! request in the lines of `authorize`, which has not read the request.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{DisplayValue, display};
use tracing::info;

use super::authorize::Caller;

/// The tracing target of audit lines.
pub const TARGET: &str = "audit";
/// What a caller chooses is cut here.
const TEXT_MAX_CHARS: usize = 256;
/// What somebody answers for is cut here: it is never longer where it is taken.
const STATEMENT_MAX_CHARS: usize = 1024;

/// What was decided, or what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditResult {
    /// The caller may.
    Allowed,
    /// The caller may not; the reason is the stable one of the refusal.
    Denied {
        /// The reason, as in `ErrorInfo`.
        reason: &'static str,
    },
    /// It was done.
    Succeeded,
    /// It was allowed and failed.
    Failed {
        /// The reason, as in `ErrorInfo`.
        reason: &'static str,
    },
}

impl AuditResult {
    fn name(self) -> &'static str {
        match self {
            AuditResult::Allowed => "allowed",
            AuditResult::Denied { .. } => "denied",
            AuditResult::Succeeded => "succeeded",
            AuditResult::Failed { .. } => "failed",
        }
    }

    fn reason(self) -> Option<&'static str> {
        match self {
            AuditResult::Allowed | AuditResult::Succeeded => None,
            AuditResult::Denied { reason } | AuditResult::Failed { reason } => Some(reason),
        }
    }
}

/// One line.
#[derive(Debug, Clone)]
pub struct AuditLine<'a> {
    /// When.
    pub time: SystemTime,
    /// Who; None if there was no certificate.
    pub caller: Option<&'a Caller>,
    /// From where; None if that is not known.
    pub address: Option<std::net::SocketAddr>,
    /// What: a method's full path, or a handler's word for it.
    pub what: &'a str,
    /// On what: a device, an operation.
    pub resource: Option<&'a str>,
    /// With which result.
    pub result: AuditResult,
    /// The caller's id for the request, if it has one.
    pub request_id: Option<&'a str>,
}

impl AuditLine<'_> {
    /// Writes it.
    pub fn emit(&self) {
        self.emit_stating("");
    }

    /// Writes it, with what the caller answers for.
    fn emit_stating(&self, statement: &str) {
        let time_unix_ms = self.time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        info!(
            target: TARGET,
            time_unix_ms = u64::try_from(time_unix_ms).unwrap_or(u64::MAX),
            who = self.caller.map(|caller| display(&caller.identity)),
            key = self.caller.map(|caller| display(caller.public_key_hash)),
            roles = self.caller.filter(|caller| !caller.roles.is_empty()).map(|caller| display(caller.roles)),
            address = self.address.map(display),
            what = %Plain(self.what),
            resource = plain(self.resource),
            result = self.result.name(),
            reason = self.result.reason(),
            request_id = plain(self.request_id),
            statement = (!statement.is_empty()).then(|| display(Stated(statement))),
            "audit"
        );
    }
}

/// Writes a line for a handler: what became of a call on a resource, of which request, where that has an id, and what its
/// caller answers for.
pub fn record(
    caller: &Caller,
    action: &str,
    resource: &str,
    request_id: Option<&str>,
    statement: &str,
    result: AuditResult,
) {
    AuditLine {
        time: SystemTime::now(),
        caller: Some(caller),
        address: Some(caller.address),
        what: action,
        resource: Some(resource),
        result,
        request_id,
    }
    .emit_stating(statement);
}

fn plain(text: Option<&str>) -> Option<DisplayValue<Plain<'_>>> {
    text.filter(|text| !text.is_empty()).map(Plain).map(display)
}

/// A stranger's text: shortened, on one line, without control characters.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().take(TEXT_MAX_CHARS).try_for_each(|c| write!(f, "{}", c.escape_default()))
    }
}

/// A statement of a stranger, for people: its letters as they are, on one line, without control characters.
struct Stated<'a>(&'a str);

impl fmt::Display for Stated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().take(STATEMENT_MAX_CHARS).try_for_each(|c| match c {
            '\'' => write!(f, "{c}"),
            c => write!(f, "{}", c.escape_debug()),
        })
    }
}
