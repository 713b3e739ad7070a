//! The side that gives state: makes frames, and hears how far the taker is.

use bytes::Bytes;
use vfio_checkpoint_seal::Seal;

use super::error::kind_of;
use super::{Job, MessageKind, Phase, ProtocolError, Session, abort_message, message, reason};
use crate::domain::{ConfigSpaceCapture, Progress};
use crate::frame::Framer;
use crate::v1;
use crate::v1::stream_message::Kind;

/// What a message from the taker means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GiverEvent {
    /// So many frames were taken.
    Acked {
        /// The number of the next frame.
        next_sequence: u64,
    },
    /// The taker has all state, verified and durable. The stream is over.
    Completed,
    /// The devices are to be stopped. It may come more than once, and after they were.
    CutoverRequested,
    /// The taker gave up. The stream is over.
    Aborted {
        /// Why, on one line of at most [`MAX_REASON_BYTES`](super::MAX_REASON_BYTES).
        reason: String,
    },
    /// This side gave up before, and the message was on its way.
    Ignored,
}

/// The side that gives state.
#[derive(Debug)]
pub struct GiverSide {
    framer: Framer,
    job: Job,
    phase: Phase,
    acked: u64,
    /// The number of the frame after the last seal, once there is one.
    sealed: u64,
}

impl GiverSide {
    /// The giver of an open stream.
    pub fn new(session: &Session) -> Self {
        let framer = Framer::new(session.stream, session.devices, &session.limits);
        let mut side = Self { framer, job: session.job, phase: Phase::Giving, acked: 0, sealed: 0 };
        side.note_seals();
        side
    }

