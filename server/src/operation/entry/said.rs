//! Why an operation is undone, and why something cannot be said to it.

use std::fmt;
use std::time::Duration;

use super::Phase;

/// Why an operation is undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancel {
    /// Somebody asked.
    Requested {
        /// Who.
        by: String,
    },
    /// No stream was opened in time.
    NoStream {
        /// How long it was waited for.
        after: Duration,
    },
    /// The agent ends.
    ShuttingDown,
}

impl fmt::Display for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested { by } => write!(f, "{by} asked for it"),
            Self::NoStream { after } => {
                write!(f, "nobody opened its stream within {}", humantime::format_duration(*after))
            }
            Self::ShuttingDown => f.write_str("the agent is shutting down"),
        }
    }
}

/// Why something cannot be said to an operation now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is over.
    #[error("it is over")]
    Over,
    /// It is past the point at which it can be undone.
    #[error("it is past its point of no return, in phase {phase:?}; wait for it to end")]
    PastNoReturn {
        /// Where it is.
        phase: Phase,
    },
    /// It is being undone.
    #[error("it is being undone")]
    Undone,
    /// It decides by itself.
    #[error("it was started with AUTO cutover, so it decides by itself when to stop the devices")]
    NotManual,
    /// It has no hold.
    #[error("it was started without a hold, so there is nothing to resume")]
    NoHold,
    /// It is not held yet.
    #[error("it is not held yet, it is in phase {phase:?}; watch it until it is HELD")]
    NotHeld {
        /// Where it is.
        phase: Phase,
    },
    /// Its stream is open, or was.
    #[error("its stream is open already, or was; start another operation")]
    StreamTaken,
    /// It has none.
    #[error("its state goes to a store, or comes from one, so it has no stream; watch the operation instead")]
    NoStream,
}
