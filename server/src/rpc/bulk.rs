//! `StreamState` without tonic's encoder and decoder, which copy each chunk.
//!
//! ```text
//!   layers --> Bulk --StreamState--> Checkpoints::stream, body in and body out
//!                |------- all else --> CheckpointServiceServer
//! ```
//! Invariants: whoever calls has come through the same layers, and sees the same statuses.
//!
//! Failure paths: a status with its reason, before the stream is open; after that what `transfer::Incoming` says of the
//! caller's messages, with the reason that it has for any other method.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, header};
use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataValue;
use tonic::server::NamedService;
use tower::Service;
use vfio_checkpoint_client::transfer::{Incoming, Outgoing, Refused};

use super::Checkpoints;
use super::unread::explained;

/// The path of the method.
const STREAM_STATE: &str = "/vfio.checkpoint.v1.CheckpointService/StreamState";
/// How a caller says that it compresses.
const ENCODING: &str = "grpc-encoding";
/// How it learns what is taken.
const ACCEPTED: &str = "grpc-accept-encoding";

/// The service of `inner`, but for one method of it.
#[derive(Debug, Clone)]
pub struct Bulk<S> {
    inner: S,
    checkpoints: Checkpoints,
}

impl<S> Bulk<S> {
    /// Takes `StreamState` from `inner`.
    pub fn new(inner: S, checkpoints: Checkpoints) -> Self {
        Self { inner, checkpoints }
    }
}

impl<S: NamedService> NamedService for Bulk<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Bulk<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path() == STREAM_STATE {
            let checkpoints = self.checkpoints.clone();
            Box::pin(async move { Ok(stream(&checkpoints, request).await.unwrap_or_else(Status::into_http)) })
        } else {
            Box::pin(self.inner.call(request))
        }
    }
}

async fn stream(checkpoints: &Checkpoints, request: Request<Body>) -> Result<Response<Body>, Status> {
    let (parts, body) = request.into_parts();
    if let Some(encoding) = parts.headers.get_all(ENCODING).iter().find(|encoding| *encoding != "identity") {
        let message = format!("{ENCODING} {encoding:?} is not taken; send without compression");
        let mut status = Status::unimplemented(message);
        status.metadata_mut().insert(ACCEPTED, MetadataValue::from_static("identity"));
        return Err(status);
    }
    let refused = Refused::default();
    let incoming = Incoming::request(body, Arc::clone(&refused));
    let queue = checkpoints.stream(&parts.extensions, incoming).await?;
    let mut response = Response::new(Outgoing::response(queue, refused, explained));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}