    /// The messages for the next state of a device. All of them must be sent, in order.
    pub fn chunk(
        &mut self,
        device: usize,
        state: Bytes,
    ) -> Result<impl Iterator<Item = v1::StreamMessage> + '_, ProtocolError> {
        self.ready("giving state")?;
        match self.framer.chunk(device, state) {
            Ok(frames) => Ok(frames.map(|frame| message(Kind::Frame(frame)))),
            Err(error) => {
                self.phase = Phase::Failed;
                Err(error.into())
            }
        }
    }

    /// The message that says how far this side is.
    pub fn progress(&mut self, progress: Progress) -> Result<v1::StreamMessage, ProtocolError> {
        self.ready("saying how far it is")?;
        Ok(message(Kind::Frame(self.framer.progress(progress))))
    }

    /// The message that ends a device's state, and the seal on it.
    pub fn seal(
        &mut self,
        device: usize,
        config: Option<ConfigSpaceCapture>,
    ) -> Result<(v1::StreamMessage, Seal), ProtocolError> {
        self.ready("sealing")?;
        match self.framer.seal(device, config) {
            Ok((frame, seal)) => {
                self.note_seals();
                Ok((message(Kind::Frame(frame)), seal))
            }
            Err(error) => Err(self.fail(error.into())),
        }
    }

    /// Gives up. None where the stream is over already, and nothing is to be sent.
    pub fn abort(&mut self, why: &str) -> Option<v1::StreamMessage> {
        match self.phase {
            Phase::Complete | Phase::Aborted | Phase::Abandoned => None,
            Phase::Failed
            | Phase::Giving
            | Phase::Given
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Taking
            | Phase::Taken => {
                self.phase = Phase::Abandoned;
                Some(abort_message(why))
            }
        }
    }

    /// The stream goes on over a new connection, on which the taker has said what it expects next. Whatever was made from
    /// there on is to be sent again, as it was. What was on its way on the old connection is not to be handed in any more.
    pub fn resume(&mut self, next_sequence: u64) -> Result<(), ProtocolError> {
        self.ready("resuming")?;
        let (acked, sent) = (self.acked, self.framer.next_sequence());
        if next_sequence < acked || next_sequence > sent {
            return Err(self.fail(ProtocolError::ResumeOutOfRange { next_sequence, acked, sent }));
        }
        self.acked = next_sequence;
        Ok(())
    }

    /// A message from the taker.
    pub fn receive(&mut self, message: v1::StreamMessage) -> Result<GiverEvent, ProtocolError> {
        match self.heard(message) {
            Ok(event) => Ok(event),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// The taker will send nothing more. Fine once the stream is over, however it ended ([`Self::phase`] says how), and an
    /// error before.
    pub fn closed(&self) -> Result<(), ProtocolError> {
        match self.phase {
            Phase::Complete | Phase::Aborted | Phase::Abandoned => Ok(()),
            Phase::Failed => Err(ProtocolError::AlreadyFailed),
            phase @ (Phase::Giving
            | Phase::Given
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Taking
            | Phase::Taken) => Err(ProtocolError::Unfinished { phase }),
        }
    }

    /// Where this side is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How many frames were made.
    pub fn next_sequence(&self) -> u64 {
        self.framer.next_sequence()
    }

    /// How many frames the taker has acknowledged.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    fn heard(&mut self, message: v1::StreamMessage) -> Result<GiverEvent, ProtocolError> {
        let phase = self.phase;
        match phase {
            Phase::Abandoned => return Ok(GiverEvent::Ignored),
            Phase::Failed => return Err(ProtocolError::AlreadyFailed),
            Phase::Giving
            | Phase::Given
            | Phase::Complete
            | Phase::Aborted
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Taking
            | Phase::Taken => {}
        }
        let kind = kind_of(message, phase)?;
        if matches!(phase, Phase::Complete | Phase::Aborted) {
            return Err(ProtocolError::Unexpected {
                kind: MessageKind::of(&kind),
                phase,
                allowed: "nothing",
            });
        }
        match kind {
            Kind::Ack(ack) => self.ack(ack),
            Kind::Cutover(v1::StreamCutover {}) => match self.job {
                Job::ManualSave => Ok(GiverEvent::CutoverRequested),
                Job::AutoSave | Job::Restore => Err(ProtocolError::CutoverNotManual),
            },
            Kind::Abort(abort) => {
                self.phase = Phase::Aborted;
                Ok(GiverEvent::Aborted { reason: reason(&abort.reason) })
            }
            Kind::Open(_) | Kind::Opened(_) | Kind::Frame(_) => Err(ProtocolError::Unexpected {
                kind: MessageKind::of(&kind),
                phase,
                allowed: "Ack, Cutover or Abort",
            }),
        }
    }

    fn ack(&mut self, ack: v1::StreamAck) -> Result<GiverEvent, ProtocolError> {
        let (acked, sent) = (ack.next_sequence, self.framer.next_sequence());
        if acked > sent {
            return Err(ProtocolError::AckBeyondSent { acked, sent });
        }
        if acked < self.acked {
            return Err(ProtocolError::AckWentBack { acked, before: self.acked });
        }
        if ack.complete {
            if self.phase != Phase::Given {
                return Err(ProtocolError::CompleteTooEarly {
                    acked,
                    sent,
                    rest: "not all devices are sealed",
                });
            }
            // Progress that was told after the last seal may have crossed it.
            if acked < self.sealed {
                return Err(ProtocolError::CompleteTooEarly {
                    acked,
                    sent,
                    rest: "seals are among those left",
                });
            }
            self.phase = Phase::Complete;
        }
        self.acked = acked;
        Ok(if ack.complete { GiverEvent::Completed } else { GiverEvent::Acked { next_sequence: acked } })
    }

    /// Frames are made before the end only. After the last seal progress may still be told.
    fn ready(&self, call: &'static str) -> Result<(), ProtocolError> {
        match self.phase {
            Phase::Giving | Phase::Given => Ok(()),
            phase @ (Phase::Complete
            | Phase::Aborted
            | Phase::Abandoned
            | Phase::Failed
            | Phase::AwaitingOpen
            | Phase::AwaitingOpened
            | Phase::Taking
            | Phase::Taken) => Err(ProtocolError::NotNow { call, phase }),
        }
    }

    fn note_seals(&mut self) {
        if self.framer.all_sealed() {
            self.sealed = self.framer.next_sequence();
            self.phase = Phase::Given;
        }
    }

    fn fail(&mut self, error: ProtocolError) -> ProtocolError {
        self.phase = self.phase.after_error();
        error
    }
}
