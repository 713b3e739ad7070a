//! What the migration support of a device covers, and which states it therefore has.
//!
//! ```text
//!   STOP_COPY (mandatory)        ERROR  STOP  RUNNING  STOP_COPY  RESUMING
//!   + P2P                        RUNNING_P2P
//!   + PRE_COPY                   PRE_COPY
//!   + P2P and PRE_COPY           PRE_COPY_P2P
//! ```
//!
//! Invariants: `STOP_COPY` is implied by the existence of a [`Capabilities`]; a device without it cannot
//! migrate and is refused where its flags are read.
//!
//! Failure paths: flags without `STOP_COPY` are a [`CapabilitiesError`]. Flags unknown here are left out and
//! are no error: by the kernel's rules a new flag only adds states and arcs, and those are never asked for.

use std::fmt;

use crate::State;

const FLAG_STOP_COPY: u64 = 1 << 0;
const FLAG_P2P: u64 = 1 << 1;
const FLAG_PRE_COPY: u64 = 1 << 2;

/// The optional parts of a device's migration support. The mandatory part, `STOP_COPY`, is implied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capabilities {
    /// The device can be kept from starting DMA to its peers while it still runs.
    pub p2p: bool,
    /// The device can hand out state while it still runs.
    pub pre_copy: bool,
}

impl Capabilities {
    /// Every set of capabilities, from the least to the most.
    pub const ALL: [Self; 4] = [
        Self { p2p: false, pre_copy: false },
        Self { p2p: true, pre_copy: false },
        Self { p2p: false, pre_copy: true },
        Self { p2p: true, pre_copy: true },
    ];

    /// Reads the flags that the kernel answers to `VFIO_DEVICE_FEATURE_MIGRATION`.
    ///
    /// Unknown flags are dropped: [`Capabilities::kernel_flags`] does not give them back.
    pub const fn from_kernel_flags(flags: u64) -> Result<Self, CapabilitiesError> {
        if flags & FLAG_STOP_COPY == 0 {
            return Err(CapabilitiesError::StopCopyMissing { flags });
        }
        Ok(Self { p2p: flags & FLAG_P2P != 0, pre_copy: flags & FLAG_PRE_COPY != 0 })
    }

    /// The same capabilities as the kernel's flags.
    pub const fn kernel_flags(self) -> u64 {
        let p2p = if self.p2p { FLAG_P2P } else { 0 };
        let pre_copy = if self.pre_copy { FLAG_PRE_COPY } else { 0 };
        FLAG_STOP_COPY | p2p | pre_copy
    }

    /// Whether a device with these capabilities has the state. Every device may be found in `ERROR`.
    pub const fn supports(self, state: State) -> bool {
        match state {
            State::Error | State::Stop | State::Running | State::StopCopy | State::Resuming => true,
            State::RunningP2p => self.p2p,
            State::PreCopy => self.pre_copy,
            State::PreCopyP2p => self.p2p && self.pre_copy,
        }
    }

    /// What both sets have: the capabilities that a set of devices has as a whole.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self { p2p: self.p2p && other.p2p, pre_copy: self.pre_copy && other.pre_copy }
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match (self.p2p, self.pre_copy) {
            (false, false) => "STOP_COPY",
            (true, false) => "STOP_COPY|P2P",
            (false, true) => "STOP_COPY|PRE_COPY",
            (true, true) => "STOP_COPY|P2P|PRE_COPY",
        })
    }
}

/// Why a device's flags make no [`Capabilities`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CapabilitiesError {
    /// The mandatory `STOP_COPY` is not among the flags.
    StopCopyMissing {
        /// The flags as the device gave them.
        flags: u64,
    },
}

impl fmt::Display for CapabilitiesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StopCopyMissing { flags } => {
                write!(
                    f,
                    "migration flags {flags:#x} lack STOP_COPY; this device cannot be saved or restored"
                )
            }
        }
    }
}

impl std::error::Error for CapabilitiesError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_flags_round_trip() {
        for capabilities in Capabilities::ALL {
            assert_eq!(Capabilities::from_kernel_flags(capabilities.kernel_flags()), Ok(capabilities));
        }
        assert_eq!(Capabilities::ALL.map(Capabilities::kernel_flags), [0b001, 0b011, 0b101, 0b111]);
    }

    #[test]
    fn unknown_flags_are_left_out() {
        let capabilities = Capabilities::from_kernel_flags(0xffff_0003);
        assert_eq!(capabilities, Ok(Capabilities { p2p: true, pre_copy: false }));
    }

    #[test]
    fn stop_copy_is_mandatory() {
        for flags in [0, 0b010, 0b100, 0b110, 1 << 63] {
            assert_eq!(
                Capabilities::from_kernel_flags(flags),
                Err(CapabilitiesError::StopCopyMissing { flags })
            );
        }
    }

    #[test]
    fn intersection_has_the_states_that_both_have() {
        for a in Capabilities::ALL {
            for b in Capabilities::ALL {
                for state in State::ALL {
                    assert_eq!(a.intersection(b).supports(state), a.supports(state) && b.supports(state));
                }
            }
        }
    }
}
