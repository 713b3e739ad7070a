//! Reasons for requests that no handler sees, because they cannot be read.
//!
//! ```text
//!   gate --> UnreadLayer --> tonic: length, compression, codec --> handler
//!                   ^              | a status of its own             | a Refusal, with its reason
//!                   '-- ErrorInfo -'<--------------------------------'
//! ```
//! tonic answers these itself, with a code and a sentence and no details. A client looks at reasons, so this layer adds
//! the one that the code stands for.
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
        if is_ours { Either::Left(answer.map(|answer| answer.map(explained))) } else { Either::Right(answer) }
    }
}

/// The same response; with a reason, where it is a status without.
fn explained<B: Default>(response: Response<B>) -> Response<B> {
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    let Some(reason) = reason(status.code()).filter(|_| status.details().is_empty()) else { return response };
    let details = error_info(reason, HashMap::new());
    let metadata = status.metadata().clone();
    Status::with_error_details_and_metadata(status.code(), status.message(), details, metadata).into_http()
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
