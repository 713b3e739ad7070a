//! The messages of a `StreamState` as bodies of HTTP, for the caller and for the agent.
//!
//! ```text
//!   mpsc::Receiver<StreamMessage> --> Outgoing: head, state, head, state … (trailers, from an agent) --> HTTP/2
//!   HTTP/2 --> Incoming: pieces --wire::Assembly--> Result<StreamMessage, Status>
//! ```
//! It is gRPC, and stands where tonic's own encoder and decoder stand for every other method: those copy each chunk once
//! at each end. What `wire` says of copies holds here, too.
//!
//! Invariants: a stream of messages ends with the first error. State is not copied, unless it is short.
//!
//! Failure paths: a status of the peer; a message that is none ([`WireError`]: `OUT_OF_RANGE` where it is too long,
//! `INVALID_ARGUMENT` from a caller, `INTERNAL` from an agent); a connection that breaks, which is told from an end in good
//! order by what HTTP/2 knows of the stream, not by whether there is an error.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::{Code, Status};
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_proto::wire::{Assembly, Encoded, Sender, WireError, encode};

/// Messages that are shorter than this, with their state, share a frame: HTTP/2 counts a flood of tiny frames as an attack.
const SMALL_BYTES: usize = 8 << 10;
/// No more of them than this.
const FRAME_BYTES: usize = 16 << 10;

/// Why a caller's messages were refused, for the end of the answer. Empty where they were not.
pub type Refused = Arc<OnceLock<Status>>;

/// Messages on their way out.
#[derive(Debug)]
pub struct Outgoing {
    queue: mpsc::Receiver<StreamMessage>,
    /// Of the message whose head went before.
    state: Bytes,
    /// What the trailers of an agent's answer depend on, until they are sent.
    end: Option<End>,
}

/// How an agent's answer ends.
#[derive(Debug)]
struct End {
    refused: Refused,
    explained: fn(Status) -> Status,
}

impl Outgoing {
    /// The body of a caller's request. It ends when nobody can queue anything any more.
    pub fn request(queue: mpsc::Receiver<StreamMessage>) -> Body {
        Body::new(Self { queue, state: Bytes::new(), end: None })
    }

    /// The body of an agent's response. It ends with OK, unless the caller's messages were refused: what became of the
    /// operation its messages say, and the operation. `explained` adds to such a refusal what every status of the agent has.
    pub fn response(
        queue: mpsc::Receiver<StreamMessage>,
        refused: Refused,
        explained: fn(Status) -> Status,
    ) -> Body {
        Body::new(Self { queue, state: Bytes::new(), end: Some(End { refused, explained }) })
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if !self.state.is_empty() {
            return Poll::Ready(Some(std::mem::take(&mut self.state)));
        }
        let mut frame = BytesMut::new();
        while frame.len() < FRAME_BYTES {
            match self.queue.poll_recv(cx) {
                Poll::Ready(Some(message)) => {
                    let Encoded { head, state } = encode(message);
                    if state.len() >= SMALL_BYTES {
                        self.state = state;
                        if frame.is_empty() {
                            return Poll::Ready(Some(head));
                        }
                        frame.extend_from_slice(&head);
                        break;
                    }
                    frame.extend_from_slice(&head);
                    frame.extend_from_slice(&state);
                }
                Poll::Ready(None) if frame.is_empty() => return Poll::Ready(None),
                Poll::Pending if frame.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(frame.freeze()))
    }
}

fn trailers(end: &End) -> HeaderMap {
    let refused = end.refused.get().cloned();
    let status = refused.map_or_else(|| Status::new(Code::Ok, ""), end.explained);
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        trailers.insert(Status::GRPC_STATUS, http::HeaderValue::from(i32::from(status.code())));
    }
    trailers
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match ready!(self.poll_bytes(cx)) {
            Some(bytes) => Some(Frame::data(bytes)),
            None => self.end.take().map(|end| Frame::trailers(trailers(&end))),
        };
        Poll::Ready(frame.map(Ok))
    }
}

/// Messages that come in.
#[derive(Debug)]
pub struct Incoming {
    body: Body,
    from: Sender,
    assembly: Assembly,
    refused: Refused,
    is_over: bool,
}

impl Incoming {
    /// Those in the body of a caller's request. Where one is refused, `refused` says why.
    pub fn request(body: Body, refused: Refused) -> Self {
        Self { refused, ..Self::new(body, Sender::Caller) }
    }

    /// Those in an agent's response, if it is one.
    pub fn response(response: http::Response<Body>) -> Result<Self, Status> {
        let (parts, body) = response.into_parts();
        match Status::from_header_map(&parts.headers) {
            Some(status) if status.code() != Code::Ok => Err(status),
            Some(_) => Ok(Self::new(Body::empty(), Sender::Agent)),
            None if parts.status == http::StatusCode::OK => Ok(Self::new(body, Sender::Agent)),
            None => {
                let message = format!("the answer is HTTP {}, and not of an agent", parts.status);
                Err(Status::new(code_of(parts.status), message))
            }
        }
    }

    fn new(body: Body, from: Sender) -> Self {
        Self { body, from, assembly: Assembly::new(from), refused: Refused::default(), is_over: false }
    }

    fn refused(&self, error: &WireError) -> Status {
        let message = error.to_string();
        let status = match (error, self.from) {
            (WireError::TooLong { .. }, _) => Status::out_of_range(message),
            (WireError::Compressed { .. }, _) => Status::unimplemented(message),
            (WireError::Parts(_) | WireError::Unreadable(_) | WireError::CutOff { .. }, Sender::Caller) => {
                Status::invalid_argument(message)
            }
            (WireError::Parts(_) | WireError::Unreadable(_) | WireError::CutOff { .. }, Sender::Agent) => {
                Status::internal(message)
            }
        };
        // There is one end, and this is the first word on it.
        let _ = self.refused.set(status.clone());
        status
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<StreamMessage, Status>>> {
        loop {
            match self.assembly.message() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(self.refused(&error)))),
            }
            let ended = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => {
                        self.assembly.push(piece);
                        continue;
                    }
                    // A caller has no status to give: what it says there is nobody's to believe, or to show.
                    Err(_) if self.from == Sender::Caller => continue,
                    Err(other) => match other.trailers_ref().and_then(Status::from_header_map) {
                        Some(status) if status.code() != Code::Ok => Err(status),
                        Some(_) | None => continue,
                    },
                },
                // A caller that resets its stream has nothing more to say; what that means, the protocol knows.
                Some(Err(status)) if self.from == Sender::Caller && status.code() == Code::Cancelled => {
                    Ok(())
                }
                Some(Err(status)) => Err(status),
                // Hyper tells so of a connection that it gives up for want of an answer to its pings, too.
                None if !self.body.is_end_stream() => {
                    Err(Status::unavailable("the connection ended before the messages did"))
                }
                None => self.assembly.finish().map_err(|error| self.refused(&error)),
            };
            return Poll::Ready(ended.err().map(Err));
        }
    }
}

impl Stream for Incoming {
    type Item = Result<StreamMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let polled = self.poll_message(cx);
        self.is_over = matches!(&polled, Poll::Ready(None | Some(Err(_))));
        polled
    }
}

/// What gRPC takes an answer for that is not its own.
fn code_of(status: http::StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}
