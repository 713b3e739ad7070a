//! What became of a device's own state when an operation did not go through.
//!
//! There are two answers and no third: either the state that the device held is still in it, or it is not. A
//! reset always means [`Outcome::StateLost`]: it lands in `RUNNING`, and a freshly reset device in `RUNNING`
//! looks exactly like one that never stopped. That is why the difference is a type and not a guess from the
//! device's state.

use std::fmt;

/// What became of the state that a device, or a whole set, held before the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The device holds the state that it held before.
    Preserved,
    /// The device does not hold it any more, or nobody can say that it does.
    StateLost,
}

impl Outcome {
    /// The outcome of a set: preserved only where every device is.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Preserved, Self::Preserved) => Self::Preserved,
            (Self::StateLost, Self::Preserved | Self::StateLost) | (Self::Preserved, Self::StateLost) => {
                Self::StateLost
            }
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Preserved => "PRESERVED",
            Self::StateLost => "STATE_LOST",
        })
    }
}
