//! How a body ends, and what is made of it.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::Frame;
use tokio_stream::StreamExt as _;
use tonic::body::Body;
use tonic::{Code, Status};

use super::super::body::{Incoming, Refused};

/// A body of one piece that says whether it has ended in good order.
struct Piece {
    piece: Option<Bytes>,
    is_whole: bool,
}

impl http_body::Body for Piece {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.piece.take().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_whole && self.piece.is_none()
    }
}

async fn end_of(piece: &'static [u8], is_whole: bool) -> Option<Status> {
    let body = Body::new(Piece { piece: Some(Bytes::from_static(piece)), is_whole });
    let refused = Refused::default();
    let mut messages = Incoming::request(body, refused.clone());
    let end = loop {
        match messages.next().await {
            Some(Ok(_)) => {}
            Some(Err(status)) => break Some(status),
            None => break None,
        }
    };
    assert!(is_whole || refused.get().is_none(), "a connection that broke is no caller's fault");
    end
}

#[tokio::test]
async fn a_connection_that_ends_is_no_end_of_the_messages() {
    const EMPTY: &[u8] = &[0; 5];
    assert!(end_of(EMPTY, true).await.is_none());
    assert_eq!(end_of(EMPTY, false).await.unwrap().code(), Code::Unavailable);
    // Within a message: its sender's fault only where it ended it so.
    assert_eq!(end_of(&EMPTY[..3], true).await.unwrap().code(), Code::InvalidArgument);
    assert_eq!(end_of(&EMPTY[..3], false).await.unwrap().code(), Code::Unavailable);
}
