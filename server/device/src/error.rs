//! What can go wrong between the driver and a device.
//!
//! One enum for every backend, because the driver decides by *what failed and how*, never by who answered:
//! a simulated device answers with the same errno as the kernel would, and the two are compared in tests.
//! Every variant says what was called; the reader adds which device (see [`Identity`](crate::Identity)).

use std::fmt;
use std::io;

use vfio_checkpoint_fsm::{CapabilitiesError, Forbidden, State, UnknownState};

use crate::lane::Hung;
use crate::vfio_user::PeerError;

/// A call on a device, as the driver names it in errors, traces and trajectories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// Open the device, its group or its cdev.
    Open,
    /// Give the device to a container or an iommufd, with an address space to do DMA in.
    Attach,
    /// Ask which features the device has.
    Probe,
    /// `VFIO_DEVICE_FEATURE` GET `MIG_DEVICE_STATE`.
    GetState,
    /// `VFIO_DEVICE_FEATURE` SET `MIG_DEVICE_STATE` to this state.
    SetState(State),
    /// `read` on the data fd.
    Read,
    /// `write` on the data fd.
    Write,
    /// `VFIO_MIG_GET_PRECOPY_INFO` on the data fd.
    PrecopyInfo,
    /// `VFIO_DEVICE_FEATURE` GET `MIG_DATA_SIZE`.
    DataSize,
    /// `VFIO_DEVICE_RESET`.
    Reset,
    /// `VFIO_DEVICE_FEATURE` SET `DMA_LOGGING_START`.
    DmaLogStart,
    /// `VFIO_DEVICE_FEATURE` GET `DMA_LOGGING_REPORT`.
    DmaLogReport,
    /// `VFIO_DEVICE_FEATURE` SET `DMA_LOGGING_STOP`.
    DmaLogStop,
    /// Read the PCI configuration space.
    ConfigRead,
    /// Write the PCI configuration space.
    ConfigWrite,
    /// `VFIO_DEVICE_SET_IRQS`.
    SetIrqs,
    /// Map memory for DMA.
    MapDma,
    /// Take a DMA mapping away.
    UnmapDma,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Open => "opening the device",
            Self::Attach => "attaching the device to an address space",
            Self::Probe => "asking for the device's features",
            Self::GetState => "reading the migration state",
            Self::SetState(state) => return write!(f, "moving the device to {state}"),
            Self::Read => "reading device state",
            Self::Write => "writing device state",
            Self::PrecopyInfo => "asking how much is left to pre-copy",
            Self::DataSize => "asking for the size of the device state",
            Self::Reset => "resetting the device",
            Self::DmaLogStart => "starting the DMA log",
            Self::DmaLogReport => "reading the DMA log",
            Self::DmaLogStop => "stopping the DMA log",
            Self::ConfigRead => "reading PCI configuration space",
            Self::ConfigWrite => "writing PCI configuration space",
            Self::SetIrqs => "arming interrupts",
            Self::MapDma => "mapping memory for DMA",
            Self::UnmapDma => "unmapping memory from DMA",
        };
        f.write_str(text)
    }
}

