//! The doors: thin handlers that validate, ask the core, and answer.
//!
//! ```text
//!   request --TryFrom--> spec --> core --> message
//!                 \--> Refusal --status--> google.rpc details
//!   no request at all --------unread-----> google.rpc details
//! ```
//! What a handler starts goes on where its caller hangs up: each change is a task of its own. One that must not be made then
//! looks at its [`Asker`] before it is.

mod bulk;
mod checkpoints;
mod devices;
mod messages;
mod migrations;
mod operations;
mod status;
mod stored;
mod unread;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Weak};

use tokio::sync::oneshot;
use tonic::{Code, Extensions, Request, Status};
use tonic_types::StatusExt as _;
use vfio_checkpoint_proto::domain::{Invalid, operation_name};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1::ErrorReason;

pub use bulk::Bulk;
pub use checkpoints::Checkpoints;
pub use devices::Devices;
pub(crate) use messages::phase as wire_phase;
pub use migrations::Migrations;
pub use operations::OperationsService;
pub use status::Refusal;
pub use unread::UnreadLayer;

use crate::core::{Core, Tasks};
use crate::operation::{Entry, Refused};
use crate::reason::error_info;
use crate::security::audit::{self, AuditResult};
use crate::security::authorize::Caller;
use crate::security::roles::Role;

/// Who calls, by the verified certificate. The layer before has put it there.
fn caller(extensions: &Extensions) -> Result<Caller, Status> {
    extensions.get::<Caller>().cloned().ok_or_else(|| {
        let details = error_info(ErrorReason::CertificateRequired, HashMap::new());
        Status::with_error_details(Code::Unauthenticated, "the call has no verified caller", details)
    })
}

/// The spec that a request makes, or the field that is wrong.
fn spec<W, S: TryFrom<W, Error = Invalid>>(wire: W) -> Result<S, Refusal> {
    Ok(S::try_from(wire)?)
}

/// Whether whoever made a call still waits for its answer, for a change that is made for nobody else.
#[derive(Debug)]
pub struct Asker(Weak<()>);

impl Asker {
    /// It waits for as long as the first of the two is kept, which is the handler's.
    fn waiting() -> (Arc<()>, Self) {
        let waits = Arc::new(());
        let asker = Self(Arc::downgrade(&waits));
        (waits, asker)
    }

    /// Whether it has hung up, or has waited for as long as it wanted to.
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Runs a change to its end, also where its caller hangs up meanwhile.
async fn to_its_end<T: Send + 'static>(
    tasks: &Tasks,
    change: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    use tracing::Instrument as _;
    let (tell, told) = oneshot::channel();
    let work = async move {
        // Nobody listens where the call was dropped.
        let _ = tell.send(change.await);
    };
    tasks.spawn(work.in_current_span());
    told.await.unwrap_or(Err(Refusal::Died))
}

/// The longest page in bytes: what every gRPC client takes, with room to spare.
const MAX_PAGE_BYTES: usize = 1 << 20;

/// The first of `items` as messages, at most `size` and as many as a page can hold, but one at least; and whether there
/// are more.
fn page<T, M: prost::Message>(items: &[T], size: usize, message: impl Fn(&T) -> M) -> (Vec<M>, bool) {
    let mut bytes = 0;
    let mut messages = Vec::new();
    for item in items.iter().take(size) {
        let next = message(item);
        bytes += next.encoded_len();
        if bytes > MAX_PAGE_BYTES && !messages.is_empty() {
            break;
        }
        messages.push(next);
    }
    let more = messages.len() < items.len();
    (messages, more)
}

/// An operation, where there is one.
fn entry(core: &Core, name: &OperationName) -> Result<Arc<Entry>, Refusal> {
    core.operations.get(name).ok_or_else(|| Refusal::OperationNotFound(name.clone()))
}

/// An operation that the caller may have a say in: whoever started it, and an admin.
fn own_entry(core: &Core, name: &OperationName, caller: &Caller) -> Result<Arc<Entry>, Refusal> {
    let entry = entry(core, name)?;
    if entry.fixed.caller == caller.identity.to_string() || caller.roles.contains(Role::Admin) {
        Ok(entry)
    } else {
        Err(Refusal::NotYours(name.clone()))
    }
}

/// Says something to an operation on behalf of its caller.
fn say(
    core: &Core,
    caller: &Caller,
    operation: &str,
    say: impl FnOnce(&Entry) -> Result<(), Refused>,
) -> Result<Arc<Entry>, Refusal> {
    let name = operation_name("operation", operation)?;
    let entry = own_entry(core, &name, caller)?;
    say(&entry).map_err(|refused| Refusal::Operation { operation: name, refused })?;
    Ok(entry)
}

/// What a call is to do, for the audit line of what became of it.
#[derive(Debug)]
struct Asked {
    action: &'static str,
    resource: String,
    request_id: Option<String>,
}

impl Asked {
    /// `action` on `resource`, as the caller names it.
    fn new(action: &'static str, resource: impl Into<String>) -> Self {
        Self { action, resource: resource.into(), request_id: None }
    }

    /// The same, by a request that may have an id.
    fn by_request(self, request_id: &str) -> Self {
        Self { request_id: Some(request_id.to_owned()), ..self }
    }
}

/// One line for what the caller made of its authority.
fn audit<T>(caller: &Caller, asked: &Asked, done: &Result<T, Refusal>) {
    audit_stating(caller, asked, "", done);
}

/// The same, with what the caller answers for.
fn audit_stating<T>(caller: &Caller, asked: &Asked, statement: &str, done: &Result<T, Refusal>) {
    let result = match done {
        Ok(_) => AuditResult::Succeeded,
        Err(refusal) => AuditResult::Failed { reason: refusal.reason().as_reason() },
    };
    let Asked { action, resource, request_id } = asked;
    audit::record(caller, action, resource, request_id.as_deref(), statement, result);
}

/// The message of a request with its caller.
fn open<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let caller = caller(request.extensions())?;
    Ok((caller, request.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::page;

    #[test]
    fn a_page_is_bounded_by_its_number_and_by_its_bytes() {
        let long = vec!["x".repeat(400 << 10); 5];
        let count = |size| {
            let (messages, more) = page(&long, size, Clone::clone);
            (messages.len(), more)
        };
        assert_eq!(count(1), (1, true));
        assert_eq!(count(5), (2, true), "two fit into a mebibyte");
        let (huge, more) = page(&["x".repeat(2 << 20)], 10, Clone::clone);
        assert_eq!((huge.len(), more), (1, false), "one at least, or nobody gets past it");
        assert!(!page(&["a".to_owned(), "b".to_owned()], 2, Clone::clone).1);
    }
}
