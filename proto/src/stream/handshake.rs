//! Open and Opened. After them each side knows its [`Session`](super::Session), and whether it gives or takes.

use super::error::kind_of;
use super::{MessageKind, Phase, ProtocolError, message, reason};
use crate::domain::{StreamOpen, StreamOpened};
use crate::v1;
use crate::v1::stream_message::Kind;
use crate::version::{NoCommonVersion, Version, VersionRange, negotiate};

/// A caller that has sent Open.
#[derive(Debug)]
pub struct Dialing {
    open: StreamOpen,
}

/// What an agent answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The stream is open.
    Opened(Box<StreamOpened>),
    /// The agent gives it up.
    Aborted {
        /// Why, on one line of at most [`MAX_REASON_BYTES`](super::MAX_REASON_BYTES).
        reason: String,
    },
}

impl Dialing {
    /// The caller's side, and its first message.
    pub fn new(open: StreamOpen) -> (Self, v1::StreamMessage) {
        let first = message(Kind::Open(open.clone().into()));
        (Self { open }, first)
    }

    /// The first message from the agent.
    pub fn answered(self, message: v1::StreamMessage) -> Result<Answer, ProtocolError> {
        let phase = Phase::AwaitingOpened;
        let kind = kind_of(message, phase)?;
        let unexpected = |kind| ProtocolError::Unexpected { kind, phase, allowed: "Opened or Abort" };
        match kind {
            Kind::Opened(opened) => self.opened(opened).map(|opened| Answer::Opened(Box::new(opened))),
            Kind::Abort(abort) => Ok(Answer::Aborted { reason: reason(&abort.reason) }),
            Kind::Open(_) | Kind::Frame(_) | Kind::Ack(_) | Kind::Cutover(_) => {
                Err(unexpected(MessageKind::of(&kind)))
            }
        }
    }

    fn opened(self, wire: v1::StreamOpened) -> Result<StreamOpened, ProtocolError> {
        let invalid = |source| ProtocolError::Invalid { kind: MessageKind::Opened, source };
        let opened = StreamOpened::try_from(wire).map_err(invalid)?;
        if !self.open.versions.contains(opened.version) {
            // An agent that took none of the versions that were offered should have refused.
            let theirs = VersionRange::new(opened.version.0, opened.version.0).unwrap_or(VersionRange::OURS);
            return Err(NoCommonVersion { ours: self.open.versions, theirs }.into());
        }
        opened.answers(&self.open).map_err(invalid)?;
        Ok(opened)
    }
}

/// The first message from a caller, and the version to answer with.
pub fn opening(message: v1::StreamMessage) -> Result<(StreamOpen, Version), ProtocolError> {
    let phase = Phase::AwaitingOpen;
    let kind = kind_of(message, phase)?;
    match kind {
        Kind::Open(open) => {
            let open = StreamOpen::try_from(open)
                .map_err(|source| ProtocolError::Invalid { kind: MessageKind::Open, source })?;
            let version = negotiate(VersionRange::OURS, open.versions)?;
            Ok((open, version))
        }
        Kind::Opened(_) | Kind::Frame(_) | Kind::Ack(_) | Kind::Cutover(_) | Kind::Abort(_) => {
            Err(ProtocolError::Unexpected { kind: MessageKind::of(&kind), phase, allowed: "Open" })
        }
    }
}

/// The agent's answer.
pub fn opened(opened: StreamOpened) -> v1::StreamMessage {
    message(Kind::Opened(opened.into()))
}