/// Why a call on a device failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device, or the kernel for it, refused with an errno.
    #[error("{call} failed")]
    Os {
        /// What was asked.
        call: Call,
        /// The errno it answered.
        #[source]
        source: io::Error,
    },
    /// The state machine forbids the move; the device was not asked.
    #[error("the device was not asked to move to {target}")]
    Forbidden {
        /// Where it should have gone.
        target: State,
        /// Why no walk leads there.
        #[source]
        source: Forbidden,
    },
    /// The device reports a state number that the migration protocol does not have.
    #[error("the device reports a state that migration v2 does not have")]
    UnknownState(#[from] UnknownState),
    /// The device's migration flags are not a set that migration v2 allows.
    #[error("the device's migration flags are unusable")]
    Capabilities(#[from] CapabilitiesError),
    /// The device has no such feature; [`DeviceCapabilities`](crate::DeviceCapabilities) said so.
    #[error("{call}: this device has no such feature")]
    Absent {
        /// What was asked.
        call: Call,
    },
    /// The device moved as asked, but gave no data stream, or one where none is due.
    #[error("after {call} a data stream was {}", if *.expected { "due and none came" } else { "not due and one came" })]
    Stream {
        /// The move after which it was looked for.
        call: Call,
        /// Whether the state machine says that one is due.
        expected: bool,
    },
    /// The device answered success but stands somewhere else.
    #[error("the device said it moved to {asked} but stands in {found}")]
    Elsewhere {
        /// The state that was asked for.
        asked: State,
        /// The state that was read back.
        found: State,
    },
    /// The device is not where the last step of its session left it: somebody else moved or reset it, or it fell into
    /// ERROR. Nothing was called.
    #[error("the device stands in {found}, where no step of its session left it")]
    Displaced {
        /// Where it stands.
        found: State,
    },
    /// An argument that no device could accept. Nothing was called.
    #[error("{call}: {reason}")]
    Argument {
        /// What would have been asked.
        call: Call,
        /// What is wrong with the argument and what it may be.
        reason: String,
    },
    /// The device is not in RUNNING, so an operation cannot start on it. Nothing was called.
    #[error("the device is in {found}, not in RUNNING; recover or reset it first")]
    LeftOver {
        /// Where it stands.
        found: State,
    },
    /// Another operation is under way on the device. Nothing was called.
    #[error("{call}: another operation is under way on this device")]
    Engaged {
        /// What would have been asked.
        call: Call,
    },
    /// The session is over or belongs to another device. Nothing was called.
    #[error("{call}: this session is over or belongs to another device")]
    ForeignSession {
        /// What would have been asked.
        call: Call,
    },
    /// The device is quarantined. Nothing was called.
    #[error("{call}: the device is quarantined; reset it, or reinstate it once it is known to be sound")]
    Quarantined {
        /// What would have been asked.
        call: Call,
    },
    /// A save was to be finished before its stream was read to the end.
    #[error("the device's state was not read to its end")]
    Undrained,
    /// A chunk came out of its place: a gap, a duplicate, or one of another stream.
    #[error("a chunk for offset {offset} came where offset {expected} was due, or belongs to another stream")]
    Misplaced {
        /// Offset of the chunk.
        offset: u64,
        /// Bytes written so far.
        expected: u64,
    },
    /// The seal does not cover what was written: another length, or another stream.
    #[error(
        "the seal covers {sealed} bytes of a stream of which {written} were written, or of another stream"
    )]
    Uncovered {
        /// Length under the seal.
        sealed: u64,
        /// Bytes written to the device.
        written: u64,
    },
    /// An earlier write of this session failed; whatever the device says now, its state is not whole.
    #[error("an earlier write of this session failed")]
    Poisoned,
    /// The operation was given up, for a reason that is not this device's.
    #[error("the operation was given up: {reason}")]
    GivenUp {
        /// Why.
        reason: String,
    },
    /// The process that serves the device broke the protocol. What it did with the call is not known.
    #[error("{call}: the process that serves the device broke the protocol")]
    Peer {
        /// What was asked.
        call: Call,
        /// How it did.
        #[source]
        source: Box<PeerError>,
    },
    /// The connection to the process that serves the device is lost, and with it all knowledge of the device's state.
    #[error("{call}: the connection to the process that serves the device is lost")]
    Disconnected {
        /// What was asked.
        call: Call,
        /// How it went: ECONNRESET or EPIPE where the process is gone, ETIMEDOUT where it is late, ENOTCONN for every
        /// call after that.
        #[source]
        source: io::Error,
    },
    /// The device was given up: a call did not return in time, or died.
    #[error(transparent)]
    Hung(#[from] Hung),
}

impl DeviceError {
    /// An errno answered by `call`.
    pub fn os(call: Call, source: io::Error) -> Self {
        Self::Os { call, source }
    }

    /// The errno `errno` (for example `libc::EINVAL`) answered by `call`.
    pub fn errno(call: Call, errno: i32) -> Self {
        Self::Os { call, source: io::Error::from_raw_os_error(errno) }
    }

    /// The errno, where the device answered one, or the connection to it was lost with one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Os { source, .. } | Self::Disconnected { source, .. } => source.raw_os_error(),
            Self::Forbidden { .. }
            | Self::UnknownState(_)
            | Self::Capabilities(_)
            | Self::Absent { .. }
            | Self::Stream { .. }
            | Self::Elsewhere { .. }
            | Self::Argument { .. }
            | Self::LeftOver { .. }
            | Self::Engaged { .. }
            | Self::ForeignSession { .. }
            | Self::Quarantined { .. }
            | Self::Undrained
            | Self::Misplaced { .. }
            | Self::Uncovered { .. }
            | Self::Poisoned
            | Self::GivenUp { .. }
            | Self::Displaced { .. }
            | Self::Peer { .. }
            | Self::Hung(_) => None,
        }
    }
}

/// An error and all of its causes in one line, for people: `what: why: why`. A cause that is told already is not told
/// twice: many errors have theirs in their own text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        #[source]
        below: Option<Box<Layer>>,
    }

    #[test]
    fn a_cause_is_told_once() {
        let disk = Layer { text: "no space left", below: None };
        let quoting = Layer { text: "cannot write: no space left", below: Some(Box::new(disk)) };
        let top = Layer { text: "the save failed", below: Some(Box::new(quoting)) };
        assert_eq!(chain(&top), "the save failed: cannot write: no space left");
    }
}
