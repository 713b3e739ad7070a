//! What can go wrong with the messages of a stream.

use std::fmt;

use crate::domain::Invalid;
use crate::frame::{FrameError, GiveError};
use crate::v1;
use crate::v1::stream_message::Kind;
use crate::version::NoCommonVersion;

/// The kinds of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// The caller's first message.
    Open,
    /// The agent's answer.
    Opened,
    /// State, from the giver.
    Frame,
    /// From the taker.
    Ack,
    /// From the taker of a MANUAL save.
    Cutover,
    /// From either side.
    Abort,
}

impl MessageKind {
    pub(super) fn of(kind: &Kind) -> Self {
        match kind {
            Kind::Open(_) => Self::Open,
            Kind::Opened(_) => Self::Opened,
            Kind::Frame(_) => Self::Frame,
            Kind::Ack(_) => Self::Ack,
            Kind::Cutover(_) => Self::Cutover,
            Kind::Abort(_) => Self::Abort,
        }
    }
}

impl fmt::Display for MessageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where one side of a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// An agent waits for Open.
    AwaitingOpen,
    /// A caller waits for Opened.
    AwaitingOpened,
    /// A giver gives.
    Giving,
    /// A giver has given every seal, and waits for `complete`.
    Given,
    /// A taker takes.
    Taking,
    /// A taker has every verified seal, and has not said `complete`.
    Taken,
    /// The taker said `complete`.
    Complete,
    /// This side gave up.
    Abandoned,
    /// The other side gave up.
    Aborted,
    /// Something was wrong, and nothing more is taken.
    Failed,
}

impl Phase {
    /// Where a side is after an error. What has ended stays as it ended: its outcome was told and acted upon.
    pub(super) fn after_error(self) -> Self {
        match self {
            Self::Complete | Self::Aborted | Self::Abandoned => self,
            Self::AwaitingOpen
            | Self::AwaitingOpened
            | Self::Giving
            | Self::Given
            | Self::Taking
            | Self::Taken
            | Self::Failed => Self::Failed,
        }
    }

    /// What the side does, for the end of a sentence that begins with "this side".
    fn words(self) -> &'static str {
        match self {
            Self::AwaitingOpen => "waits for Open",
            Self::AwaitingOpened => "waits for Opened",
            Self::Giving => "gives state",
            Self::Given => "has given all state and waits for an Ack that says complete",
            Self::Taking => "takes state",
            Self::Taken => "has taken all state",
            Self::Complete => "has seen the stream completed",
            Self::Abandoned => "has given the stream up",
            Self::Aborted => "has been told that the stream was given up",
            Self::Failed => "has refused the stream",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// The stream is over: the other side broke the protocol, or this one was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A message that says nothing that this version knows.
    #[error("a message without a known kind came while this side {phase}; upgrade the older side")]
    Empty {
        /// Where this side is.
        phase: Phase,
    },
    /// A message that is not legal here.
    #[error("{kind} came while this side {phase}, where {allowed} may come")]
    Unexpected {
        /// What came.
        kind: MessageKind,
        /// Where this side is.
        phase: Phase,
        /// What is legal.
        allowed: &'static str,
    },
    /// Cutover on a stream whose caller has no say in it.
    #[error("Cutover came, and this is not a save with MANUAL cutover")]
    CutoverNotManual,
    /// A message that is not what it may be.
    #[error("{kind} is not valid")]
    Invalid {
        /// What came.
        kind: MessageKind,
        /// What is wrong.
        #[source]
        source: Invalid,
    },
    /// The two sides speak different versions.
    #[error("the stream cannot be opened")]
    Version(#[from] NoCommonVersion),
    /// A frame that was refused.
    #[error("the state cannot be taken")]
    Frame(#[from] FrameError),
    /// State that cannot be given.
    #[error("the state cannot be given")]
    Give(#[from] GiveError),
    /// An ack of frames that were never sent.
    #[error("{acked} frames are acknowledged, and {sent} were sent")]
    AckBeyondSent {
        /// What is acknowledged.
        acked: u64,
        /// What was sent.
        sent: u64,
    },
    /// An ack of fewer frames than one before.
    #[error("{acked} frames are acknowledged, and {before} were before")]
    AckWentBack {
        /// What is acknowledged.
        acked: u64,
        /// What was.
        before: u64,
    },
    /// A stream is to go on with a frame that cannot be the next.
    #[error(
        "the stream is to go on with frame {next_sequence}; {acked} were acknowledged and {sent} sent before"
    )]
    ResumeOutOfRange {
        /// What the taker expects next.
        next_sequence: u64,
        /// What was acknowledged.
        acked: u64,
        /// What was sent.
        sent: u64,
    },
    /// `complete` before everything was given, or without an ack of all of it.
    #[error("the taker says that it has all state after {acked} frames; {sent} were sent so far, and {rest}")]
    CompleteTooEarly {
        /// What is acknowledged.
        acked: u64,
        /// What was sent.
        sent: u64,
        /// Whether there is more.
        rest: &'static str,
    },
    /// This side was asked for what is not possible here.
    #[error("{call} is not possible while this side {phase}")]
    NotNow {
        /// What was asked for.
        call: &'static str,
        /// Where this side is.
        phase: Phase,
    },
    /// The other side ended the stream without a word.
    #[error("the other side ended the stream while this side {phase}")]
    Unfinished {
        /// Where this side is.
        phase: Phase,
    },
    /// The stream failed before.
    #[error("the stream failed before, and takes nothing more")]
    AlreadyFailed,
}

/// The kind of a message, or an error where it has none.
pub(super) fn kind_of(message: v1::StreamMessage, phase: Phase) -> Result<Kind, ProtocolError> {
    message.kind.ok_or(ProtocolError::Empty { phase })
}
