//! The side that takes state: verifies frames, and says how far it is.

use super::error::kind_of;
use super::{Job, MessageKind, Phase, ProtocolError, Session, abort_message, message, reason};
use crate::frame::{Accepted, FrameVerifier};
use crate::v1;
use crate::v1::stream_message::Kind;

/// What a message from the giver means.
#[derive(Debug)]
pub enum TakerEvent {
    /// State, progress or a seal, verified.
    Frame(Accepted),
    /// The giver gave up. The stream is over, and what it brought is not to be run.
    Aborted {
        /// Why, on one line of at most [`MAX_REASON_BYTES`](super::MAX_REASON_BYTES).
        reason: String,
    },
    /// This side gave up before, and the message was on its way.
    Ignored,
}

/// What was taken, and what to send.
#[derive(Debug)]
pub struct Took {
    /// What the message means.
    pub event: TakerEvent,
    /// An ack that is due.
    pub reply: Option<v1::StreamMessage>,
}

/// Where a stream goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Resumed {
    /// What is expected next: for the answer to Open.
    pub next_sequence: u64,
    /// What is to be said once more after that answer: `complete`, which the giver may not have heard.
    pub again: Option<v1::StreamMessage>,
}

/// An Ack comes after at most this many frames, so that whoever keeps frames for their resumption knows how many. They
/// may be short, or carry no state.
pub const ACK_INTERVAL_FRAMES: u64 = 1024;

/// The side that takes state.
#[derive(Debug)]
pub struct TakerSide {
    verifier: FrameVerifier,
    job: Job,
    phase: Phase,
    ack_interval_bytes: u64,
    unacked_bytes: u64,
    unacked_frames: u64,
}

impl TakerSide {
    /// The taker of an open stream.
    pub fn new(session: &Session) -> Self {
        let verifier = FrameVerifier::new(session.stream, session.devices, &session.limits);
        let mut side = Self {
            verifier,
            job: session.job,
            phase: Phase::Taking,
            ack_interval_bytes: session.limits.ack_interval_bytes,
            unacked_bytes: 0,
            unacked_frames: 0,
        };
        side.note_seals();
        side
    }

