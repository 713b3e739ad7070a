//! A command that did not do what was asked for: what is said of it, for people and for programs.
//!
//! ```text
//!   ConnectError, CallError, the end of an operation, a mistake -> Failure -> text       -o table, wide
//!                                                                          -> document   -o json, yaml
//! ```
//!
//! Invariants: a failure goes to stderr, in the format that results have, and is the last thing there. The operation that
//! ended badly goes to stdout, as `operations get` prints it. A document always has a reason: the agent's where it gave one,
//! else one of this program's own.

use std::fmt::Display;

use serde::Serialize;
use tonic::Code;
use vfio_checkpoint_client::call::{CallError, Refusal, code_name, printable};
use vfio_checkpoint_client::connect::ConnectError;
use vfio_checkpoint_client::transfer::OpenStreamError;
use vfio_checkpoint_proto::v1::{CheckpointConsistency, Operation, OperationResult};

use crate::outcome::Exit;
use crate::render::{self, BlockerDoc};

/// A command that did not do what was asked for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// All of it, for people.
    pub(crate) message: String,
    told: Box<Told>,
}

/// The parts of it, for programs.
#[derive(Debug, Clone, Default, PartialEq)]
struct Told {
    code: Option<Code>,
    reason: Option<String>,
    /// Without what the other parts say.
    message: Option<String>,
    hint: Option<String>,
    device: Option<String>,
    operation: Option<String>,
    blockers: Vec<BlockerDoc>,
    fields: Vec<FieldDoc>,
    retry_after_ms: Option<u64>,
    /// What stdout gets.
    shown: Option<Operation>,
}

/// One field of a request that is wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct FieldDoc {
    field: String,
    message: String,
}

/// What stderr gets where results are documents.
#[derive(Debug, Serialize)]
pub(crate) struct Document {
    error: ErrorDoc,
}

