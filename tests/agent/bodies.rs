//! What a caller's body says to `StreamState` besides messages, and how the answer ends then.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, header};
use http_body::Frame;
use prost::Message as _;
use tokio_stream::StreamExt as _;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tower::ServiceExt as _;
use vfio_checkpoint_client::transfer::Incoming;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::stream_message::Kind;

use crate::flow::{channel, device, done, save_of, soon, start_save};
use crate::lab::{Lab, start};
use crate::streams::open_of;

/// A body of these frames, and no end where the last is to come later.
struct Frames(VecDeque<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}

/// Opens the stream of a save and goes on with `rest`. How the operation failed, and how the answer ended.
async fn saved_with(rest: Vec<Frame<Bytes>>) -> (v1::OperationFailure, Option<Status>) {
    let lab = Lab::new();
    // More than any window: the save is not over before its caller is.
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=64MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let name = start_save(&saver, save_of(&["n0"])).await;
    let open = v1::StreamMessage { kind: Some(Kind::Open(open_of(&name, v1::StreamRole::Taker))) };
    let open = v1::StreamStateRequest { message: Some(open) }.encode_to_vec();
    let mut frames = VecDeque::from([Frame::data(framed(0, &open))]);
    frames.extend(rest);
    let mut request = Request::post("/vfio.checkpoint.v1.CheckpointService/StreamState")
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Body::new(Frames(frames)))
        .unwrap();
    *request.version_mut() = http::Version::HTTP_2;
    let channel = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    let answer = soon(channel.oneshot(request)).await.unwrap();
    let mut messages = Incoming::response(answer).unwrap();
    let mut ended = None;
    while let Some(message) = soon(messages.next()).await {
        ended = message.err();
    }
    let operation = done(&saver, &name).await;
    assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);
    (operation.failure.unwrap(), ended)
}

fn framed(flag: u8, message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).unwrap();
    [&[flag][..], &length.to_be_bytes(), message].concat().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_trailers_are_nobodys_words() {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("13"));
    trailers.insert("grpc-message", HeaderValue::from_static("%1B[2J%0A{\"level\":\"INFO\"}"));
    let (failure, _) = saved_with(vec![Frame::trailers(trailers)]).await;
    assert_eq!(failure.reason, "STREAM_BROKEN");
    assert!(!failure.message.contains(['\u{1b}', '\n']) && !failure.message.contains("INFO"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_ends_the_answer_with_why() {
    let too_long = [&[0][..], &u32::MAX.to_be_bytes()].concat();
    for (what, code, reason) in [
        (framed(0, &[0xff; 9]), Code::InvalidArgument, "REQUEST_UNREADABLE"),
        (framed(1, b"packed"), Code::Unimplemented, "REQUEST_ENCODING"),
        (too_long.into(), Code::OutOfRange, "REQUEST_TOO_LONG"),
        // The body ends within it.
        (Bytes::from_static(&[0, 0, 0]), Code::InvalidArgument, "REQUEST_UNREADABLE"),
    ] {
        let (failure, ended) = saved_with(vec![Frame::data(what.clone())]).await;
        assert_eq!(failure.reason, "STREAM_BROKEN", "{what:?}");
        let ended = ended.unwrap_or_else(|| panic!("{what:?} ended well"));
        assert_eq!(ended.code(), code, "{ended}");
        let info =
            ended.get_details_error_info().unwrap_or_else(|| panic!("{what:?} has no reason: {ended:?}"));
        assert_eq!((info.domain.as_str(), info.reason.as_str()), ("vfio.checkpoint.v1", reason));
        assert!(failure.message.contains(ended.message()), "{failure:?} and {ended}");
    }
}
