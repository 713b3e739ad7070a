//! The protocol of one `StreamState`, both sides, without I/O: a message in, what it means and what to send out.
//!
//! ```text
//!   caller                                             agent
//!   Dialing ------------ Open ----------------------->  opening()
//!           <----------- Opened -----------------------  opened()
//!
//!   GiverSide                                          TakerSide
//!   Giving --- Frame: Chunk, Progress, Seal --------->  Taking      one of them is the caller's,
//!     |   <----------------- Ack ---------------------    |        by StreamOpen.role
//!     |   <----------------- Cutover -----------------    |        a MANUAL save only
//!   Given --- the last Seal ------------------------->  Taken
//!   Complete <-------------- Ack{complete} -----------  Completed
//!
//!   Abort, from either side, ends it at any point after Opened (and may stand for Opened).
//!
//!   Open{resume} ------------------------------------>  resume(): what it expects next, and `complete` again
//!   resume(next) <------------------ Opened{next} ----  a new connection, the same two sides
//! ```
//!
//! Invariants:
//! - Frames go one way, and Ack and Cutover the other. Each message is legal in the phases that the tests list as a
//!   table, and nowhere else.
//! - `complete` is said by the taker after every verified seal, and believed by the giver only after its own last seal
//!   and with an ack of that.
//! - An ack never covers what was not sent, and never less than one before. So does a resumption, which is an ack.
//! - A resumption changes neither side but for that: frames are numbered on, and verified once.
//! - Whoever gave up ignores what was on its way; any other message after the end is an error.
//! - The first error is the end: the phase is Failed, and nothing more is taken or made. Only what has ended before stays
//!   as it ended.
//!
//! Times are data (`StreamLimits`): whoever has the clock enforces them, and gives up with [`TakerSide::abort`] or
//! [`GiverSide::abort`].
//!
//! Failure: [`ProtocolError`].

mod error;
mod giver;
mod handshake;
mod taker;

pub use error::{MessageKind, Phase, ProtocolError};
pub use giver::{GiverEvent, GiverSide};
pub use handshake::{Answer, Dialing, opened, opening};
pub use taker::{ACK_INTERVAL_FRAMES, Resumed, TakerEvent, TakerSide, Took};

use crate::domain::{StreamLimits, StreamOpened};
use crate::ids::StreamId;
use crate::v1;
use crate::v1::stream_message::Kind;

/// What a stream is for. It says who may say what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Job {
    /// A save that stops its devices by itself.
    AutoSave,
    /// A save whose caller says Cutover.
    ManualSave,
    /// A restore.
    Restore,
}

/// What both sides know once a stream is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// The stream.
    pub stream: StreamId,
    /// How many devices the set has.
    pub devices: usize,
    /// What may be sent.
    pub limits: StreamLimits,
    /// What it is for.
    pub job: Job,
}

impl Session {
    /// The session that an answer opens.
    pub fn new(opened: &StreamOpened, job: Job) -> Self {
        let devices = opened.manifest.devices.len();
        Self { stream: opened.stream_id, devices, limits: opened.limits, job }
    }
}

/// The longest reason of an Abort.
pub const MAX_REASON_BYTES: usize = 1024;

/// A reason that is safe to show and to send: at most [`MAX_REASON_BYTES`], on one line. An abort is never refused for
/// its reason.
fn reason(text: &str) -> String {
    let mut end = text.len().min(MAX_REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // A control character is replaced by one byte, so this grows nothing.
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn message(kind: Kind) -> v1::StreamMessage {
    v1::StreamMessage { kind: Some(kind) }
}

fn abort_message(text: &str) -> v1::StreamMessage {
    message(Kind::Abort(v1::StreamAbort { reason: reason(text) }))
}

impl From<v1::StreamMessage> for v1::StreamStateRequest {
    fn from(message: v1::StreamMessage) -> Self {
        Self { message: Some(message) }
    }
}

impl From<v1::StreamMessage> for v1::StreamStateResponse {
    fn from(message: v1::StreamMessage) -> Self {
        Self { message: Some(message) }
    }
}

#[cfg(test)]
mod tests;