#[derive(Debug, Serialize)]
struct ErrorDoc {
    /// Of gRPC, where the agent answered with one.
    code: Option<&'static str>,
    reason: String,
    message: String,
    device: Option<String>,
    operation: Option<String>,
    hint: Option<String>,
    blockers: Vec<BlockerDoc>,
    fields: Vec<FieldDoc>,
    retry_after_ms: Option<u64>,
    exit_code: u8,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Display) -> Self {
        Self { exit, message: message.to_string(), told: Box::default() }
    }

    pub(crate) fn usage(message: impl Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// A failure whose text ends with what to do, after a semicolon.
    pub(crate) fn with_advice(exit: Exit, error: impl Display) -> Self {
        let mut failure = Self::new(exit, error);
        if let Some((what, hint)) = failure.message.rsplit_once("; ") {
            failure.told.message = Some(what.to_owned());
            failure.told.hint = Some(hint.to_owned());
        }
        failure
    }

    pub(crate) fn connect(error: ConnectError) -> Self {
        let exit =
            if matches!(error, ConnectError::BadEndpoint { .. }) { Exit::Usage } else { Exit::Unreachable };
        Self::with_advice(exit, &error).because(reason_of(&error))
    }

    /// A call that was refused. It has not touched anything, or says otherwise by its code.
    pub(crate) fn call(error: CallError) -> Self {
        match &error {
            CallError::NotConnected { source, .. } => {
                Self::with_advice(Exit::Unreachable, &error).because(reason_of(source))
            }
            CallError::Deadline { .. } => Self::with_advice(Exit::Unreachable, &error).because("NO_ANSWER"),
            CallError::BadAnswer { .. } => Self::with_advice(Exit::Failed, &error).because("BAD_ANSWER"),
            CallError::Refused(refusal) => Self::refused(refusal),
        }
    }

    fn refused(refusal: &Refusal) -> Self {
        // Also where what is in the way may pass: the agent was reached, and said no.
        let is_blocked = refusal.reason.as_deref() == Some(BLOCKED);
        let exit = if is_blocked { Exit::Refused } else { exit_of(refusal.code) };
        let mut failure = Self::new(exit, refusal);
        let blockers: Vec<BlockerDoc> = refusal.blockers.iter().map(BlockerDoc::of_violation).collect();
        let device = match blockers.as_slice() {
            [one] => Some(one.device().to_owned()).filter(|device| !device.is_empty()),
            _ => None,
        };
        let is_fork = blockers.iter().any(|blocker| blocker.reason() == "SOURCE_STILL_RUNNING");
        *failure.told = Told {
            code: Some(refusal.code),
            reason: refusal.reason.clone(),
            message: Some(format!("{}: {}", refusal.rpc, refusal.message)),
            device,
            blockers,
            fields: refusal
                .fields
                .iter()
                .map(|wrong| FieldDoc { field: wrong.field.clone(), message: wrong.description.clone() })
                .collect(),
            retry_after_ms: refusal.retry_after.and_then(|after| u64::try_from(after.as_millis()).ok()),
            ..Told::default()
        };
        if is_fork {
            return failure.hint("to make a copy of it on purpose give --allow-fork");
        }
        match refusal.reason.as_deref().and_then(hint_of) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }

    pub(crate) fn open(error: OpenStreamError) -> Self {
        match error {
            OpenStreamError::Call(error) => Self::call(error),
            error @ (OpenStreamError::GivenUp(_)
            | OpenStreamError::Ended
            | OpenStreamError::NotOpened
            | OpenStreamError::Invalid(_)
            | OpenStreamError::Version { .. }
            | OpenStreamError::Timeout(_)) => Self::new(Exit::Failed, error).because("STREAM_FAILED"),
        }
    }

    /// An operation that did not end as was asked for. It is what stdout gets.
    pub(crate) fn ended(exit: Exit, text: impl Display, operation: &Operation) -> Self {
        let is_stale = operation.consistency() == CheckpointConsistency::Inconsistent;
        let reason = match (&operation.failure, operation.result()) {
            (Some(failure), _) if !failure.reason.is_empty() => failure.reason.clone(),
            (_, OperationResult::Succeeded) if is_stale => "INCONSISTENT".to_owned(),
            (_, result) => render::short(result.as_str_name(), "OPERATION_RESULT_").to_owned(),
        };
        let mut failure = Self::new(exit, text).because(reason);
        failure.told.device = operation
            .failure
            .as_ref()
            .map(|failed| failed.device.clone())
            .filter(|device| !device.is_empty());
        failure.told.operation = Some(operation.name.clone());
        failure.told.shown = Some(operation.clone());
        failure
    }

    /// An operation that goes on without this program.
    pub(crate) fn goes_on(message: impl Display, name: &impl Display, seen: Option<Operation>) -> Self {
        let mut failure = Self::new(Exit::GoesOn, message);
        failure.told.operation = Some(name.to_string());
        failure.told.shown = seen;
        failure
    }

    /// A migration that is in doubt, and is not waited for any longer.
    pub(crate) fn in_doubt(operation: &Operation) -> Self {
        let (text, hint) = render::in_doubt(operation).unwrap_or_default();
        let mut failure = Self::new(Exit::NeedsSomebody, format!("{}: {text}", printable(&operation.name)));
        failure = failure.because("IN_DOUBT").about(&operation.name).hint(&hint);
        failure.told.shown = Some(operation.clone());
        failure
    }

    /// The same for this reason.
    pub(crate) fn because(mut self, reason: impl Into<String>) -> Self {
        self.told.reason = Some(reason.into());
        self
    }

    /// The same with another exit code.
    pub(crate) fn exits(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The same, and it is about this operation.
    pub(crate) fn about(mut self, operation: &impl Display) -> Self {
        self.told.operation = Some(operation.to_string());
        self
    }

    /// The same, and stdout has its result already.
    pub(crate) fn printed(mut self) -> Self {
        self.told.shown = None;
        self
    }

    /// The same, and what to do.
    pub(crate) fn hint(mut self, hint: &str) -> Self {
        self.told.message.get_or_insert_with(|| self.message.clone());
        self.message = format!("{}\n  {hint}", self.message);
        self.told.hint = Some(hint.to_owned());
        self
    }

    /// The same, and what came before it.
    pub(crate) fn after(mut self, earlier: &Self) -> Self {
        let message = self.told.message.take().unwrap_or_else(|| self.message.clone());
        let before = earlier.told.message.as_ref().unwrap_or(&earlier.message);
        self.told.message = Some(format!("{before}\n{message}"));
        self.message = format!("{}\n{}", earlier.message, self.message);
        self
    }

    /// The same, and one more line.
    pub(crate) fn note(mut self, line: &str) -> Self {
        if let Some(message) = &mut self.told.message {
            message.extend(["\n", line.trim_start()]);
        }
        self.message.extend(["\n", line]);
        self
    }

    /// What happened, and what to do, where that is known.
    pub(crate) fn advice(&self) -> (&str, Option<&str>) {
        (self.told.message.as_ref().unwrap_or(&self.message), self.told.hint.as_deref())
    }

    /// The operation that stdout gets.
    pub(crate) fn shown(&self) -> Option<&Operation> {
        self.told.shown.as_ref()
    }

    /// For programs.
    pub(crate) fn document(&self) -> Document {
        let Told {
            code,
            reason,
            message,
            hint,
            device,
            operation,
            blockers,
            fields,
            retry_after_ms,
            shown: _,
        } = &*self.told;
        Document {
            error: ErrorDoc {
                code: code.map(code_name),
                reason: reason.clone().unwrap_or_else(|| self.exit.reason().to_owned()),
                message: message.as_ref().unwrap_or(&self.message).clone(),
                device: device.clone(),
                operation: operation.clone(),
                hint: hint.clone(),
                blockers: blockers.clone(),
                fields: fields.clone(),
                retry_after_ms: *retry_after_ms,
                exit_code: self.exit.code(),
            },
        }
    }
}

/// The reason of a call that something is in the way of.
const BLOCKED: &str = "BLOCKED";

/// What to do about a refusal whose message does not say it, because it depends on who asked.
fn hint_of(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "TICKET_INVALID" => "call `vfioctl migrate` again: it asks the destination for another ticket",
        "TICKET_MISMATCH" => {
            "call `vfioctl migrate` again; if that does not help, see that --endpoint is the agent that has the devices: \
             behind one address there may be several"
        }
        "NOT_A_MIGRATION" => {
            "see what it is with `vfioctl operations get`: commit and resolve are said to the source, ready to the \
             destination"
        }
        "NOT_ASKED_FOR" => {
            "this is said where the migration was begun with --commit manual or --require-ready"
        }
        "NOT_PREPARED" => "follow it with `vfioctl operations watch`, which says when it is time",
        "STALE_EPOCH" => {
            "a newer copy of the device was there: see which node has it before anything is run again"
        }
        "NOT_IN_DOUBT" => "there is nothing to decide: see it with `vfioctl operations get`",
        "UNRESOLVABLE" => "see both sides, and what can be decided: vfioctl operations resolve OPERATION",
        _ => return None,
    })
}

