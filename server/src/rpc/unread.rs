//! Reasons for requests that no handler sees, because they cannot be read.
//!
//! ```text
//!   gate --> UnreadLayer --> tonic: length, compression, codec --> handler
//!                   ^              | a status of its own             | a Refusal, with its reason
//!                   '-- ErrorInfo -'<--------------------------------'
//! ```
//! tonic answers these itself, with a code and a sentence and no details. A client looks at reasons, so this layer adds
//! the one that the code stands for. Where messages of a stream are refused after it was opened, `bulk` does the same for
//! the end of the answer, which no layer sees.
//!
//! # Invariants
//! - A status that has details is left alone, and so is one of another package: health and reflection are not ours.
//!
//! # Failure paths
//! Two answers do not come through here and stay without details: a deadline that passed, which tonic answers outside of
//! all layers, and whatever ends an HTTP/2 stream or connection.

use std::collections::HashMap;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use futures_util::future::{Either, Map};
use http::{Request, Response};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tower::{Layer, Service};
use vfio_checkpoint_proto::v1::ErrorReason;

use crate::reason::error_info;

/// What the paths of this package's methods begin with.
const OURS: &str = "/vfio.checkpoint.v1.";

/// Adds reasons to statuses that have none.
#[derive(Debug, Clone, Copy, Default)]
pub struct UnreadLayer;

impl<S> Layer<S> for UnreadLayer {
    type Service = Unread<S>;

    fn layer(&self, inner: S) -> Unread<S> {
        Unread { inner }
    }
}

/// A service whose statuses have reasons.
#[derive(Debug, Clone)]
pub struct Unread<S> {
    inner: S,
}

type Answer<B, E> = Result<Response<B>, E>;

impl<S, A, B> Service<Request<A>> for Unread<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Default,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Either<Map<S::Future, fn(Answer<B, S::Error>) -> Answer<B, S::Error>>, S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let is_ours = request.uri().path().starts_with(OURS);
        let answer = self.inner.call(request);
        if is_ours { Either::Left(answer.map(|answer| answer.map(answered))) } else { Either::Right(answer) }
    }
}

/// The same response; with a reason, where it is a status without.
fn answered<B: Default>(response: Response<B>) -> Response<B> {
    match Status::from_header_map(response.headers()) {
        Some(status) if missing(&status).is_some() => explained(status).into_http(),
        Some(_) | None => response,
    }
}

/// The reason that a status should have and has not.
fn missing(status: &Status) -> Option<ErrorReason> {
    reason(status.code()).filter(|_| status.details().is_empty())
}

/// The same status; with a reason, where it has no details and its code stands for one.
pub(super) fn explained(status: Status) -> Status {
    let Some(reason) = missing(&status) else { return status };
    let details = error_info(reason, HashMap::new());
    let metadata = status.metadata().clone();
    Status::with_error_details_and_metadata(status.code(), status.message(), details, metadata)
}

/// What tonic and the codec mean by a code. The others are not theirs.
fn reason(code: Code) -> Option<ErrorReason> {
    match code {
        Code::OutOfRange => Some(ErrorReason::RequestTooLong),
        Code::InvalidArgument | Code::Internal => Some(ErrorReason::RequestUnreadable),
        Code::Unimplemented => Some(ErrorReason::RequestEncoding),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => None,
    }
}
