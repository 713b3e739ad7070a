//! The eight migration states of a VFIO device, by the kernel's names and numbers.
//!
//! ```text
//!                         may use peer DMA    quiesced          stopped
//!   running               RUNNING             RUNNING_P2P       STOP
//!   running, saving       PRE_COPY            PRE_COPY_P2P
//!   stopped, saving                                             STOP_COPY
//!   stopped, loading                                            RESUMING
//!   failed                ERROR: nothing is promised
//! ```
//!
//! Invariants: numbers and names are those of `enum vfio_device_mig_state`; each predicate is an exhaustive
//! match, so that a state added by a later kernel has to be placed by hand before anything compiles.
//!
//! Failure paths: a number or name from outside that is none of the eight is an error, never a nearest match.
//! The kernel announces that future states may become visible after a failed transition; to this crate such a
//! device is in an unknown state, and an unknown state is not safe to walk from.

use std::fmt;
use std::str::FromStr;

/// A migration state of a VFIO device. The discriminants are the kernel's.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// The device has failed. Only a reset leaves this state, and it lands in [`State::Running`].
    Error = 0,
    /// The device changes neither its own state nor anything outside: no DMA, no interrupts.
    Stop = 1,
    /// Normal operation.
    Running = 2,
    /// Stopped, and the rest of its state can be read from the data fd up to the end of the stream.
    StopCopy = 3,
    /// Stopped, and a new internal state is being written to the data fd.
    Resuming = 4,
    /// Running, but starting no DMA to other devices.
    RunningP2p = 5,
    /// Running, while the state that can already be read goes out over the data fd.
    PreCopy = 6,
    /// [`State::PreCopy`], but starting no DMA to other devices.
    PreCopyP2p = 7,
}

/// The direction of a device's data stream: each state that has a data fd has it for one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// The device's state is read out. One stream serves `PRE_COPY`, `PRE_COPY_P2P` and `STOP_COPY` of one
    /// session.
    Save,
    /// A new state is written in.
    Restore,
}

impl State {
    /// All states, in the order of the kernel's numbers.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The kernel's name of the state, without its prefix.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        }
    }

    /// Whether the device executes, so that what it holds is a *running copy* of a logical device.
    ///
    /// At most one device in the world may answer true for one logical device. `ERROR` answers false although
    /// it promises nothing: whoever has to be certain that a failed device is silent resets or fences it.
    pub const fn is_running(self) -> bool {
        match self {
            Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p => true,
            Self::Error | Self::Stop | Self::StopCopy | Self::Resuming => false,
        }
    }

    /// Whether the state belongs to the saving group, whose members share one data fd.
    pub const fn is_saving(self) -> bool {
        matches!(self.stream(), Some(Stream::Save))
    }

    /// Whether the device may start DMA to its peers, so that stopping one of them now could tear a
    /// transaction.
    ///
    /// `ERROR` answers true: a failed device has promised nothing.
    pub const fn may_dma_to_peers(self) -> bool {
        match self {
            Self::Error | Self::Running | Self::PreCopy => true,
            Self::Stop | Self::StopCopy | Self::Resuming | Self::RunningP2p | Self::PreCopyP2p => false,
        }
    }

    /// The stream that a device in this state has open, if any.
    pub const fn stream(self) -> Option<Stream> {
        match self {
            Self::PreCopy | Self::PreCopyP2p | Self::StopCopy => Some(Stream::Save),
            Self::Resuming => Some(Stream::Restore),
            Self::Error | Self::Stop | Self::Running | Self::RunningP2p => None,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl From<State> for u32 {
    fn from(state: State) -> Self {
        state as Self
    }
}

impl TryFrom<u32> for State {
    type Error = UnknownState;

    fn try_from(number: u32) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|&state| u32::from(state) == number).ok_or(UnknownState(number))
    }
}

impl FromStr for State {
    type Err = UnknownStateName;

    fn from_str(name: &str) -> Result<Self, UnknownStateName> {
        Self::ALL.into_iter().find(|state| state.name() == name).ok_or(UnknownStateName)
    }
}

/// A number that names no migration state known here: a newer kernel, or a peer that does not speak VFIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnknownState(pub u32);

impl fmt::Display for UnknownState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not a migration state known here; treat the device's state as lost", self.0)
    }
}

impl std::error::Error for UnknownState {}

/// A text that is not the name of a migration state. It does not carry the text, which may be long and
/// hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnknownStateName;

impl fmt::Display for UnknownStateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a migration state; the names are")?;
        State::ALL.into_iter().try_for_each(|state| write!(f, " {state}"))
    }
}

impl std::error::Error for UnknownStateName {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_round_trip() {
        for (number, state) in (0..).zip(State::ALL) {
            assert_eq!(u32::from(state), number);
            assert_eq!(State::try_from(number), Ok(state));
            assert_eq!(state.name().parse(), Ok(state));
            assert_eq!(state.to_string(), state.name());
        }
        assert_eq!(State::try_from(8), Err(UnknownState(8)));
        assert_eq!("running".parse::<State>(), Err(UnknownStateName));
        assert_eq!("".parse::<State>(), Err(UnknownStateName));
    }

    #[test]
    fn errors_tell_what_is_wrong() {
        assert_eq!(
            UnknownState(9).to_string(),
            "9 is not a migration state known here; treat the device's state as lost"
        );
        assert_eq!(
            UnknownStateName.to_string(),
            "not a migration state; the names are \
             ERROR STOP RUNNING STOP_COPY RESUMING RUNNING_P2P PRE_COPY PRE_COPY_P2P"
        );
    }
}