/// Why there is no connection, as a name.
fn reason_of(error: &ConnectError) -> &'static str {
    match error {
        ConnectError::BadEndpoint { .. } => "BAD_ENDPOINT",
        ConnectError::UnknownHost { .. } => "UNKNOWN_HOST",
        ConnectError::Refused { .. } => "CONNECTION_REFUSED",
        ConnectError::Unreachable { .. } => "HOST_UNREACHABLE",
        ConnectError::Handshake { .. } if error.is_about_the_caller() => "CERTIFICATE_REFUSED",
        ConnectError::Handshake { .. } => "TLS_FAILED",
        ConnectError::Closed { .. } => "CONNECTION_CLOSED",
        ConnectError::Timeout { .. } => "CONNECT_TIMEOUT",
        ConnectError::Http2 { .. } => "NO_HTTP2",
    }
}

fn exit_of(code: Code) -> Exit {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented => Exit::Refused,
        Code::PermissionDenied | Code::Unauthenticated | Code::Unavailable | Code::DeadlineExceeded => {
            Exit::Unreachable
        }
        Code::Ok | Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vfio_checkpoint_client::call::Violation;
    use vfio_checkpoint_proto::v1::ErrorReason;

    use super::*;

    #[test]
    fn codes_tell_a_refusal_from_an_agent_that_is_not_there() {
        assert_eq!(exit_of(Code::FailedPrecondition), Exit::Refused);
        assert_eq!(exit_of(Code::PermissionDenied), Exit::Unreachable);
        assert_eq!(exit_of(Code::Unavailable), Exit::Unreachable);
        assert_eq!(exit_of(Code::Internal), Exit::Failed);
    }

    #[test]
    fn what_is_in_the_way_is_a_refusal_also_where_it_may_pass() {
        let refused = |reason: &str| {
            Failure::call(CallError::Refused(Box::new(Refusal {
                rpc: "StartSave",
                code: Code::Unavailable,
                message: "nothing was touched: operations/1 has it".to_owned(),
                reason: Some(reason.to_owned()),
                blockers: Vec::new(),
                fields: Vec::new(),
                retry_after: None,
                has_bad_details: false,
            })))
        };
        assert_eq!(refused(BLOCKED).exit, Exit::Refused);
        assert_eq!(refused("SHUTTING_DOWN").exit, Exit::Unreachable);
    }

    #[test]
    fn a_refusal_for_programs_has_each_part_in_its_place() {
        let refusal = Refusal {
            rpc: "Restore",
            code: Code::FailedPrecondition,
            message: "nothing was touched: it runs in devices/a".to_owned(),
            reason: Some(BLOCKED.to_owned()),
            blockers: vec![Violation {
                kind: "BLOCKER_REASON_SOURCE_STILL_RUNNING".to_owned(),
                subject: "devices/b".to_owned(),
                description: "it runs in devices/a".to_owned(),
            }],
            fields: Vec::new(),
            retry_after: Some(Duration::from_millis(250)),
            has_bad_details: false,
        };
        let failure = Failure::call(CallError::Refused(Box::new(refusal)));
        insta::assert_snapshot!(render::json(&failure.document()).unwrap(), @r#"
        {
          "error": {
            "code": "FAILED_PRECONDITION",
            "reason": "BLOCKED",
            "message": "Restore: nothing was touched: it runs in devices/a",
            "device": "devices/b",
            "operation": null,
            "hint": "to make a copy of it on purpose give --allow-fork",
            "blockers": [
              {
                "reason": "SOURCE_STILL_RUNNING",
                "device": "devices/b",
                "message": "it runs in devices/a"
              }
            ],
            "fields": [],
            "retry_after_ms": 250,
            "exit_code": 3
          }
        }
        "#);
    }

    #[test]
    fn a_refusal_that_is_for_another_command_says_which() {
        let refused = |reason: &str| {
            Failure::call(CallError::Refused(Box::new(Refusal {
                rpc: "Commit",
                code: Code::FailedPrecondition,
                message: "no".to_owned(),
                reason: Some(reason.to_owned()),
                blockers: Vec::new(),
                fields: Vec::new(),
                retry_after: None,
                has_bad_details: false,
            })))
        };
        for reason in [
            ErrorReason::TicketInvalid,
            ErrorReason::TicketMismatch,
            ErrorReason::NotAMigration,
            ErrorReason::NotAskedFor,
            ErrorReason::NotPrepared,
            ErrorReason::StaleEpoch,
            ErrorReason::NotInDoubt,
            ErrorReason::Unresolvable,
        ] {
            // As it is on the wire, so that a name that is mistyped here shows.
            let name = reason.as_str_name().strip_prefix("ERROR_REASON_").unwrap();
            let document = refused(name).document().error;
            assert!(document.hint.is_some(), "{name}");
            assert_eq!((document.reason.as_str(), document.exit_code), (name, 3));
        }
        assert_eq!(refused("OPERATION_OVER").document().error.hint, None);
    }

    #[test]
    fn every_failure_has_a_reason_and_what_to_do_stands_alone() {
        let address = "127.0.0.1:1".parse().unwrap();
        let connect = Failure::connect(ConnectError::Refused { address }).document().error;
        assert_eq!((connect.code, connect.reason.as_str()), (None, "CONNECTION_REFUSED"));
        assert_eq!(connect.hint.as_deref(), Some("see that the agent runs and listens on this port"));
        assert!(!connect.message.contains("see that"), "{}", connect.message);
        let plain = Failure::usage("no; such option").document().error;
        assert_eq!((plain.reason.as_str(), plain.message.as_str()), ("USAGE", "no; such option"));
        assert_eq!((plain.hint, plain.exit_code), (None, 2));
    }

    #[test]
    fn what_is_added_is_in_the_text_and_in_the_document() {
        let mut lost = Operation { name: "operations/1".to_owned(), ..Operation::default() };
        lost.result = OperationResult::Cancelled.into();
        let first = Failure::new(Exit::Failed, "the stream broke");
        let failure =
            Failure::ended(Exit::NeedsSomebody, "it was cancelled", &lost).after(&first).note("  more");
        assert_eq!(failure.message, "the stream broke\nit was cancelled\n  more");
        assert_eq!(failure.shown(), Some(&lost));
        let doc = failure.document().error;
        assert_eq!(doc.message, "the stream broke\nit was cancelled\nmore");
        assert_eq!((doc.reason.as_str(), doc.operation.as_deref()), ("CANCELLED", Some("operations/1")));
        assert_eq!(doc.exit_code, 4);
    }
}