    /// A message from the giver.
    pub fn receive(&mut self, message: v1::StreamMessage) -> Result<Took, ProtocolError> {
        match self.heard(message) {
            Ok(took) => Ok(took),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// All state is durable here: the message that says so. Only after every seal.
    pub fn complete(&mut self) -> Result<v1::StreamMessage, ProtocolError> {
        match self.phase {
            Phase::Taken => {
                self.phase = Phase::Complete;
                Ok(self.ack(true))
            }
            phase @ (Phase::Taking
            | Phase::Complete
            | Phase::Aborted
            | Phase::Abandoned
            | Phase::Failed
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Giving
            | Phase::Given) => Err(ProtocolError::NotNow { call: "completing", phase }),
        }
    }

    /// The stream goes on over a new connection: what its giver is to be told first. What is still on its way on the old
    /// one is not to be handed in any more.
    pub fn resume(&mut self) -> Result<Resumed, ProtocolError> {
        let next_sequence = self.verifier.next_sequence();
        let again = match self.phase {
            Phase::Taking | Phase::Taken => None,
            Phase::Complete => Some(self.ack(true)),
            phase @ (Phase::Aborted
            | Phase::Abandoned
            | Phase::Failed
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Giving
            | Phase::Given) => return Err(ProtocolError::NotNow { call: "resuming", phase }),
        };
        // The answer to Open is an Ack.
        (self.unacked_bytes, self.unacked_frames) = (0, 0);
        Ok(Resumed { next_sequence, again })
    }

    /// Says what was taken before that is due, where there is state among it that was not acknowledged.
    pub fn acknowledge(&mut self) -> Option<v1::StreamMessage> {
        (self.unacked_bytes > 0).then(|| self.ack(false))
    }

    /// Whether state was taken that is not acknowledged.
    pub fn is_unacked(&self) -> bool {
        self.unacked_bytes > 0
    }

    /// The message that asks for the devices to be stopped. It may be sent again.
    pub fn cutover(&self) -> Result<v1::StreamMessage, ProtocolError> {
        match (self.job, self.phase) {
            (Job::AutoSave | Job::Restore, _) => Err(ProtocolError::CutoverNotManual),
            (Job::ManualSave, Phase::Taking) => Ok(message(Kind::Cutover(v1::StreamCutover {}))),
            (
                Job::ManualSave,
                phase @ (Phase::Taken
                | Phase::Complete
                | Phase::Aborted
                | Phase::Abandoned
                | Phase::Failed
                | Phase::AwaitingOpen
                | Phase::AwaitingOpened
                | Phase::Giving
                | Phase::Given),
            ) => Err(ProtocolError::NotNow { call: "asking for cutover", phase }),
        }
    }

    /// Gives up. None where the stream is over already, and nothing is to be sent.
    pub fn abort(&mut self, why: &str) -> Option<v1::StreamMessage> {
        match self.phase {
            Phase::Complete | Phase::Aborted | Phase::Abandoned => None,
            Phase::Failed
            | Phase::Taking
            | Phase::Taken
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Giving
            | Phase::Given => {
                self.phase = Phase::Abandoned;
                Some(abort_message(why))
            }
        }
    }

    /// The giver will send nothing more. Fine once the stream is over, however it ended ([`Self::phase`] says how). An
    /// error before: then state is missing, or nobody
    /// will hear that it was taken.
    pub fn closed(&self) -> Result<(), ProtocolError> {
        match self.phase {
            Phase::Complete | Phase::Aborted | Phase::Abandoned => Ok(()),
            Phase::Failed => Err(ProtocolError::AlreadyFailed),
            Phase::Taking => self.verifier.finish().map_err(Into::into),
            phase @ (Phase::Taken
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Giving
            | Phase::Given) => Err(ProtocolError::Unfinished { phase }),
        }
    }

    /// Where this side is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How many frames were taken.
    pub fn next_sequence(&self) -> u64 {
        self.verifier.next_sequence()
    }

    fn heard(&mut self, message: v1::StreamMessage) -> Result<Took, ProtocolError> {
        let phase = self.phase;
        match phase {
            Phase::Abandoned => return Ok(Took { event: TakerEvent::Ignored, reply: None }),
            Phase::Failed => return Err(ProtocolError::AlreadyFailed),
            Phase::Taking
            | Phase::Taken
            | Phase::Complete
            | Phase::Aborted
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Giving
            | Phase::Given => {}
        }
        let kind = kind_of(message, phase)?;
        let allowed = if phase == Phase::Aborted { "nothing" } else { "Frame or Abort" };
        match kind {
            // Progress and an Abort may have crossed this side's `complete`; of state nothing can come any more, which
            // the verifier sees to.
            Kind::Frame(frame) if phase != Phase::Aborted => self.frame(frame),
            Kind::Abort(abort) if phase == Phase::Complete => {
                // The taker's word stands; what became of the operation is to be read from the operation.
                Ok(Took { event: TakerEvent::Aborted { reason: reason(&abort.reason) }, reply: None })
            }
            Kind::Abort(abort) if phase != Phase::Aborted => {
                self.phase = Phase::Aborted;
                Ok(Took { event: TakerEvent::Aborted { reason: reason(&abort.reason) }, reply: None })
            }
            Kind::Open(_)
            | Kind::Opened(_)
            | Kind::Frame(_)
            | Kind::Ack(_)
            | Kind::Cutover(_)
            | Kind::Abort(_) => {
                Err(ProtocolError::Unexpected { kind: MessageKind::of(&kind), phase, allowed })
            }
        }
    }

    fn frame(&mut self, frame: v1::Frame) -> Result<Took, ProtocolError> {
        let accepted = self.verifier.accept(frame)?;
        if let Accepted::Chunk { chunk, .. } = &accepted {
            self.unacked_bytes = self.unacked_bytes.saturating_add(chunk.bytes().len() as u64);
        }
        self.unacked_frames += 1;
        self.note_seals();
        let due = self.unacked_bytes >= self.ack_interval_bytes || self.unacked_frames >= ACK_INTERVAL_FRAMES;
        let reply = due.then(|| self.ack(false));
        Ok(Took { event: TakerEvent::Frame(accepted), reply })
    }

    fn ack(&mut self, complete: bool) -> v1::StreamMessage {
        self.unacked_bytes = 0;
        self.unacked_frames = 0;
        message(Kind::Ack(v1::StreamAck { next_sequence: self.verifier.next_sequence(), complete }))
    }

    fn note_seals(&mut self) {
        if self.phase == Phase::Taking && self.verifier.all_sealed() {
            self.phase = Phase::Taken;
        }
    }

    fn fail(&mut self, error: ProtocolError) -> ProtocolError {
        self.phase = self.phase.after_error();
        error
    }
}
