//! One hop between two states: what it does to the data stream, and where to go when it fails.
//!
//! ```text
//!   opens a save stream      RUNNING -> PRE_COPY   RUNNING_P2P -> PRE_COPY_P2P   STOP -> STOP_COPY
//!   keeps it                 PRE_COPY <-> PRE_COPY_P2P -> STOP_COPY
//!   opens a restore stream   STOP -> RESUMING
//!   closes either            every arc from a state with a stream to one without
//! ```
//!
//! Invariants: an [`Arc`] can only be made for a pair that is one hop for some capabilities, so code that
//! holds one need not ask again. Every arc has a fallback; none is left to the caller's judgement.
//!
//! Failure paths: after a failed SET the device may be at either end of any arc on its path, or in `ERROR`.
//! Read the state back first; [`crate::recover`] decides from what is found. [`Arc::fallback`] says where an
//! arc leads back to, and the two never disagree.

use std::fmt;

use crate::{Capabilities, Next, State, Stream, next_hop};

/// One hop of the state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arc {
    from: State,
    to: State,
}

impl Arc {
    /// The arc between two states, where a device with these capabilities takes it in one hop.
    pub fn between(capabilities: Capabilities, from: State, to: State) -> Option<Self> {
        match next_hop(capabilities, from, to) {
            Next::Hop(arc) if arc.to == to => Some(arc),
            Next::Hop(_) | Next::NoOp | Next::Forbidden(_) => None,
        }
    }

    /// For the walk only, which has found the pair to be one hop.
    pub(crate) const fn hop(from: State, to: State) -> Self {
        Self { from, to }
    }

    /// Where the arc begins.
    pub const fn from(self) -> State {
        self.from
    }

    /// Where the arc ends.
    pub const fn to(self) -> State {
        self.to
    }

    /// What the arc does to the device's data stream.
    pub const fn stream(self) -> StreamEffect {
        match (self.from.stream(), self.to.stream()) {
            (None, None) => StreamEffect::None,
            (None, Some(Stream::Save)) => StreamEffect::OpensSave,
            (None, Some(Stream::Restore)) => StreamEffect::OpensRestore,
            // Only the saving group has arcs between two states with a stream; its members share one.
            (Some(_), Some(_)) => StreamEffect::Keeps,
            (Some(_), None) => StreamEffect::Closes,
        }
    }

    /// Where to go when the arc fails.
    ///
    /// `RUNNING`, for every arc that leaves the device's own state alone:
    ///
    /// - Quiescing and stopping (`RUNNING -> RUNNING_P2P -> STOP`, or `RUNNING -> STOP`): the workload is
    ///   undisturbed only where the device runs, so a stop that failed is undone, not retried.
    /// - Opening a save stream (`RUNNING -> PRE_COPY`, `RUNNING_P2P -> PRE_COPY_P2P`, `STOP -> STOP_COPY`):
    ///   opening changes nothing about how the device operates, so it can run on; the checkpoint is what
    ///   failed.
    /// - Moving within or leaving a save stream (`PRE_COPY <-> PRE_COPY_P2P -> STOP_COPY`, and each of them
    ///   back to the spine): the stream is void, the device is not.
    /// - Starting (`STOP -> RUNNING_P2P -> RUNNING`, or `STOP -> RUNNING`): towards `RUNNING` is where it was
    ///   going. The fallback is one more attempt from wherever the device landed; there is no safer place
    ///   behind it.
    ///
    /// A reset, for the two arcs on which that state is replaced:
    ///
    /// - `STOP -> RESUMING`: the driver may clear the device's state to make room before it fails.
    /// - `RESUMING -> STOP`: here the driver checks and takes in what was written. What it refuses is half in
    ///   the device, and the kernel lets nothing but a reset abandon it.
    pub const fn fallback(self) -> Fallback {
        match (self.from.stream(), self.to.stream()) {
            (Some(Stream::Restore), _) | (_, Some(Stream::Restore)) => Fallback::Reset,
            (None | Some(Stream::Save), None | Some(Stream::Save)) => Fallback::To(State::Running),
        }
    }
}

impl fmt::Display for Arc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}

/// What an arc does to the device's data stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamEffect {
    /// There is no stream before or after.
    None,
    /// A data fd to read from comes back.
    OpensSave,
    /// A data fd to write to comes back.
    OpensRestore,
    /// The open data fd goes on; no new one comes back.
    Keeps,
    /// The stream is over. Its data fd is the holder's to close.
    Closes,
}

impl StreamEffect {
    /// Whether a new data fd comes back.
    pub const fn opens(self) -> bool {
        match self {
            Self::OpensSave | Self::OpensRestore => true,
            Self::None | Self::Keeps | Self::Closes => false,
        }
    }

    /// Whether the data fd that was open has seen its last byte.
    pub const fn closes(self) -> bool {
        match self {
            Self::Closes => true,
            Self::None | Self::OpensSave | Self::OpensRestore | Self::Keeps => false,
        }
    }
}

impl fmt::Display for StreamEffect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "no stream",
            Self::OpensSave => "opens save",
            Self::OpensRestore => "opens restore",
            Self::Keeps => "keeps",
            Self::Closes => "closes",
        })
    }
}

/// Where to go when an arc fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// Walk to this state from wherever the device landed.
    To(State),
    /// Nothing but a reset helps. Whether it may be done without asking is [`crate::recover`]'s to say.
    Reset,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(state) => write!(f, "to {state}"),
            Self::Reset => f.write_str("reset"),
        }
    }
}
