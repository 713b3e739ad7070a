//! Why a call failed, with everything that the agent said about it.
//!
//! ```text
//!   Status + google.rpc details -> Refusal { reason, blockers, fields, retry_after }
//!   transport failure           -> ConnectError, where the connection knows better than HTTP/2
//! ```
//!
//! Invariants: nothing that the agent sent is dropped on the way to people: `Display` prints every blocker and field.
//! Failure paths: details that cannot be decoded are said to be so; the code and the message stand.

use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::connect::ConnectError;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no connection. Whether the call was carried out is not known if it had been sent.
    #[error("{rpc} did not get through: {source}")]
    NotConnected {
        /// The call.
        rpc: &'static str,
        /// Why not.
        source: Box<ConnectError>,
    },
    /// The agent did not answer in time. Whether the call was carried out is not known.
    #[error("{rpc} was not answered within {} ms; see that the agent is well, or allow more time", after.as_millis())]
    Deadline {
        /// The call.
        rpc: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The agent said no.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The agent's answer makes no sense.
    #[error(
        "the answer to {rpc} cannot be used: {problem}; see that agent and client are of versions that go together"
    )]
    BadAnswer {
        /// The call.
        rpc: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl CallError {
    /// The refusal, where the agent said no.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::NotConnected { .. } | Self::Deadline { .. } | Self::BadAnswer { .. } => None,
        }
    }
}

/// What the agent said when it said no.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The call.
    pub rpc: &'static str,
    /// The gRPC code.
    pub code: Code,
    /// One sentence for people.
    pub message: String,
    /// `ErrorInfo.reason`: stable.
    pub reason: Option<String>,
    /// `PreconditionFailure.violations`: what is in the way, all of it.
    pub blockers: Vec<Violation>,
    /// `BadRequest.field_violations`: which fields are wrong, all of them.
    pub fields: Vec<FieldProblem>,
    /// `RetryInfo.retry_delay`.
    pub retry_after: Option<Duration>,
    /// Whether details were sent that cannot be decoded.
    pub has_bad_details: bool,
}

/// One thing that is in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The stable name of the reason.
    pub kind: String,
    /// The device or other thing that it is about.
    pub subject: String,
    /// One sentence for people.
    pub description: String,
}

/// One field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldProblem {
    /// Its path in the request.
    pub field: String,
    /// One sentence for people.
    pub description: String,
}

impl Refusal {
    /// Decodes a status.
    pub fn from_status(rpc: &'static str, status: &Status) -> Self {
        let decoded = status.check_error_details();
        let has_bad_details = decoded.is_err();
        let details = decoded.unwrap_or_default();
        Self {
            rpc,
            code: status.code(),
            message: status.message().to_owned(),
            reason: details.error_info().map(|info| info.reason.clone()),
            blockers: details
                .precondition_failure()
                .map(|failure| {
                    failure
                        .violations
                        .iter()
                        .map(|violation| Violation {
                            kind: violation.r#type.clone(),
                            subject: violation.subject.clone(),
                            description: violation.description.clone(),
                        })
                        .collect()
                })
                .unwrap_or_default(),
            fields: details
                .bad_request()
                .map(|bad| {
                    bad.field_violations
                        .iter()
                        .map(|violation| FieldProblem {
                            field: violation.field.clone(),
                            description: violation.description.clone(),
                        })
                        .collect()
                })
                .unwrap_or_default(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
            has_bad_details,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed ({}", self.rpc, code_name(self.code))?;
        if let Some(reason) = &self.reason {
            write!(f, ", {reason}")?;
        }
        // What the list below says in full, the message says in one line.
        let listed = !self.blockers.is_empty()
            && self.blockers.iter().all(|blocker| self.message.contains(&blocker.description));
        match self.message.split_once(": ").filter(|_| listed) {
            Some((first, _)) => write!(f, "): {}", printable(first))?,
            None => write!(f, "): {}", printable(&self.message))?,
        }
        for Violation { kind, subject, description } in &self.blockers {
            // As every other place that shows them: the stable name without its type.
            write!(f, "\n  {}", printable(kind.strip_prefix("BLOCKER_REASON_").unwrap_or(kind)))?;
            if !subject.is_empty() {
                write!(f, " {}", printable(subject))?;
            }
            write!(f, ": {}", printable(description))?;
        }
        for FieldProblem { field, description } in &self.fields {
            write!(f, "\n  field {}: {}", printable(field), printable(description))?;
        }
        if let Some(after) = self.retry_after {
            write!(f, "\n  it may work again in {} ms", after.as_millis())?;
        }
        if self.has_bad_details {
            f.write_str("\n  more details were sent that this client cannot read")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

/// What comes from the other side is shown without control characters: they could rewrite a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The name of a code, as in the gRPC standard.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn every_detail_reaches_people() {
        let mut details = ErrorDetails::new();
        details.set_error_info(
            "DEVICES_BLOCKED",
            "vfio-checkpoint",
            [("device".to_owned(), "devices/a".to_owned())],
        );
        details.add_precondition_failure_violation("NOT_MIGRATABLE", "devices/a", "it has no migration");
        details.add_precondition_failure_violation(
            "DEVICE_LEASED",
            "devices/b",
            "operations/1 has it\x1b[2J",
        );
        details.add_bad_request_violation("devices[0]", "is empty");
        details.set_retry_info(Some(Duration::from_millis(250)));
        let status =
            Status::with_error_details(Code::FailedPrecondition, "two devices are in the way", details);
        let refusal = Refusal::from_status("StartSave", &status);
        assert_eq!(refusal.blockers.len(), 2);
        insta::assert_snapshot!(refusal.to_string(), @"
        StartSave failed (FAILED_PRECONDITION, DEVICES_BLOCKED): two devices are in the way
          NOT_MIGRATABLE devices/a: it has no migration
          DEVICE_LEASED devices/b: operations/1 has it�[2J
          field devices[0]: is empty
          it may work again in 250 ms
        ");
    }

    #[test]
    fn details_that_are_garbage_are_said_to_be() {
        let status = Status::with_details(Code::Internal, "no", bytes::Bytes::from_static(&[0xff, 0xff]));
        let text = Refusal::from_status("GetDevice", &status).to_string();
        assert!(text.contains("INTERNAL") && text.contains("cannot read"), "{text}");
    }
}
